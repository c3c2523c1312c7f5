"""Several comparisons as one table of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fedlora.compare._comparison import compare
from fedlora.compare._tables import Table


def compare_cases(cases: Mapping[str, Iterable[str | Path]]) -> Table:
    """Compare within each case, against the case's first setting, and put the cases below each other.

    Args:
        cases: name -> folders of its runs; across cases nothing is compared.

    Returns:
        A row for each setting of each case: the case, and what `Comparison.raw` says; empty where a case has no such
        figure, or one value of a key for all its settings.

    Raises:
        RunDirError: a path is no run, or a case has no finished run.
        ConfigError: the runs of a case have different tasks.
    """
    tables = {case: compare(paths).raw() for case, paths in cases.items()}
    columns = list(dict.fromkeys(name for table in tables.values() for name in table.header))
    rows = []
    for case, table in tables.items():
        for row in table.rows:
            cells = dict(zip(table.header, row, strict=True))
            rows.append([case, *(cells.get(name, "") for name in columns)])
    return Table("", ["case", *columns], rows)
