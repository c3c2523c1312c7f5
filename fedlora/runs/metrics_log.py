"""metrics.jsonl: one line a round, on the disk before anything that follows from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from fedlora.errors import RunDirError
from fedlora.files import write_atomically


@final
class MetricsLog:
    """The lines of metrics of a run.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and wait until it is on disk. Numbers that are not finite are written as null."""
        line = json.dumps(plain(record), allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete lines, oldest first; a last line that a kill cut short is left out.

        Raises:
            RunDirError: a line is damaged.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        lines.pop()  # what follows the last newline: nothing, or a line that was cut short
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except ValueError:
                raise RunDirError(
                    f"line {number} of {str(self.path)!r} is damaged: remove that line", code="file-damaged"
                ) from None
        return records

    def truncate(self, last_round: int) -> None:
        """Forget the rounds after `last_round`, and a line that was cut short."""
        kept = [record for record in self.read() if record["round"] <= last_round]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def plain(value: Any) -> Any:
    """JSON has no NaN, no infinity and no numbers of numpy or torch."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain(inner) for inner in (value if isinstance(value, Sequence) else sorted(value))]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value) if isinstance(value, Path) else value
