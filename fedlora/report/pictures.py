"""Pictures of a run. The same figures give the same bytes.

Colours are Okabe and Ito's eight, which people with any kind of colour blindness can tell apart; lines also carry
their names and values at their ends, so that nothing has to be looked up in a legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from fedlora.errors import FedloraError
from fedlora.progress import format_metric, main_metric
from fedlora.report._charts import spread
from fedlora.sanitize import clean_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DARK = ("#5B5B5B", "#7A4FA3", "#8A6000", "#00566E", "#9C2A5B")
"""For small coloured letters on white, none like the first colours above, which bars may have at the same time."""
INK, FAINT = "#222222", "#D9D9D9"
DPI = 150
LONGEST_NAME = 60
"""Characters of a class or domain in a picture."""
LEAST_SPAN = 0.3
"""Of an axis of values that are no shares, as a part of the largest value."""
MOST_ROWS = 100
"""Above so many clients a picture of labels has no row for each."""
MOST_LINES, MOST_BARS = 8, 7
"""More domains than lines can be told apart are left out; more labels than colours become a heat map."""


def plot_accuracy(records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """The main figure after each round, over the whole test set (thick) and for each domain, from the base model on.

    Args:
        records: lines of metrics.jsonl; rounds without an evaluation are passed over.
        path: of the PNG.
        title: above the picture; "" for none.

    Raises:
        FedloraError: no round was evaluated.
    """
    from matplotlib.ticker import MaxNLocator

    metric = main_metric(records[0]) if records else "accuracy"
    evaluated = [record for record in records if record.get(metric) is not None]
    if not evaluated:
        raise FedloraError(f"there is no {metric} to draw: run at least one evaluated round")
    percent = format_metric(metric, 0.5).endswith("%")
    unit = 100.0 if percent else 1.0
    rounds = [record["round"] for record in evaluated]
    figure, axes = new_figure(7.6, 4.2)
    ends: list[tuple[float, str, str, bool]] = []
    for number, name in enumerate(list(evaluated[-1].get("domains", {}))[:MOST_LINES]):
        found = [(r["round"], r["domains"][name][metric]) for r in evaluated if name in r.get("domains", {})]
        values = [unit * value for _, value in found]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([r for r, _ in found], values, color=colour, lw=1.4, marker="o", ms=3, zorder=2)
        ends.append(
            (values[-1], f"{clean_text(name, LONGEST_NAME)} {format_metric(metric, found[-1][1])}", colour, False)
        )
    whole = [unit * record[metric] for record in evaluated]
    axes.plot(rounds, whole, color=INK, lw=3.2, marker="o", ms=5, zorder=3, solid_capstyle="round")
    ends.append((whole[-1], f"all {format_metric(metric, evaluated[-1][metric])}", INK, True))
    room_for_values(axes, percent)
    label_ends(axes, rounds[-1], ends)
    if rounds[0] == 0:
        below = len(whole) < 2 or whole[1] > whole[0]
        axes.annotate(
            f"base model {format_metric(metric, evaluated[0][metric])}",
            (0, whole[0]),
            xytext=(8, -16 if below else 12),
            textcoords="offset points",
            color=INK,
            fontsize=9.5,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            zorder=4,
        )
    axes.set_xlabel("round of federated training (round 0: no training yet)")
    axes.set_ylabel(f"{metric.replace('_', ' ')} on the test set{', in %' if percent else ''}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=FAINT, lw=0.7)
    axes.spines["bottom"].set_bounds(rounds[0], rounds[-1])
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    return save_figure(figure, path)


def plot_labels(
    counts: Int[np.ndarray, "clients labels"],
    label_names: Sequence[str],
    path: str | Path,
    *,
    domains: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """How many examples of each label every client has.

    Args:
        counts: examples by client and label.
        label_names: one for each column.
        path: of the PNG.
        domains: of each client, where clients have one: named and coloured at its row.
        title: above the picture; "" for none.

    Raises:
        FedloraError: there are no clients, or the names do not fit the counts.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or not counts.size or counts.shape[1] != len(label_names):
        raise FedloraError(f"label counts {counts.shape} do not fit {len(label_names)} label names")
    if domains is not None and len(domains) != len(counts):
        raise FedloraError(f"{len(domains)} domains do not fit {len(counts)} clients")
    clients = len(counts)
    label_names = [clean_text(name, LONGEST_NAME) for name in label_names]
    domains = None if domains is None else [clean_text(name, LONGEST_NAME) for name in domains]
    if clients > MOST_ROWS:
        return _many_clients(counts, label_names, path, title)
    figure, axes = new_figure(7.6, min(9.0, 1.5 + max(0.26 * clients, 1.0)))
    (_bars if len(label_names) <= MOST_BARS else _heat)(figure, axes, counts, label_names)
    step = max(1, int(np.ceil(clients / 32)))
    rows = list(range(0, clients, step))
    names = [f"{domains[k]}  {k}" if domains is not None and step == 1 else str(k) for k in rows]
    axes.set_yticks(rows, names, fontsize=9 if clients <= 24 else 7)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(clients - 0.4, -0.6)
    axes.set_ylabel("client")
    if domains is not None:
        _paint_domains(axes, domains, rows)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return save_figure(figure, path)


def _many_clients(counts: np.ndarray, label_names: Sequence[str], path: str | Path, title: str) -> Path:
    """Too many clients for a row each: their sizes from the largest on, and below how large a part each label has."""
    figure, sizes = new_figure(7.6, 6.4)
    gridspec = figure.add_gridspec(2, 1, height_ratios=(1, 2))
    sizes.set_subplotspec(gridspec[0])
    shares = figure.add_subplot(gridspec[1])
    totals = counts.sum(axis=1)
    descending = np.sort(totals)[::-1]
    numbers = np.arange(len(counts))
    sizes.fill_between(numbers, descending, step="mid", color=COLOURS[0], lw=0)
    sizes.set_xlim(-0.5, len(counts) - 0.5)
    if descending[0] > 20 * max(1, descending[-1]):
        sizes.set_yscale("log")
        sizes.yaxis.set_major_formatter(
            "{x:,.0f}"
        )  # the scale's own labels are formulas, and no text here is read as one
    median = f"{np.median(totals):,.0f}"
    words = f"{descending[0]:,} examples on the largest, {median} in the middle, {descending[-1]:,} on the smallest"
    sizes.set_title(words, loc="right", fontsize=9, color="#444444")
    sizes.set_ylabel("training examples")
    sizes.set_xlabel(f"{len(counts)} clients, from the largest to the smallest")
    # Labels by how common they are; clients by the part of the commonest, so that their difference shows as a slope.
    order = np.argsort(-counts.sum(axis=0), kind="stable")
    parts = (counts / np.maximum(totals, 1)[:, None])[:, order]
    parts = parts[np.lexsort(tuple(parts.T[::-1]))[::-1]]
    named = min(len(order), MOST_BARS - 1 if len(order) > MOST_BARS else MOST_BARS)
    heights = [100 * parts[:, k] for k in range(named)]
    names = [label_names[k] for k in order[:named]]
    if named < len(order):
        heights.append(100 * parts[:, named:].sum(axis=1))
        names.append(f"the other {len(order) - named}")
    below = np.zeros(len(counts))
    for k, (height, name) in enumerate(zip(heights, names, strict=True)):
        shares.fill_between(numbers, below, below + height, step="mid", color=COLOURS[k], lw=0, label=name)
        below = below + height
    shares.set_xlim(-0.5, len(counts) - 0.5)
    shares.set_ylim(0, 100)
    shares.set_ylabel("part of the client's examples, in %")
    shares.set_xlabel(f"{len(counts)} clients, by the part that {names[0]!r} has")
    for axis in ("xaxis", "yaxis"):
        getattr(shares, axis).label.set_color("#444444")
    shares.tick_params(colors="#444444", labelsize=9.5)
    shares.spines[["top", "right", "left"]].set_visible(False)
    columns = min(len(names), 4)
    figure.legend(
        *shares.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        handlelength=1.0,
        handleheight=1.0,
    )
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return save_figure(figure, path)


def _bars(figure: Figure, axes: Axes, counts: np.ndarray, label_names: Sequence[str]) -> None:
    left = np.zeros(len(counts))
    for label, name in enumerate(label_names):
        axes.barh(range(len(counts)), counts[:, label], left=left, height=0.8, color=COLOURS[label], label=name)
        left += counts[:, label]
    if len(counts) <= 24:
        for row, total in enumerate(left):
            axes.annotate(
                f"{total:.0f}", (total, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
    axes.set_xlabel("training examples")
    axes.set_xlim(0, max(1.0, left.max() * 1.08))
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper right",
        ncols=len(label_names),
        frameon=False,
        fontsize=9.5,
        handlelength=1.0,
        handleheight=1.0,
    )


def _heat(figure: Figure, axes: Axes, counts: np.ndarray, label_names: Sequence[str]) -> None:
    image = axes.imshow(counts, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("training examples")
    bar.outline.set_visible(False)
    step = max(1, int(np.ceil(len(label_names) / 24)))
    columns = range(0, len(label_names), step)
    slanted = max(len(name) for name in label_names) > 3
    axes.set_xticks(columns, [label_names[k] for k in columns], rotation=60 if slanted else 0, fontsize=8)
    axes.tick_params(axis="x", length=0)
    for tick in axes.get_xticklabels():
        tick.set_horizontalalignment("right" if slanted else "center")
    axes.set_xlabel("label")


def _paint_domains(axes: Axes, domains: Sequence[str], rows: Sequence[int]) -> None:
    colours = {name: DARK[k % len(DARK)] for k, name in enumerate(dict.fromkeys(domains))}
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(colours[domains[row]])
        tick.set_fontweight("bold")
    for row in range(1, len(domains)):
        if domains[row] != domains[row - 1]:
            axes.axhline(row - 0.5, color=FAINT, lw=0.8, zorder=0)


# ---------------------------------------------------------------------------------------------- common


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of its own, without pyplot: no global state, no window system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#888888")
    axes.tick_params(colors="#444444", labelsize=9.5, left=False)
    axes.xaxis.label.set_color("#444444")
    axes.yaxis.label.set_color("#444444")
    return figure, axes


def room_for_values(axes: Axes, percent: bool) -> None:
    """Some room around the lines; where values are no shares, at least 30% of the largest, so that 3% look like 3%."""
    low, high = axes.get_ylim()
    lacking = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    if not percent and lacking > 0:
        below = min(lacking / 2, max(low, 0.0))
        low, high = low - below, high + lacking - below
    axes.set_ylim(low - 0.06 * (high - low), high + 0.04 * (high - low))


def label_ends(axes: Axes, last: float, ends: list[tuple[float, str, str, bool]]) -> None:
    """Names at the right ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.062
    places = spread([value for value, *_ in ends], gap)
    for place, (value, text, colour, bold) in zip(places, ends, strict=True):
        axes.annotate(
            text,
            (last, value),
            xytext=(1.025, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=11 if bold else 9.5,
            fontweight="bold" if bold else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG without a trace of the machine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a class may be called "$5 to $10"
    # matplotlib writes its version into the file otherwise, and nothing else that changes.
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
