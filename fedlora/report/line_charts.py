"""Line charts: values by round, with names and last values at the ends of the lines, so that none needs a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora.progress import format_metric
from fedlora.report._facts import Record, metric_of
from fedlora.report.figures import COLOURS, LETTER, LIGHT, LINE_HEIGHT, Chart, fit, new_figure

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
        name: at its end, before its last value.
        points: (x, y) by ascending x; a y that is NaN interrupts the line.
        colour: its name in the palette; "ink" is drawn thick.
        bands: (lowest, highest) edges behind it, with a value for each point.
        dash: matplotlib's line style.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "c0"
    bands: Sequence[tuple[Sequence[float], Sequence[float]]] = ()
    dash: Any = "-"


def line_chart(
    lines: Sequence[Line],
    what: str,
    caption: str = "",
    *,
    metric: str = "",
    xlabel: str = "round",
    from_zero: bool = False,
) -> Chart:
    """Values by round.

    Args:
        lines: the first is drawn on top.
        what: they show; stands beside the axis.
        caption: of the chart.
        metric: what they show as the metrics name it, if the axis is to suit it: per cent for shares, wide for others.
        xlabel: below the axis of rounds.
        from_zero: whether the axis of values must begin at zero.
    """
    share = metric != "" and format_metric(metric, 0.5).endswith("%")

    def show(value: float) -> str:
        return format_metric(metric, value) if metric else f"{value:.4g}"

    def draw(width: float) -> Figure:
        height = max(0.45 * width, 220.0, LINE_HEIGHT * len(lines) + 80)
        figure, axes = new_figure(width, height)
        for depth, line in enumerate(lines):
            x, y = zip(*line.points, strict=True)
            colour, thick = LIGHT[line.colour], line.colour == "ink"
            for low, high in line.bands:
                axes.fill_between(x, low, high, fc=(colour, 0.15), ec=(colour, 0.5), lw=0.5, zorder=1.5)
            size = 0.0 if len(x) > MOST_DOTS else 6.0 if thick else 4.0
            style = {"lw": 3.0 if thick else 1.8, "ls": line.dash, "marker": "o", "ms": size}
            axes.plot(x, y, color=colour, solid_capstyle="round", zorder=3 - depth / len(lines), **style)
        if from_zero:
            axes.set_ylim(bottom=0)
        if metric and not share:
            widen(axes)
        ends = [
            (line, f"{line.name} {show(line.points[-1][1])}") for line in lines if math.isfinite(line.points[-1][1])
        ]
        _label_ends(axes, ends, width, LINE_HEIGHT / (height - 70))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if share else f"{value:.4g}")
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")
        axes.set(xlabel=xlabel, ylabel=what)
        return figure

    said = []
    for line in lines:
        (start, before), (end, after) = line.points[0], line.points[-1]
        said.append(f"{line.name} {show(before)} in round {start}, {show(after)} in round {end}")
        said += [f"a band from {show(low[-1])} to {show(high[-1])} in round {end}" for low, high in line.bands]
    return Chart(draw, f"Line chart of {what} by round: {'; '.join(said)}.", caption)


def accuracy_curve(records: Sequence[Record], metric: str, before: str) -> Chart:
    """The main figure after each evaluated round, on the whole test set and on each domain.

    Args:
        records: lines of metrics.jsonl.
        metric: the main figure.
        before: what round 0 measured; see `fedlora.progress.before_training`.
    """
    domains = list(dict.fromkeys(name for record in records for name in record.get("domains") or {}))
    lines = []
    for place, name in enumerate([None, *domains[:MOST_LINES]]):
        values = ((record["round"], metric_of(record, metric, name)) for record in records)
        if points := [(x, y) for x, y in values if y is not None]:
            colour, dash = f"c{(place - 1) % COLOURS}" if place else "ink", "--" if place > COLOURS else "-"
            lines.append(Line(name or "all", points, colour, dash=dash))
    number, start = lines[0].points[0]
    what = f"{metric.replace('_', ' ')} on the test set"
    caption = f"{what[0].upper()}{what[1:]} after each round"
    caption += "." if number else f"; round 0 is the {before}, before any training."
    if sampled := next((record["sample"] for record in records if "sample" in record), None):
        caption += f" Between the first and the last round {sampled} test examples were measured (evaluation.sample)."
    if len(domains) > MOST_LINES:
        caption += f" The first {MOST_LINES} of {len(domains)} domains are drawn; the table has all."
    notes = [] if number else [f"0: {before}, {format_metric(metric, start)}"]
    notes += [f"between the ends on {sampled} test examples"] if sampled else []
    xlabel = f"round ({'; '.join(notes)})" if notes else "round"
    return line_chart(lines, what, caption, metric=metric, xlabel=xlabel)


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


def _label_ends(axes: Axes, ends: Sequence[tuple[Line, str]], width: float, gap: float) -> None:
    """Labels at the right ends of lines, moved apart where they would overlap.

    Args:
        axes: whose range is settled.
        ends: lines and their labels.
        width: of the figure.
        gap: between two labels, as a part of the height.
    """
    low, high = axes.get_ylim()
    places = spread([(line.points[-1][1] - low) / (high - low) for line, _ in ends], gap)
    for (line, label), place in zip(ends, places, strict=True):
        lead = {"arrowstyle": "-", "color": LIGHT[line.colour], "lw": 0.8, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            fit(label, int(0.4 * width / LETTER)),
            line.points[-1],
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontweight="bold" if line.colour == "ink" else "normal",
            annotation_clip=False,
            arrowprops=lead | {"relpos": (0, 0.5)},
        )
