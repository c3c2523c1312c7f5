"""How an asset's rows are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path, *, compact: bool = False) -> None:
    """Write JSON lines with the same bytes on every machine; `compact` without blanks between a line's parts."""
    separators = (",", ":") if compact else None
    with path.open("w", encoding="utf-8", newline="\n") as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False, separators=separators) + "\n")
