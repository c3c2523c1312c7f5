"""Curves of several settings in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora.compare._groups import Group
from fedlora.errors import ConfigError
from fedlora.progress import format_metric
from fedlora.report.pictures import COLOURS, FAINT, INK, label_ends, new_figure, room_for_values, save_figure
from fedlora.sanitize import clean_text

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
MOST_GROUPS = len(COLOURS) * len(DASHES)


def plot_curves(groups: Sequence[Group], path: str | Path, title: str = "") -> Path:
    """The main figure by round: a line through the means over seeds, in a band of one sample standard deviation.

    A line carries its name and last value; only rounds that all seeds of a group evaluated are in it.

    Args:
        groups: a line each; their order is that of the colours.
        path: of the PNG.
        title: above the picture; "" for none.

    Raises:
        ConfigError: there are more groups than lines can be told apart.
    """
    from matplotlib.ticker import MaxNLocator

    if len(groups) > MOST_GROUPS:
        raise ConfigError(f"{len(groups)} settings are more than the {MOST_GROUPS} lines that one can tell apart")
    metric = groups[0].runs[0].metric
    unit = 100.0 if format_metric(metric, 0.5).endswith("%") else 1.0
    figure, axes = new_figure(7.6, max(4.2, 0.32 * len(groups)))
    ends: list[tuple[float, str, str, bool]] = []
    last, banded = 0, False
    for number, group in enumerate(groups):
        curves = [run.curve for run in group.runs]
        rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = unit * np.array([[curve[r] for r in rounds] for curve in curves])
        mean, colour = values.mean(axis=0), COLOURS[number % len(COLOURS)]
        if len(curves) > 1:
            deviation = values.std(axis=0, ddof=1)
            axes.fill_between(rounds, mean - deviation, mean + deviation, color=colour, alpha=0.13, lw=0, zorder=1)
            for edge in (mean - deviation, mean + deviation):  # bands that overlap can still be told apart
                axes.plot(rounds, edge, color=colour, lw=0.7, alpha=0.6, zorder=1)
            banded = True
        dash = DASHES[number // len(COLOURS)]
        axes.plot(rounds, mean, color=colour, lw=2.0, ls=dash, marker="o", ms=3.5, zorder=2)
        last = max(last, rounds[-1])
        if not math.isnan(mean[-1]):
            ends.append(
                (
                    float(mean[-1]),
                    f"{format_metric(metric, mean[-1] / unit)} {clean_text(group.label, 80)}",
                    colour,
                    False,
                )
            )
    room_for_values(axes, unit == 100.0)
    label_ends(axes, last, ends)
    most = max(len(group.runs) for group in groups)
    axes.set_xlabel("round" + (f" (bands: one standard deviation over up to {most} seeds)" if banded else ""))
    axes.set_ylabel(f"{metric.replace('_', ' ')} on the test set{', in %' if unit == 100.0 else ''}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=FAINT, lw=0.7)
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    return save_figure(figure, path)
