"""Charts as SVG, drawn here: no fonts, scripts or pictures from elsewhere, and the page's colours, light or dark.

A chart is drawn for a width in CSS pixels; the page holds one for desks and one for phones and shows the one that fits.
Colours are classes (`c0` to `c6`, see `_style`), values always stand beside them as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedlora.report._markup import Html, el, join

COLOURS = 7
LINE_HEIGHT, LETTER = 15.0, 6.9
"""Of the charts' text, in pixels; letters by their mean width."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        name: at its end.
        points: (x, y), x ascending; a y that is not finite interrupts the line.
        colour: its class; "ink" for the thick one.
        bands: lower and upper edges behind it, (x, low, high).
    """

    name: str
    points: Sequence[Point]
    colour: str = "ink"
    bands: Sequence[Sequence[tuple[float, float, float]]] = ()


def line_chart(
    width: float,
    series: Sequence[Series],
    label: str,
    show: Callable[[float], str],
    *,
    exact: Callable[[float], str] | None = None,
    from_zero: bool = False,
    least_span: float = 0.0,
) -> Html:
    """Lines with their names and last values at their ends.

    Args:
        width: in CSS pixels.
        series: the first one is drawn last, on top; at least one with a finite point.
        label: what a screen reader says.
        show: a value on the axis as text.
        exact: a value at the end of a line as text; None: as on the axis.
        from_zero: whether the axis must begin at zero.
        least_span: of the axis, as a part of the largest value.
    """
    points = [[p for p in line.points if math.isfinite(p[1])] for line in series]
    edges = [edge for line in series for band in line.bands for _, *edge in band]
    values = [y for found in points for _, y in found] + [y for edge in edges for y in edge]
    x_low, x_high = min(x for p in points for x, _ in p), max(x for p in points for x, _ in p)
    least, most = 0.0 if from_zero else min(values), max(values)
    if (lacking := least_span * max(abs(least), abs(most)) - (most - least)) > 0:
        below = min(lacking / 2, max(least, 0.0))
        least, most = least - below, most + lacking - below
    ticks = nice_ticks(least, most, 5)
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    end = exact or show
    ends = [
        (f"{line.name} {end(p[-1][1])}".strip(), p[-1], line.colour)
        for line, p in zip(series, points, strict=True)
        if p
    ]
    names = [shorten(name, int(0.4 * width / LETTER)) for name, *_ in ends]
    left = 10 + LETTER * max(len(show(tick)) for tick in ticks)
    right = 26 + LETTER * max(len(name) for name in names)
    height, top, bottom = max(0.42 * width, 190.0, LINE_HEIGHT * len(ends) + 50), 10.0, 38.0

    def at(x: float, y: float) -> Point:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return left + across * (width - left - right), height - bottom - up * (height - bottom - top)

    parts = [_y_axis(tick, show(tick), left, width - right, at(x_low, tick)[1]) for tick in ticks]
    parts += [_x_tick(tick, *at(tick, low)) for tick in _whole_ticks(x_low, x_high, (width - left - right) / 44)]
    parts.append(_label((left + width - right) / 2, height - 4, "round", "middle", "soft"))
    for line in reversed(series):
        parts += [
            _band([at(x, a) for x, a, _ in band], [at(x, b) for x, _, b in band], line.colour) for band in line.bands
        ]
    for line in reversed(series):
        parts.append(_line([at(x, y) if math.isfinite(y) else None for x, y in line.points], line.colour))
    places = spread([at(*point)[1] for _, point, _ in ends], LINE_HEIGHT)
    overshoot = max(0.0, max(places) - (height - bottom + 6))
    for name, (_, point, colour), place in zip(names, ends, places, strict=True):
        x, y = at(*point)
        shifted = place - overshoot
        parts.append(
            el("path", d=f"M{x + 5:.1f} {y:.1f}L{width - right + 14:.1f} {shifted:.1f}h6", class_=f"lead s-{colour}")
        )
        parts.append(_label(width - right + 23, shifted + 4, name, "start", "strong" if colour == "ink" else ""))
    return _svg(width, height, label, parts)


def column_chart(
    width: float, columns: Sequence[tuple[str, Sequence[float]]], label: str, show: Callable[[float], str]
) -> Html:
    """Stacked columns, one for each (name, values); values of one place share a colour."""
    totals = [sum(values) for _, values in columns]
    ticks = nice_ticks(0.0, max(totals), 4)
    high = max(ticks[-1], *totals) or 1.0
    left, height, top, bottom = 10 + LETTER * max(len(show(tick)) for tick in ticks), 0.3 * width + 60, 10.0, 38.0
    step = (width - left - 6) / len(columns)
    parts = [
        _y_axis(tick, show(tick), left, width - 6, height - bottom - tick / high * (height - bottom - top))
        for tick in ticks
    ]
    every = max(1, math.ceil(34 / step))
    for number, (name, values) in enumerate(columns):
        below = height - bottom
        x = left + number * step
        for place, value in enumerate(values):
            tall = value / high * (height - bottom - top)
            below -= tall
            bar = {"x": x + 0.12 * step, "y": below, "width": 0.76 * step, "height": tall}
            parts.append(el("rect", class_=f"f-c{place}", **bar))
        if number % every == 0:
            parts.append(_label(x + step / 2, height - bottom + 16, name, "middle", ""))
    parts.append(_label((left + width) / 2, height - 4, "round", "middle", "soft"))
    return _svg(width, height, label, parts)


def bar_chart(
    width: float, bars: Sequence[tuple[str, Sequence[float]]], label: str, show: Callable[[float], str]
) -> Html:
    """Stacked bars from left to right, with their names before and their sums behind them."""
    longest = max(sum(values) for _, values in bars) or 1.0
    names = [shorten(name, int(0.3 * width / LETTER)) for name, _ in bars]
    left = 10 + LETTER * max(len(name) for name in names)
    right = 10 + LETTER * max(len(show(sum(values))) for _, values in bars)
    tall = 18.0
    parts: list[Html] = []
    for row, (name, (_, values)) in enumerate(zip(names, bars, strict=True)):
        y, x = row * tall, left
        parts.append(_label(left - 6, y + 13, name, "end", ""))
        for place, value in enumerate(values):
            wide = value / longest * (width - left - right)
            if value:
                parts.append(el("rect", x=x, y=y + 2, width=wide, height=tall - 4, class_=f"f-c{place % COLOURS}"))
            x += wide
        parts.append(_label(x + 5, y + 13, show(sum(values)), "start", ""))
    return _svg(width, tall * len(bars) + 2, label, parts)


def heat_map(width: float, rows: Sequence[tuple[str, Sequence[float]]], titles: Sequence[str], label: str) -> Html:
    """Shades for counts, rows by columns; for more labels than colours can tell apart."""
    most = max((value for _, values in rows for value in values), default=0.0) or 1.0
    names = [shorten(name, int(0.25 * width / LETTER)) for name, _ in rows]
    heads = [shorten(title, 14) for title in titles]
    left, top = 10 + LETTER * max(len(name) for name in names), 14 + 5.2 * max(len(head) for head in heads)
    step, tall = (width - left - 30) / len(titles), 16.0
    parts: list[Html] = []
    every = max(1, math.ceil(14 / step))
    for column, head in enumerate(heads):
        if column % every == 0:
            x = left + (column + 0.5) * step
            turned = f"rotate(-50 {x:.1f} {top - 6:.1f})"
            parts.append(el("text", head, x=x, y=top - 6, transform=turned))
    for row, (name, (_, values)) in enumerate(zip(names, rows, strict=True)):
        y = top + row * tall
        parts.append(_label(left - 6, y + 12, name, "end", ""))
        for column, value in enumerate(values):
            place = {"x": left + column * step, "y": y + 1, "width": max(step - 1, 0.5), "height": tall - 2}
            parts.append(el("rect", class_="f-c0", fill_opacity=0.06 + 0.94 * value / most, **place))
    return _svg(width, top + tall * len(rows) + 2, label, parts)


def cell_grid(
    width: float,
    rows: Sequence[tuple[str, Sequence[str]]],
    titles: Sequence[str],
    marks: dict[str, str],
    label: str,
    x_title: str,
) -> Html:
    """Cells of a few kinds, rows by columns.

    Args:
        width: in CSS pixels.
        rows: name and the kind of each cell; kinds are classes (`k-<kind>`).
        titles: of the columns.
        marks: kind -> a character, so that kinds can be told apart without colours where there is room.
        label: what a screen reader says.
        x_title: under the columns.
    """
    left = 10 + LETTER * max(len(name) for name, _ in rows)
    step = min(24.0, (width - left - 2) / len(titles))
    tall = 16.0 if len(rows) <= 40 else 9.0
    gap = 1.0 if step > 4 else 0.0
    paths: dict[str, list[str]] = {}
    parts: list[Html] = []
    named = max(1, math.ceil(LINE_HEIGHT / tall))
    for row, (name, kinds) in enumerate(rows):
        if row % named == 0:
            parts.append(_label(left - 6, row * tall + tall / 2 + 4, name, "end", ""))
        for column, kind in enumerate(kinds):
            x, y = left + column * step, row * tall
            paths.setdefault(kind, []).append(f"M{x:.1f} {y:.1f}h{step - gap:.1f}v{tall - 1:.1f}h{gap - step:.1f}z")
            if marks.get(kind) and step >= 11 and tall >= 14:
                parts.append(_label(x + (step - gap) / 2, y + tall / 2 + 4, marks[kind], "middle", f"mark k-{kind}"))
    height = tall * len(rows)
    every = max(1, math.ceil((12 + LETTER * max(len(title) for title in titles)) / step))
    parts += [
        _label(left + (column + 0.5) * step, height + 14, titles[column], "middle", "")
        for column in range(0, len(titles), every)
    ]
    parts.append(_label(left + len(titles) * step / 2, height + 32, x_title, "middle", "soft"))
    cells = [el("path", d="".join(found), class_=f"cell k-{kind}") for kind, found in paths.items()]
    return _svg(width, height + 38, label, [*cells, *parts])


# ---------------------------------------------------------------------------------------------- common


def nice_ticks(low: float, high: float, number: int) -> list[float]:
    """About `number` round values (1, 2 or 5 times a power of ten) that span [low, high] and one step around it."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-200):  # as good as equal
        high = low + (abs(low) if abs(low) > 1e-200 else 1.0)
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


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


def shorten(name: str, most: int) -> str:
    """At most `most` characters; the end stays, where the value is."""
    if len(name) <= most:
        return name
    keep = max(2, most - 1)
    return name[: keep // 2] + "…" + name[-(keep - keep // 2) :]


def _whole_ticks(low: float, high: float, room: float) -> list[float]:
    step = next(s for s in (f * 10**p for p in range(9) for f in (1, 2, 5)) if (high - low) / s <= max(1.0, room))
    return [float(k * step) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(width: float, height: float, label: str, parts: Sequence[Html]) -> Html:
    box = f"0 0 {width:.0f} {height:.0f}"
    return el(
        "svg", join(parts), viewBox=box, role="img", aria_label=label, width=f"{width:.0f}", height=f"{height:.0f}"
    )


def _label(x: float, y: float, words: str, anchor: str, kind: str) -> Html:
    return el("text", words, x=x, y=y, text_anchor=anchor, class_=kind or None)


def _y_axis(tick: float, words: str, left: float, right: float, y: float) -> Html:
    line = el("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}", class_="grid zero" if tick == 0 else "grid")
    return join([line, _label(left - 6, y + 4, words, "end", "")])


def _x_tick(tick: float, x: float, y: float) -> Html:
    return join(
        [el("path", d=f"M{x:.1f} {y:.1f}v4", class_="grid zero"), _label(x, y + 18, f"{tick:.0f}", "middle", "")]
    )


def _line(points: Sequence[Point | None], colour: str) -> Html:
    steps, down = [], False
    for point in points:
        if point is not None:
            steps.append(f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}")
        down = point is not None
    there = [point for point in points if point is not None]
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in there) if len(there) <= 60 else ""
    return join(
        [
            el("path", d="".join(steps), class_=f"line s-{colour}"),
            el("path", d=dots, class_=f"dots s-{colour}") if dots else None,
        ]
    )


def _band(lower: Sequence[Point], upper: Sequence[Point], colour: str) -> Html:
    way = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*lower, *reversed(upper)])
    return el("path", d=f"M{way}z", class_=f"band f-{colour}")
