"""Curves of several settings in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedlora.compare._groups import Group
from fedlora.errors import ConfigError
from fedlora.report.figures import COLOURS, save_png
from fedlora.report.line_charts import Line, line_chart

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
MOST_GROUPS = COLOURS * len(DASHES)


def plot_curves(groups: Sequence[Group], path: str | Path) -> Path:
    """The main figure by round: a line through the means over seeds, in a band of one sample standard deviation.

    A line carries its name and last value; only rounds that all seeds of a group evaluated are in it.

    Args:
        groups: a line each; their order is that of the colours.
        path: of the PNG.

    Raises:
        ConfigError: there are more groups than lines can be told apart.
    """
    if len(groups) > MOST_GROUPS:
        raise ConfigError(
            f"{len(groups)} settings are too many for one plot: compare at most {MOST_GROUPS}", code="too-many-settings"
        )
    metric = groups[0].runs[0].metric
    lines = []
    for number, group in enumerate(groups):
        curves = pd.concat([run.curve for run in group.runs], axis=1, join="inner").sort_index()
        mean, deviation = curves.mean(axis=1, skipna=False).to_numpy(), curves.std(axis=1, skipna=False).to_numpy()
        bands = [(mean - deviation, mean + deviation)] if len(group.runs) > 1 else []
        colour, dash = f"c{number % COLOURS}", DASHES[number // COLOURS]
        lines.append(Line(group.label, list(zip(curves.index, mean, strict=True)), colour, bands, dash))
    most = max(len(group.runs) for group in groups)
    xlabel = "round" if most == 1 else f"round (bands: one standard deviation over up to {most} seeds)"
    what = f"{metric.replace('_', ' ')} on the test set"
    return save_png(line_chart(lines, what, metric=metric, xlabel=xlabel).draw, path)
