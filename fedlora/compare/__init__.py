"""Runs side by side: `fedlora compare`."""

from fedlora.compare._bootstrap import Difference, difference
from fedlora.compare._cases import compare_cases
from fedlora.compare._comparison import Comparison, compare, mean_and_deviation
from fedlora.compare._ground import silently_changed
from fedlora.compare._groups import Group, differences, group_runs
from fedlora.compare._plot import plot_curves
from fedlora.compare._reading import Run, read_run, read_runs
from fedlora.compare._tables import FORMATS, Table, require_format

__all__ = [
    "FORMATS",
    "Comparison",
    "Difference",
    "Group",
    "Run",
    "Table",
    "compare",
    "compare_cases",
    "difference",
    "differences",
    "group_runs",
    "mean_and_deviation",
    "plot_curves",
    "read_run",
    "read_runs",
    "require_format",
    "silently_changed",
]
