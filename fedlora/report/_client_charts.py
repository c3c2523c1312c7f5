"""Charts of the clients: their traffic, who took part, and what each of them holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.progress import format_bytes
from fedlora.report.figures import COLOURS, LETTER, LIGHT, LINE_HEIGHT, Drawing, fit, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 60
"""Clients above which none has a row of its own."""
SHADES = 8

KINDS: Mapping[str, tuple[str, str, str]] = {
    "idle": ("idle", "", "not asked"),
    "answered": ("c2", "", "answered"),
    "offline": ("c6", "_", "offline, could not be asked"),
    "dropped": ("c4", "v", "dropped out"),
    "late": ("c4", ">", "late, after the simulated deadline"),
    "missing": ("c3", "o", "no reply before the deadline"),
    "spent": ("c3", "D", "refused, its privacy budget is spent"),
    "refused": ("c1", "x", "refused"),
}
"""What can become of a client in a round: colour, marker, words; the worst comes last."""


def traffic_columns(starts: Sequence[int], size: int, up: Sequence[float], down: Sequence[float]) -> Drawing:
    """Bytes that clients sent and received, a column for every `size` rounds from each of `starts` on."""

    def draw(width: float) -> Figure:
        figure, axes = new_figure(width, 0.3 * width + 110)
        middle = np.asarray(starts) + (size - 1) / 2
        axes.bar(middle, up, 0.76 * size, color=LIGHT["c0"], label=f"sent by clients: {format_bytes(sum(up))}")
        words = f"received by clients: {format_bytes(sum(down))}"
        axes.bar(middle, down, 0.76 * size, bottom=up, color=LIGHT["c1"], label=words)
        axes.yaxis.set_major_formatter(lambda value, _: format_bytes(value))
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")
        axes.set_xlabel("round")
        _legend(figure, width, *axes.get_legend_handles_labels())
        return figure

    return draw


def participation_grid(grid: np.ndarray, clients: Sequence[str], rounds: Sequence[int]) -> Drawing:
    """One cell for each client (row) and round (column), in the colour and with the marker of its place in `KINDS`."""

    def draw(width: float) -> Figure:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        seen = np.unique(grid)
        words = [list(KINDS.values())[place][2] for place in seen]
        tall, room = 17.0 if len(clients) <= 30 else 9.0, max(len(rounds), (width - 60) / 24)
        figure, axes = new_figure(width, tall * len(clients) + 18 * math.ceil(len(seen) / _columns(width, words)) + 60)
        _cells(axes, grid, [(colour, 1.0) for colour, *_ in KINDS.values()])
        handles = []
        for place in seen:
            colour, marker, _ = list(KINDS.values())[place]
            y, x = np.nonzero(grid == place)
            mark = Line2D(x, y, color=LIGHT["page"], marker=marker, ls="", ms=5, mew=1.5)
            if tall > 12 and room == (width - 60) / 24:
                axes.add_line(mark)
            handles.append((Patch(color=LIGHT[colour]), mark))
        _legend(figure, width, handles, words)
        every = math.ceil((12 + LETTER * len(str(rounds[-1]))) * room / (width - 60))
        axes.set_xticks(range(0, len(rounds), every), [str(number) for number in rounds[::every]])
        axes.set_xlim(-0.5, room - 0.5)
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("round", loc="left")
        _rows(axes, clients, tall, width)
        return figure

    return draw


def holdings(counts: np.ndarray, kinds: Sequence[str], clients: Sequence[str]) -> Drawing:
    """How many examples of each kind (column) every client (row) holds.

    Up to seven kinds are stacked bars, more are shades; of more than `MOST_ROWS` clients the distribution is drawn.
    """
    draw = _distribution if len(clients) > MOST_ROWS else _bars if len(kinds) <= COLOURS else _shades
    names = [fit(name, 40) for name in kinds]
    return lambda width: draw(width, counts, names, clients)


def _bars(width: float, counts: np.ndarray, names: Sequence[str], clients: Sequence[str]) -> Figure:
    legend_rows = math.ceil(len(names) / _columns(width, names)) if len(names) > 1 else 0
    figure, axes = new_figure(width, 18.0 * len(clients) + 18 * legend_rows + 65)
    left = np.zeros(len(clients))
    for place, name in enumerate(names):
        bars = axes.barh(range(len(clients)), counts[:, place], 0.8, left, color=LIGHT[f"c{place}"], label=name)
        left += counts[:, place]
    axes.bar_label(bars, [f"{total:.0f}" for total in left], padding=4)
    axes.set_xlim(0, max(1.0, 1.1 * left.max()))
    axes.set_xlabel("training examples")
    axes.locator_params(axis="x", nbins=max(2, int(width / 90)), integer=True)
    _rows(axes, clients, 18.0, width)
    if len(names) > 1:
        _legend(figure, width, *axes.get_legend_handles_labels())
    return figure


def _shades(width: float, counts: np.ndarray, names: Sequence[str], clients: Sequence[str]) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize, to_rgba

    most, heads = max(1, counts.max()), [fit(name, 16) for name in names]
    longest = max(len(head) for head in heads)
    figure, axes = new_figure(width, 16.0 * len(clients) + 70 + LETTER * (longest if longest > 3 else 3))
    shades = [("c0", place / SHADES) for place in range(SHADES + 1)]
    _cells(axes, np.ceil(SHADES * counts / most).astype(int), shades)
    every = math.ceil(16 * len(names) / (0.75 * width))
    axes.set_xticks(range(0, len(names), every), heads[::every], rotation=90 if longest > 3 else 0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    _rows(axes, clients, 16.0, width)
    colours = ListedColormap([to_rgba(LIGHT[name], alpha) for name, alpha in shades[1:]])
    bar = figure.colorbar(ScalarMappable(Normalize(0, most), colours), ax=axes, pad=0.02, label="training examples")
    bar.outline.set_visible(False)
    return figure


def _distribution(width: float, counts: np.ndarray, names: Sequence[str], clients: Sequence[str]) -> Figure:
    """Clients by their number of examples; below, by their share of the commonest kind, which then shows as a slope."""
    figure, sizes = new_figure(width, 640 if len(names) > 1 else 260)
    totals, numbers = counts.sum(axis=1), np.arange(len(clients))
    descending = np.sort(totals)[::-1]
    wide_range = descending[0] > 20 * max(1, descending[-1])
    bottom = 0.8 * max(1, descending[-1]) if wide_range else 0.0
    sizes.fill_between(numbers, np.maximum(descending, bottom), bottom, step="mid", color=LIGHT["c0"], lw=0)
    if wide_range:
        sizes.set_yscale("log")
        sizes.yaxis.set_major_formatter("{x:,.0f}")  # the scale's own labels are formulas, and none is read as one
    sizes.set_ylim(bottom, 1.05 * descending[0])
    sizes.margins(x=0)
    words = f"largest {descending[0]:,}, median {np.median(totals):,.0f}, smallest {descending[-1]:,}"
    sizes.set(
        title=words, ylabel="training examples", xlabel=f"{len(clients)} clients, from the largest to the smallest"
    )
    if len(names) > 1:
        grid = figure.add_gridspec(2, 1, height_ratios=(1, 2))
        sizes.set_subplotspec(grid[0])
        shares = figure.add_subplot(grid[1])
        order = np.argsort(-counts.sum(axis=0), kind="stable")
        parts = (counts / np.maximum(totals, 1)[:, None])[:, order]
        parts = parts[np.lexsort(tuple(parts.T[::-1]))[::-1]]
        labels = [names[k] for k in order]
        if len(names) > COLOURS:
            parts = np.column_stack([parts[:, : COLOURS - 1], parts[:, COLOURS - 1 :].sum(axis=1)])
            labels[COLOURS - 1 :] = [f"the other {len(names) - COLOURS + 1}"]
        colours = [LIGHT[f"c{k}"] for k in range(COLOURS)]
        shares.stackplot(numbers, parts.T, labels=labels, colors=colours, step="mid", lw=0)
        shares.margins(0)
        shares.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        shares.set(
            ylabel="share of a client's examples", xlabel=f"{len(clients)} clients, by their share of {labels[0]!r}"
        )
        _legend(figure, width, *shares.get_legend_handles_labels())
    return figure


# ---------------------------------------------------------------------------------------------- common


def _cells(axes: Axes, grid: np.ndarray, styles: Sequence[tuple[str, float]]) -> None:
    """Draw a matrix of whole numbers as cells, all of one number as one path.

    Args:
        axes: to draw into.
        grid: rows by columns.
        styles: colour and opacity of each number.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    for number, (colour, alpha) in enumerate(styles):
        edges = np.diff(np.pad((grid == number).astype(int), ((0, 0), (1, 1))), axis=1)
        (row, start), (_, stop) = np.nonzero(edges == 1), np.nonzero(edges == -1)
        if not len(row) or not alpha:
            continue
        left, right, top, bottom = start - 0.5, stop - 0.5, row - 0.44, row + 0.44
        corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)]).transpose(2, 0, 1)
        path = Path.make_compound_path_from_polys(corners)
        axes.add_patch(PathPatch(path, facecolor=LIGHT[colour], alpha=alpha, lw=0))
    if grid.shape[1] <= 60:
        axes.vlines(np.arange(1, grid.shape[1]) - 0.5, -0.5, len(grid) - 0.5, color=LIGHT["page"], lw=1)


def _rows(axes: Axes, names: Sequence[str], tall: float, width: float) -> None:
    every = math.ceil(LINE_HEIGHT / tall)
    shown = [fit(name, int(0.3 * width / LETTER)) for name in names[::every]]
    axes.set_yticks(range(0, len(names), every), shown)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel("client")


def _columns(width: float, labels: Sequence[str]) -> int:
    return max(1, int(width / (LETTER * max(len(label) for label in labels) + 45)))


def _legend(figure: Figure, width: float, handles: Sequence[Any], labels: Sequence[str]) -> None:
    from matplotlib.legend_handler import HandlerTuple

    overlaid = {tuple: HandlerTuple(ndivide=1)}
    columns = min(len(labels), _columns(width, labels))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handler_map=overlaid)
