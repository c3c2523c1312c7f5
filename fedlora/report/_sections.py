"""The report's sections about learning: each takes the facts and returns its content, or None where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedlora.progress import beside_accuracy, format_bytes, format_metric, format_seconds
from fedlora.report._charts import COLOURS, Series, column_chart, line_chart
from fedlora.report._facts import Facts, Record, number, quantile
from fedlora.report._markup import Child, Html, details, el, join, table

WIDE, NARROW = 860.0, 350.0
"""Widths in CSS pixels for which a chart is drawn: on a desk and on a phone."""
MOST_LINES = 8
LEAST_SPAN = 0.3
"""Of an axis of values that are no shares, as a part of the largest: 3% look like 3%."""
MOST_COLUMNS = 60


def figure(draw: Callable[[float], Html], caption: Child = None) -> Html:
    """A chart for desks and phones, and what it shows."""
    both = [el("div", draw(width), class_=name) for width, name in ((WIDE, "wide"), (NARROW, "narrow"))]
    return el("figure", *both, el("figcaption", caption) if caption else None)


def learning(facts: Facts) -> Html | None:
    """The main figure by round, for the whole test set and each domain."""
    metric, evaluated = facts.metric, facts.evaluated
    if not evaluated:
        return None
    shown = facts.domains[:MOST_LINES]
    lines = [Series("all", [(r["round"], float(r[metric])) for r in evaluated])]
    for place, name in enumerate(shown):
        points = [(r["round"], v) for r in evaluated if (v := facts.domain_value(r, name)) is not None]
        lines.append(Series(name, points, f"c{place % COLOURS}"))
    lines = [line for line in lines if line.points]
    words, last = metric.replace("_", " "), evaluated[-1]

    span = 0.0 if _is_share(metric) else LEAST_SPAN

    def exact(value: float) -> str:
        return format_metric(metric, value)

    ends = ", ".join(f"{line.name} {format_metric(metric, line.points[-1][1])}" for line in lines)
    first = format_metric(metric, evaluated[0][metric])
    label = f"Line chart of {words} by round, from {first} in round {evaluated[0]['round']}. "
    label += f"After round {last['round']}: {ends}."
    caption = f"{words.capitalize()} on the test set after each round" + (
        "; round 0 is the base model before any training." if evaluated[0]["round"] == 0 else "."
    )
    if len(facts.domains) > MOST_LINES:
        caption += f" Of {len(facts.domains)} domains the first {MOST_LINES} are drawn; the table has all."
    return join(
        [
            figure(lambda w: line_chart(w, lines, label, _axis(metric), exact=exact, least_span=span), caption),
            _outcome(facts),
            _by_round(facts),
        ]
    )


def spread_of_clients(facts: Facts) -> Html | None:
    """How far apart the clients' own figures are in each round."""
    rows = []
    for record in facts.rounds:
        found = [v for row in (record.get("clients") or {}).values() if (v := number(row.get("loss"))) is not None]
        if found:
            rows.append((record["round"], [quantile(found, share) for share in (0, 0.25, 0.5, 0.75, 1)]))
    if not rows:
        if facts.config.privacy is None:
            return None
        return el("p", "The clients' own losses are secret under [privacy]: no client tells them.")
    bands = [[(x, q[0], q[4]) for x, q in rows], [(x, q[1], q[3]) for x, q in rows]]
    lines = [Series("median", [(x, q[2]) for x, q in rows], "c0", bands)]
    last = rows[-1][1]
    label = (
        f"Line chart of the clients' training loss by round. In round {rows[-1][0]} the median is {last[2]:.3g}, "
        f"half of the clients are between {last[1]:.3g} and {last[3]:.3g}, all between {last[0]:.3g} and {last[4]:.3g}."
    )
    caption = (
        "Training loss of the clients that answered: the line is the median, the dark band holds the middle half of "
        "them, the light band all."
    )
    clients = (facts.rounds[-1].get("clients") or {}).items()
    cells = [
        (k, *(_short(row.get(name)) for name in ("num_examples", "steps", "loss", "seconds"))) for k, row in clients
    ]
    numbers = table(
        ("client", "examples", "steps", "training loss", "seconds"),
        cells,
        f"Clients in round {facts.rounds[-1]['round']}",
    )
    return join(
        [
            figure(lambda w: line_chart(w, lines, label, _four), caption),
            details("Each client in the last round", numbers),
        ]
    )


def aggregation_error(facts: Facts) -> Html | None:
    """How far the broadcast is from the mean of the clients' updates."""
    points = [(r["round"], e) for r in facts.rounds if (e := number(r.get("aggregation_error"))) is not None]
    if not points:
        return None
    lines = [Series("", points, "c0")]
    explained = (
        "|D − D*| / |D*|: how far the change that the server broadcasts is from the weighted mean of the clients' own "
        "changes. 0 is exact; 1 is as far off as changing nothing."
    )
    if max(e for _, e in points) < 1e-6:
        return join(
            [
                el("p", f"Exact in every round (largest: {max(e for _, e in points):.1g})."),
                el("p", explained, class_="soft"),
            ]
        )
    (start, before), (end, after) = points[0], points[-1]
    label = f"Line chart of the aggregation error by round, {before:.3g} in round {start}, {after:.3g} in round {end}."
    return figure(lambda w: line_chart(w, lines, label, _four, from_zero=True), explained)


def traffic(facts: Facts) -> Html | None:
    """Bytes and time of the rounds."""
    rounds = [r for r in facts.rounds if "bytes_up" in r]
    if not rounds:
        return None
    binned = _binned(rounds, MOST_COLUMNS)
    columns = [(str(group[0]["round"]), [_sum(group, "bytes_up"), _sum(group, "bytes_down")]) for group in binned]
    up, down = facts.total("bytes_up"), facts.total("bytes_down")
    each = "" if len(binned) == len(rounds) else f" One column is {len(binned[0])} rounds."
    label = f"Column chart of bytes by round; all clients sent {format_bytes(up)} and received {format_bytes(down)}."
    parts = [
        figure(
            lambda w: column_chart(w, columns, label, format_bytes),
            f"Bytes of the tensors that all clients sent and received.{each}",
        ),
        legend(
            [
                ("c0", "", f"sent by clients: {format_bytes(up)}"),
                ("c1", "", f"received by clients: {format_bytes(down)}"),
            ]
        ),
    ]
    spent = [f"The rounds took {format_seconds(facts.total('seconds'))}"]
    if facts.config.privacy is not None:
        spent = ["How long the rounds took tells of the clients' data, and is not written down under [privacy]"]
    if facts.total("seconds_evaluate"):
        spent.append(f", of which {format_seconds(facts.total('seconds_evaluate'))} to evaluate")
    if facts.total("simulated_seconds"):
        spent.append(f"; on the simulated devices and links {format_seconds(facts.total('simulated_seconds'))}")
    return join([*parts, el("p", "".join(spent) + ".")])


def legend(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Colour, mark and words of each."""
    return el(
        "ul",
        *(
            el("li", el("i", mark, style=f"background:var(--{colour})", aria_hidden="true"), words)
            for colour, mark, words in entries
        ),
        class_="legend",
    )


def _outcome(facts: Facts) -> Html | None:
    """The run beside its base model and baselines, where there are any."""
    metric, evaluated = facts.metric, facts.evaluated
    rows: list[tuple[str, Record, bool]] = []
    if evaluated[0]["round"] == 0:
        rows.append(("base model", evaluated[0], False))
    rows.append((f"federated, round {evaluated[-1]['round']}", evaluated[-1], True))
    rows += [(words, of, False) for words, of in beside_accuracy(metric, evaluated[-1])]
    alone = facts.baselines.get("local_only") or {}
    rows += [
        (f"one client alone, {which}", alone[which], False) for which in ("best", "mean", "worst") if which in alone
    ]
    if facts.baselines.get("centralised"):
        rows.append(("all data in one place", facts.baselines["centralised"], False))
    body = []
    for name, record, main in rows:
        cells = [record.get(metric), *(facts.domain_value(record, domain) for domain in facts.domains)]
        shown = [el("td", format_metric(metric, number(cell))) for cell in cells]
        body.append(el("tr", el("th", name, scope="row"), *shown, class_="main" if main else None))
    words = f"{metric.replace('_', ' ').capitalize()} on the test set"
    head = el("tr", *(el("th", name, scope="col") for name in ("", "all", *facts.domains)))
    inner = el("table", el("caption", words), el("thead", head), el("tbody", *body))
    return el("div", inner, class_="scroll", tabindex="0", role="region", aria_label=words)


def _by_round(facts: Facts) -> Html:
    rules = list(dict.fromkeys(name for r in facts.rounds for name in r.get("rule") or {}))
    private = any("epsilon" in r for r in facts.rounds)
    head = [
        "round",
        facts.metric.replace("_", " "),
        *facts.domains,
        "train loss",
        "aggregation error",
        "sent",
        "received",
    ]
    head += [*(["epsilon"] if private else []), "asked", "answered", "time", *rules]
    rows = []
    for r in facts.records:
        cells: list[str] = [str(r["round"]), format_metric(facts.metric, number(r.get(facts.metric)))]
        cells += [format_metric(facts.metric, facts.domain_value(r, name)) for name in facts.domains]
        cells += [_short(r.get(name)) for name in ("train_loss", "aggregation_error")]
        cells += [
            format_bytes(r[name]) if number(r.get(name)) is not None else "-" for name in ("bytes_up", "bytes_down")
        ]
        cells += [_short(r.get("epsilon"))] if private else []
        cells += [str(len(r[name])) if name in r else "-" for name in ("asked", "answered")]
        seconds = number(r.get("seconds"))
        cells += ["-" if seconds is None else format_seconds(seconds)]
        rows.append([*cells, *(_short((r.get("rule") or {}).get(name)) for name in rules)])
    return details("All rounds in numbers", table(head, rows, "Every round"))


def _is_share(metric: str) -> bool:
    return format_metric(metric, 0.5).endswith("%")


def _axis(metric: str) -> Callable[[float], str]:
    if _is_share(metric):
        return lambda value: f"{100 * value:.1f}".removesuffix(".0") + "%"
    return _four


def _four(value: float) -> str:
    return f"{value:.4g}"


def _short(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.4g}"


def _sum(group: Sequence[Record], key: str) -> float:
    return sum(number(record.get(key)) or 0.0 for record in group)


def _binned(rows: Sequence[Record], most: int) -> list[Sequence[Record]]:
    size = math.ceil(len(rows) / most)
    return [rows[k : k + size] for k in range(0, len(rows), size)]
