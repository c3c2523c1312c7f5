"""Runs side by side: `fedlora compare`."""

from fedlora.compare._comparison import Comparison, compare, compare_cases
from fedlora.compare._difference import Difference, difference, student_interval
from fedlora.compare._groups import Group, differing_keys, group_runs, silently_changed
from fedlora.compare._plot import plot_curves
from fedlora.compare._runs import Run, read_run, read_runs
from fedlora.compare._tables import FORMATS, render_table, require_format

__all__ = [
    "FORMATS",
    "Comparison",
    "Difference",
    "Group",
    "Run",
    "compare",
    "compare_cases",
    "difference",
    "differing_keys",
    "group_runs",
    "plot_curves",
    "read_run",
    "read_runs",
    "render_table",
    "require_format",
    "silently_changed",
    "student_interval",
]
