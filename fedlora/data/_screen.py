"""A node's own file under [privacy]: rows that cannot be used are left out, and its own log alone says how many.

In a run without privacy one bad row ends its node's part with a message that names it. Under privacy that would show
whoever sees the messages that the row is there. So every row is judged by itself: what cannot be read or prepared is
left out, and a node with few examples, or none, answers as any other.

An example is a row as the readers of this module find it: a line of .jsonl, a record of .csv. A file that has no rows
at all, or none that can be read, is a node without examples.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.assets import Checkpoint
from fedlora.data._sources import READERS, needed_columns, optional_columns, read_file, select
from fedlora.errors import ConfigError, DataError, nearest
from fedlora.sanitize import clean_text
from fedlora.tasks import Examples, Table, Task
from fedlora.tasks._classification import Classification

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def screened(path: Path, task: Task, model: Checkpoint, columns: Mapping[str, str]) -> Examples:
    """The usable examples of a file, in their order.

    Args:
        path: of the file.
        task: prepares them.
        model: where its tokenizer is.
        columns: role -> column.

    Raises:
        DataError: the file's header lacks a column, or it is of a kind that cannot be read.
        ConfigError: the task is one whose examples cannot be invented here.
    """
    require_header(path, needed_columns(task, columns))
    empty = optional_columns(task, columns)
    nothing = invented(task, model, columns).take([])
    try:
        rows = list(_rows(path))
    except Exception as error:
        logger.warning("%s cannot be read, and counts as empty: %s", path, clean_text(error))
        return nothing
    reasons: list[str] = []

    def prepared(some: Sequence[Row]) -> Examples:
        table = Table({name: [row.get(name) for row in some] for name in columns.values()})
        return task.prepare(select(table, tuple(columns.values()), repr(str(path)), empty), model, columns, keep=())

    def good(some: Sequence[Row]) -> Iterator[Row]:
        """Halve what cannot be prepared until each bad row is found."""
        try:
            if some:
                prepared(some)
                yield from some
        except Exception as error:
            if len(some) == 1:
                reasons.append(clean_text(error))
                return
            middle = len(some) // 2
            yield from good(some[:middle])
            yield from good(some[middle:])

    names = getattr(task, "labels", ()) if isinstance(task, Classification) else ()
    named = (_with_class(row, columns.get("label"), names, reasons) for row in rows)
    usable = list(good([row for row in named if row is not None]))
    if left_out := len(rows) - len(usable):
        first = reasons[0] if reasons else "a line that cannot be read"
        logger.warning("%d of %d rows of %s are left out; the first: %s", left_out, len(rows), path, first)
    try:
        return prepared(usable) if usable else nothing
    except Exception as error:  # a task for which rows are not each by itself
        logger.warning("%s counts as empty, since its rows cannot be prepared together: %s", path, clean_text(error))
        return nothing


def _with_class(row: Row | None, column: str | None, labels: Sequence[str], reasons: list[str]) -> Row | None:
    """A row with its class by name; None for one without a class.

    Where no name is a number a row may say the place of its class, from 0, whatever other rows do: the tasks' own
    reading of a column goes by all of its labels.
    """
    if row is None or column is None or not labels:
        return row
    value = row.get(column)
    if isinstance(value, bool | int | float) and float(value).is_integer():
        value = str(int(value))
    name = value.strip() if isinstance(value, str) else ""
    if name not in labels and name.isdecimal() and int(name) < len(labels) and not any(map(str.isdecimal, labels)):
        name = labels[int(name)]
    if name not in labels:
        reasons.append(f"column {column!r}: {clean_text(repr(value), 80)} is no class")
        return None
    return {**row, column: name}


def require_header(path: Path, names: Sequence[str]) -> None:
    """Raise for a file whose header lacks a column; what has no header (.jsonl, .json) is not looked at.

    Raises:
        DataError: also if it is of a kind that cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise DataError(
            f"{str(path)!r} is of an unknown file type; convert it to one of {', '.join(READERS)}",
            code="unknown-file-type",
        )
    try:
        found = _header(path, kind)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{str(path)!r} cannot be read as {kind}: {clean_text(error, 100)}", code="malformed-file"
        ) from None
    if found is None:
        return
    for name in names:
        if name not in found:
            raise DataError(f"{str(path)!r} has no column {name!r}; {nearest(name, found)}", code="no-such-column")


def _header(path: Path, kind: str) -> Sequence[str] | None:
    if kind == ".parquet":
        import pyarrow.parquet

        names: list[str] = pyarrow.parquet.read_schema(path).names
        return names
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return next(csv.reader(file, delimiter=_DELIMITERS[kind]), []) if kind in _DELIMITERS else None


def invented(task: Task, model: Checkpoint, columns: Mapping[str, str]) -> Examples:
    """Four examples that are nobody's, of unequal length: what a model can be tried on where nothing public is at hand.

    Raises:
        ConfigError: the task has a role whose values cannot be made up here.
    """
    table: dict[str, Sequence[Any]] = {}
    for role, column in columns.items():
        values = task.invented(role) or _INVENTED.get(role)
        if values is None:
            raise ConfigError(
                f"under [privacy] nodes can bring their own data for tasks on text and images alone: no example can be "
                f"made up for the role {role!r}; remove [privacy], or change task.name",
                code="role-without-example",
            )
        table[column] = values
    return task.prepare(Table(table), model, columns, keep=())


_TEXTS = ("a", "one two three", "it is as good as it can be", "there are four of them, and this is the last one")
_CONVERSATIONS = tuple([{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in _TEXTS)
_INVENTED: Mapping[str, Sequence[Any]] = {
    **dict.fromkeys(("text", "chosen", "prompt", "instruction"), _TEXTS),
    **dict.fromkeys(("text_pair", "completion", "output", "rejected"), tuple(reversed(_TEXTS))),
    **dict.fromkeys(("messages", "conversations"), _CONVERSATIONS),
    **dict.fromkeys(("input", "system", "tools"), (None,) * len(_TEXTS)),
    "image": [np.full((16, 16), 60 * place, dtype=np.uint8) for place in range(len(_TEXTS))],
}
"""Role -> four values."""


# ---------------------------------------------------------------------------------------------- rows one by one


def _rows(path: Path) -> Iterator[Row | None]:
    """The rows of a file, None for one that cannot be read."""
    kind = path.suffix.lower()
    if kind in _DELIMITERS:
        return _records(path, _DELIMITERS[kind])
    if kind == ".jsonl":
        return (_object(line) for line in path.read_bytes().splitlines() if line.strip())
    if kind == ".json":
        tree = json.loads(path.read_bytes().decode("utf-8-sig", errors="surrogateescape"))
        if isinstance(tree, list):
            return (row if isinstance(row, dict) else None for row in tree)
    columns = read_file(path).columns
    return (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))


_DELIMITERS = {".csv": ",", ".tsv": "\t"}


MOST_LINES = 10_000
"""Lines of a file that one quoted field may go over."""


def _records(path: Path, delimiter: str) -> Iterator[Row | None]:
    """Records, of one line or of several with line breaks in quotes.

    A quote that is never closed, or closed by that of another record, costs its own line alone and not all that follow.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = list(file)
    header, place = _record(lines, 0, delimiter)
    while place < len(lines):
        fields, end = _record(lines, place, delimiter)
        if fields is not None and _is_whole(fields, header or ()):
            yield dict(zip(header or (), fields, strict=True))
            place = end
            continue
        if lines[place].strip("\r\n"):
            yield None
        place += 1


def _record(lines: Sequence[str], start: int, delimiter: str) -> tuple[list[str] | None, int]:
    """The fields of the record that begins in a line, None if there is none; and the line after it."""
    text = ""
    for end in range(start, min(start + MOST_LINES, len(lines))):
        text += lines[end]
        if end > start and '"' not in lines[end]:  # nothing is closed here
            continue
        try:
            found = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
        except csv.Error:
            continue
        return (found[0] if len(found) == 1 else None), end + 1
    return None, start + 1


def _is_whole(line: Sequence[str], header: Sequence[str]) -> bool:
    return len(line) == len(header) and not any("\udc80" <= mark <= "\udcff" for cell in line for mark in cell)


def _object(line: bytes) -> Row | None:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
