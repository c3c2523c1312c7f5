"""Raw examples from files, named corpora and the hub, as columns."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.assets import ASSETS, resolve_corpus
from fedlora.config import DataConfig
from fedlora.data.source import own_source, read_split
from fedlora.errors import ConfigError, DataError, closest, looks_like_path, nearest, nearest_file
from fedlora.passed_in import refuse_lost
from fedlora.rng import derive
from fedlora.sanitize import clean_text
from fedlora.tasks import Table, Task
from fedlora.tasks._text import require_encodable


def source_files(data: DataConfig) -> tuple[Path | None, Path | None]:
    """The files behind `data.source` and `data.test`; None for what the hub or one's own source has, and no `test`.

    Raises:
        AssetError: the source is a named corpus that was not fetched.
        ConfigError: keys for the hub stand beside a file.
        DataError: a file is missing, or its kind cannot be read.
    """
    own = own_source(data)
    source = None if own else resolve_corpus(data.source) or _local_file(data.source)
    test = None if data.test is None else _local_file(data.test)
    if own is not None and data.subset is not None:
        raise ConfigError(
            "data.subset applies to data sets of the hub: give data.options the fields of a source of one's own",
            code="key-without-effect",
        )
    if source is not None:
        for key, given in (("subset", data.subset is not None), ("train_split", data.train_split != "train")):
            if given:
                raise ConfigError(
                    f"data.{key} applies to data sets of the hub, and {data.source!r} is not one: remove it",
                    code="key-without-effect",
                )
        if data.test is not None and test is None:
            raise DataError(
                f"data.test {data.test!r} is not a data file; give one of {', '.join(sorted(READERS))}",
                code="not-a-data-file",
            )
    return source, test


def read_source(data: DataConfig) -> tuple[Table, Table | None]:
    """The tables of `data.source` and, if it is set, of `data.test`."""
    source, test = source_files(data)
    own, corpus = own_source(data), ASSETS.get(data.source)
    read = partial(_hub, data) if own is None else partial(read_split, own)
    if source is None:
        train_table = read(data.train_split)
    else:
        train_table = Table(read_file(source).columns, () if corpus is None else corpus.label_names)
    if data.test is None:
        return train_table, None
    return train_table, (read(data.test) if test is None else read_file(test))


def read_file(path: Path) -> Table:
    """All columns of a .csv, .tsv, .jsonl, .json or .parquet file.

    The first line of .csv and .tsv names the columns, and fields may be quoted. A .json file is a list of objects, or
    an object of columns.

    Raises:
        DataError: the file is missing, empty, damaged, or of another kind.
    """
    file = _local_file(str(path))
    if file is None:
        raise DataError(
            f"{str(path)!r} is not a data file; give one of {', '.join(sorted(READERS))}", code="not-a-data-file"
        )
    try:
        columns = READERS[file.suffix.lower()](file)
    except UnicodeDecodeError:
        raise DataError(f"{str(file)!r} is not UTF-8 text; convert it", code="not-utf8") from None
    except OSError as error:
        raise DataError(
            f"{str(file)!r} cannot be read: {error.strerror or clean_text(error, 200)}", code="file-not-readable"
        ) from None
    except (ValueError, RecursionError, csv.Error, _arrow_error()) as error:
        first = clean_text(next(iter(str(error).splitlines()), type(error).__name__), 200)
        raise DataError(
            f"{str(file)!r} cannot be read as {file.suffix.lower()}: {first}", code="malformed-file"
        ) from None
    table = Table(columns)
    if len(table) == 0:
        raise DataError(f"{str(file)!r} has no rows: check data.source and data.test", code="empty-file")
    return table


def select(table: Table, names: Sequence[str], where: str, empty: Sequence[str] = ()) -> Table:
    """Only the columns `names`, as lists without gaps but in those of `empty`.

    Raises:
        DataError: a column is missing, or a value in it is.
    """
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(names):
        if name not in table.columns:
            raise DataError(f"{where} has no column {name!r}; {_cure(name, table.columns)}", code="no-such-column")
        columns[name] = list(table.columns[name])
        for row, value in enumerate(columns[name]):
            if name in empty:
                columns[name][row] = None if _is_nan(value) else value
            elif value is None or _is_nan(value) or (isinstance(value, str) and not value.strip()):
                raise DataError(
                    f"{where}: row {row} (from 0) has no value in column {name!r}: remove the row or fill it in",
                    code="missing-value",
                )
    return Table(columns, table.label_names)


def optional_columns(task: Task, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns whose cells may be empty, of role -> column."""
    return tuple(column for role, column in columns.items() if role in task.optional_roles)


def needed_columns(task: Task, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that a file must have, of role -> column: optional ones where the config names them."""
    return tuple(column for role, column in columns.items() if role not in task.optional_roles or role != column)


def require_one_kind(values: Sequence[Any], name: str) -> None:
    """Refuse a column of domains, groups or clients whose values are not of one kind: 1 and "1" would be joined.

    Raises:
        DataError: values are of several kinds, or of one that names nobody (a list, a table).
    """
    kinds: dict[type, int] = {}
    for row, value in enumerate(values):
        kinds.setdefault(type(value), row)
    for kind, row in kinds.items():
        if not issubclass(kind, str | int | float | date | np.generic):
            raise DataError(
                f"row {row}, column {name!r}: {clean_text(repr(values[row]), 80)} cannot name a domain, group or "
                "client: write text or numbers",
                code="not-a-name",
            )
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise DataError(
            f"column {name!r} mixes types: {one.__name__} in row {first}, {other.__name__} in row {second}; write "
            f"all values as one type, since {'1'!r} and 1 are two names",
            code="mixed-types",
        )
    for row, value in enumerate(values):
        if isinstance(value, str):
            require_encodable(value, row, name)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def limited_rows(table: Table, limit: int | None, seed: int) -> np.ndarray:
    """The rows, ascending, of at most `limit` examples, drawn with the seed."""
    if limit is None or limit >= len(table):
        return np.arange(len(table))
    return np.sort(np.random.default_rng(derive(seed, "limit")).permutation(len(table))[:limit])


def limited(table: Table, limit: int | None, seed: int) -> Table:
    """At most `limit` rows, drawn with the seed and kept in their order."""
    if limit is None or limit >= len(table):
        return table
    rows = limited_rows(table, limit, seed)
    return Table({name: [values[row] for row in rows] for name, values in table.columns.items()}, table.label_names)


def _local_file(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.suffix.lower() in READERS:
        if path.is_dir():
            raise DataError(
                f"{name!r} is a folder, not a data file; name a file in it, or rename the folder", code="not-a-file"
            )
        refuse_lost(name, DataError, "dataset= (or clients=)")
        if not path.is_file():
            beside = path.parent.glob("*") if path.parent.is_dir() else ()
            others = [str(other) for other in beside if other.suffix.lower() in READERS]
            raise DataError(f"there is no data file {name!r}; {nearest_file(path, others)}", code="no-such-file")
        return path
    if path.is_file():
        raise DataError(
            f"{name!r} is of an unknown file type; convert it to one of {', '.join(sorted(READERS))}",
            code="unknown-file-type",
        )
    if looks_like_path(name) and not path.is_dir():
        raise DataError(f"there is no file or folder {name!r}; check data.source and data.test", code="no-such-file")
    return None


def _hub(data: DataConfig, split: str) -> Table:
    import datasets

    try:
        loaded = datasets.load_dataset(data.source, data.subset, split=split)
    except Exception as error:  # the hub's client raises whatever its layers raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        corpora = [name for name, asset in ASSETS.items() if asset.kind == "corpus"]
        raise DataError(
            f"data.source {data.source!r} (split {split!r}) is neither a file nor a corpus ({', '.join(corpora)}); "
            f"the hub answered: {first}; {nearest(data.source, corpora)}",
            code="no-such-dataset",
        ) from None
    label = loaded.features.get(data.label)
    names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else ()
    if len(loaded) == 0:
        raise DataError(
            f"split {split!r} of {data.source!r} has no rows: name another split or data set", code="empty-split"
        )
    columns = {name: loaded[name] for name in loaded.column_names}
    if names:  # by name, since a name may be a number too; -1 stands for no label
        columns[data.label] = [None if k is None or k < 0 else names[k] for k in columns[data.label]]
    return Table(columns, names)


def _delimited(delimiter: str) -> Callable[[Path], dict[str, list[Any]]]:
    def read(path: Path) -> dict[str, list[Any]]:
        # The module's own limit of 128 KiB a field is shorter than some documents.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            rows: list[list[str]] = []
            header: list[str] = []
            try:
                header = next(lines, [])
                _check_header(header, delimiter)
                for line in lines:
                    if not line:
                        continue
                    if len(line) != len(header):
                        raise ValueError(f"line {lines.line_num} has {len(line)} fields, the first line {len(header)}")
                    rows.append(line)
            except csv.Error as error:  # says what, and not where
                raise ValueError(f"line {lines.line_num}: {error}") from None
        return {name: [row[place] for row in rows] for place, name in enumerate(header)}

    return read


def _check_header(header: Sequence[str], delimiter: str) -> None:
    _require_distinct(header, "column")
    others = {",": "a comma", ";": "';'", "\t": "a tab", "|": "'|'"}
    if len(header) == 1 and (found := next((mark for mark in others if mark in header[0]), None)):
        raise ValueError(
            f"its columns are separated by {others[found]}, and those of this file type by {others[delimiter]}: "
            "convert it (.csv has commas, .tsv has tabs)"
        )


def _json_lines(path: Path) -> dict[str, list[Any]]:
    rows: list[Any] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(_parsed(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
            if number == 1 and isinstance(rows[0], list):
                raise ValueError("it is one list, not one object per line: rename it to .json")
    return _transposed(rows)


def _json(path: Path) -> dict[str, list[Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        tree = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise ValueError(f"a second value begins on line {error.lineno}: one object per line is .jsonl") from None
        raise
    if isinstance(tree, list):
        return _transposed(tree)
    if isinstance(tree, dict) and all(isinstance(values, list) for values in tree.values()):
        if len({len(values) for values in tree.values()}) > 1:
            raise ValueError("its columns differ in length")
        return tree
    raise ValueError("it is neither a list of objects nor an object of columns")


def _parsed(text: str) -> Any:
    """A JSON value; a key that occurs twice in an object, of which only the last would count, is refused."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    _require_distinct([name for name, _ in pairs], "key")
    return dict(pairs)


def _require_distinct(names: Sequence[str], kind: str) -> None:
    if len(set(names)) != len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"{kind} {twice!r} occurs twice")


def _transposed(rows: Sequence[Any]) -> dict[str, list[Any]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet

    _require_distinct(pyarrow.parquet.read_schema(path).names, "column")
    columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    return columns


def _arrow_error() -> type[Exception]:
    """What pyarrow raises; a class of nobody's where it was not imported and so raised nothing."""
    module = sys.modules.get("pyarrow")
    return csv.Error if module is None else module.ArrowException


READERS: Mapping[str, Callable[[Path], dict[str, list[Any]]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
"""Suffix -> what reads it."""


def _cure(name: str, columns: Mapping[str, Any]) -> str:
    if closest(name, columns) is not None:
        return nearest(name, columns)
    return f"name one of its columns in [data] or [partition] ({', '.join(sorted(columns))}), or change task.name"
