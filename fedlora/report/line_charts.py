"""Line charts: values by round, with names and last values at the ends of the lines, so that none needs a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.progress import format_metric
from fedlora.report._facts import Record, main_value
from fedlora.report.figures import COLOURS, LETTER, LIGHT, LINE_HEIGHT, Drawing, fit, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SPAN = 0.3
"""Of an axis of values that are no shares, as a part of the largest."""
MOST_LINES = 8
"""Domains beyond these are left out of the chart."""
MOST_DOTS = 60
"""Rounds above which lines have no dots."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        label: at its end.
        points: (x, y) by ascending x; a y that is NaN interrupts the line.
        colour: its name in the palette; "ink" is drawn thick.
        bands: (lowest, highest) edges behind it, with a value for each point.
        dash: matplotlib's line style.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = "c0"
    bands: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    dash: Any = "-"


def line_chart(
    lines: Sequence[Line], *, metric: str = "", xlabel: str = "round", ylabel: str = "", from_zero: bool = False
) -> Drawing:
    """Values by round.

    Args:
        lines: the first is drawn on top.
        metric: the figure they show, if its axis is to suit it: per cent for shares, and wide enough for others.
        xlabel: below the chart.
        ylabel: beside it.
        from_zero: whether the axis must begin at zero.
    """
    share = metric != "" and format_metric(metric, 0.5).endswith("%")

    def draw(width: float) -> Figure:
        height = max(0.45 * width, 220.0, LINE_HEIGHT * len(lines) + 80)
        figure, axes = new_figure(width, height)
        for depth, line in enumerate(lines):
            x, y = zip(*line.points, strict=True)
            colour, thick = LIGHT[line.colour], line.colour == "ink"
            for low, high in line.bands:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0, zorder=1.5)
            size = 0.0 if len(x) > MOST_DOTS else 6.0 if thick else 4.0
            style = {"lw": 3.0 if thick else 1.8, "ls": line.dash, "marker": "o", "ms": size}
            axes.plot(x, y, color=colour, solid_capstyle="round", zorder=3 - depth / len(lines), **style)
        if from_zero:
            axes.set_ylim(bottom=0)
        if metric and not share:
            widen(axes)
        _label_ends(axes, lines, width, LINE_HEIGHT / (height - 70))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if share else f"{value:.4g}")
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return figure

    return draw


def accuracy_curve(records: Sequence[Record], metric: str) -> tuple[Drawing, list[Line]]:
    """The main figure after each evaluated round, on the whole test set and on each domain, and the lines drawn."""
    domains = dict.fromkeys(name for record in records for name in record.get("domains") or {})
    lines = []
    for place, name in enumerate([None, *domains][: MOST_LINES + 1]):
        values = ((record["round"], main_value(record, metric, name)) for record in records)
        points = [(x, y) for x, y in values if y is not None]
        if points:
            label = f"{'all' if name is None else name} {format_metric(metric, points[-1][1])}"
            lines.append(Line(label, points, "ink" if name is None else f"c{(place - 1) % COLOURS}"))
    number, start = lines[0].points[0]
    xlabel = "round" if number else f"round (0: base model, {format_metric(metric, start)})"
    ylabel = f"{metric.replace('_', ' ')} on the test set"
    return line_chart(lines, metric=metric, xlabel=xlabel, ylabel=ylabel), lines


def widen(axes: Axes) -> None:
    """Let the axis span at least a part of its largest value, so that 3% look like 3%."""
    low, high = axes.get_ylim()
    lacking = max(0.0, LEAST_SPAN * max(abs(low), abs(high)) - (high - low))
    below = min(lacking / 2, max(low, 0.0))
    axes.set_ylim(low - below, high + lacking - below)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places as near to `values` as they can be with `gap` between neighbours, in the same order.

    Least squares under the order: subtract the gaps, pool neighbours that are out of order, add the gaps again.
    """
    order = sorted(range(len(values)), key=lambda k: values[k])
    blocks: list[tuple[float, int]] = []
    for number, k in enumerate(order):
        mean, size = values[k] - number * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    places = [0.0] * len(values)
    for number, k in enumerate(order):
        places[k] = flat[number] + number * gap
    return places


def _label_ends(axes: Axes, lines: Sequence[Line], width: float, gap: float) -> None:
    """Labels at the right ends of the lines, moved apart where they would overlap.

    Args:
        axes: whose range is settled.
        lines: what is drawn.
        width: of the figure.
        gap: between two labels, as a part of the height.
    """
    low, high = axes.get_ylim()
    ended = [line for line in lines if math.isfinite(line.points[-1][1])]
    places = spread([(line.points[-1][1] - low) / (high - low) for line in ended], gap)
    for line, place in zip(ended, places, strict=True):
        lead = {
            "arrowstyle": "-",
            "color": LIGHT[line.colour],
            "lw": 0.8,
            "shrinkA": 0,
            "shrinkB": 4,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            fit(line.label, int(0.4 * width / LETTER)),
            line.points[-1],
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontweight="bold" if line.colour == "ink" else "normal",
            annotation_clip=False,
            arrowprops=lead,
        )
