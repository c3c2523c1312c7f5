"""The report's sections about the clients: privacy, who took part, who holds what; and what the model says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fedlora.progress import format_bytes
from fedlora.report._charts import COLOURS, Series, bar_chart, cell_grid, heat_map, line_chart
from fedlora.report._facts import Facts, number, statuses
from fedlora.report._markup import Html, details, el, join, table
from fedlora.report._sections import figure, legend
from fedlora.report._style import KINDS

MOST_ROWS, MOST_ROUNDS = 80, 200
"""More clients or rounds than these are put together in the picture, and the worst of each group is drawn."""
MOST_BARS = 60
MOST_SAMPLES = 12

_WORST_FIRST = [kind for kind in KINDS if kind not in ("answered", "idle")] + ["answered", "idle"]


def privacy(facts: Facts) -> Html:
    """What is promised, and what it has cost by round."""
    if facts.config.privacy is None:
        return el(
            "p",
            "None was asked for. What a client sends goes to the server as it is, and can tell of the examples "
            "behind it. A table [privacy] in the config makes every client train with differential privacy.",
        )
    claim = facts.result.get("privacy") or {}
    points = [(r["round"], e) for r in facts.rounds if (e := number(r.get("epsilon"))) is not None]
    parts: list[Html | None] = []
    if claim.get("statement"):
        parts.append(el("p", el("strong", claim["statement"]), "."))
    else:
        parts.append(el("p", "The run has no final claim yet: it is written when the run is finished."))
    covers = {
        "example": "It covers one example of one client, not all that a person or an institution holds.",
        "client": "It covers all that one client holds, against whoever sees the global models but not the server.",
    }
    parts.append(el("p", f"{covers[facts.config.privacy.unit]} Smaller is better.", class_="soft"))
    if points:
        end, value = points[-1]
        label = f"Line chart of the largest epsilon over the clients by round, {value:.3g} after round {end}."
        lines = [Series("epsilon", points, "c3")]
        limit = facts.config.privacy.epsilon
        if limit is not None:
            lines.append(Series("limit", [(points[0][0], limit), (points[-1][0], limit)], "c6"))
        parts.append(
            figure(
                lambda w: line_chart(w, lines, label, lambda v: f"{v:.3g}", from_zero=True),
                "Privacy spent, the largest over the clients.",
            )
        )
    rows = [(name, str(value)) for name, value in claim.items() if name != "statement"]
    if rows:
        parts.append(details("The claim in numbers", table(("", "value"), rows, "The privacy claim")))
    return join(parts)


def participation(facts: Facts) -> Html | None:
    """Clients by rounds, and what became of each."""
    rounds, clients = facts.rounds, facts.clients
    if not rounds or not clients:
        return None
    found = [statuses(record) for record in rounds]
    height, width = math.ceil(clients / MOST_ROWS), math.ceil(len(rounds) / MOST_ROUNDS)
    rows, named = [], client_titles(facts, clients)
    for first in range(0, clients, height):
        kinds = []
        for start in range(0, len(rounds), width):
            there = {
                found[n].get(k, "idle")
                for n in range(start, min(start + width, len(rounds)))
                for k in range(first, min(first + height, clients))
            }
            kinds.append(next(kind for kind in _WORST_FIRST if kind in there))
        rows.append((named[first] if height == 1 else f"{first}-{min(first + height, clients) - 1}", kinds))
    titles = [str(rounds[start]["round"]) for start in range(0, len(rounds), width)]
    counts = Counter(found[n].get(k, "idle") for n in range(len(rounds)) for k in range(clients))
    marks = {kind: mark for kind, (_, mark, _) in KINDS.items()}
    summary = ", ".join(f"{words} {counts[kind]}" for kind, (_, _, words) in KINDS.items() if counts[kind])
    label = f"Grid of {clients} clients by {len(rounds)} rounds. Number of cells: {summary}."
    caption = "One row for each client, one column for each round."
    if height > 1 or width > 1:
        caption = f"A cell is {height} clients in {width} rounds and shows the worst that happened in it."
    shown = [(KINDS[kind][0], KINDS[kind][1], f"{KINDS[kind][2]}: {counts[kind]}") for kind in KINDS if counts[kind]]
    by_client = [Counter(at.get(k, "idle") for at in found) for k in range(clients)]
    kinds_seen = [kind for kind in KINDS if counts[kind]]
    body = [(named[k], *(str(row[kind]) for kind in kinds_seen)) for k, row in enumerate(by_client)]
    numbers = table(("client", *(KINDS[kind][2].split(",")[0] for kind in kinds_seen)), body, "Rounds of each client")
    reasons = Counter(str(why) for record in rounds for why in (record.get("refused") or {}).values())
    refusals = table(
        ("why", "how often"), [(why, str(n)) for why, n in reasons.most_common(20)], "Why replies were refused"
    )
    return join(
        [
            legend(shown),
            figure(lambda w: cell_grid(w, rows, titles, marks, label, "round"), caption),
            refusals if reasons else None,
            details("Each client in numbers", numbers),
        ]
    )


def partition(facts: Facts) -> Html | None:
    """Who holds what."""
    sizes = facts.partition.get("sizes")
    if not sizes:
        if facts.config.privacy is None:
            return None
        return el("p", "What each client holds is secret under [privacy] and was not written down.")
    what, counts, names = "examples", [[size] for size in sizes], ["training examples"]
    for kind in ("label", "domain"):
        if facts.partition.get(f"{kind}_counts"):
            what, counts = f"examples of each {kind}", facts.partition[f"{kind}_counts"]
            names = [str(name) for name in facts.partition[f"{kind}_names" if kind == "label" else "domains"]]
            break
    every = math.ceil(len(sizes) / MOST_BARS)
    titles = client_titles(facts, len(sizes))
    rows = [(titles[k], counts[k]) for k in range(0, len(sizes), every)]
    smallest, largest = min(sizes), max(sizes)
    label = f"Chart of the {what} on {len(sizes)} clients; they have {smallest} to {largest} training examples."
    caption = f"Training {what} on each client ({facts.config.partition.name})."
    if every > 1:
        caption += f" Every {every}th client is drawn."
    if len(names) <= COLOURS:
        picture = figure(lambda w: bar_chart(w, rows, label, lambda v: f"{v:.0f}"), caption)
        head = legend((f"c{k}", "", name) for k, name in enumerate(names)) if len(names) > 1 else None
    else:
        picture, head = figure(lambda w: heat_map(w, rows, names, label), caption + " The darker, the more."), None
    facts_line = [f"{len(sizes)} clients, {sum(sizes)} training examples, {smallest} to {largest} on a client."]
    for kind in ("label", "domain"):
        divergence = number(facts.partition.get(f"{kind}_js_divergence"))
        if divergence is not None:
            facts_line.append(
                f"Mean Jensen-Shannon divergence of the {kind}s: {divergence:.3f} bits (0: all clients alike)."
            )
    body = [(titles[k], str(sizes[k]), *(str(c) for c in counts[k] if len(names) > 1)) for k in range(len(sizes))]
    columns = ("client", "examples", *(names if len(names) > 1 else ()))
    numbers = details("Each client in numbers", table(columns, body, "What each client holds"))
    return join([el("p", " ".join(facts_line)), head, picture, numbers])


def samples(facts: Facts) -> Html | None:
    """What the model says to held-out prompts, before and after."""
    if not facts.samples:
        return None
    shown = []
    for place, entry in enumerate(facts.samples[:MOST_SAMPLES], 1):
        pairs = [
            ("prompt", "prompt"),
            ("before", "the base model"),
            ("after", "after the training"),
            ("reference", "the test set goes on"),
        ]
        rows = [
            el("dt", words) + el("dd", el("bdi", str(entry[key]))) for key, words in pairs if entry.get(key) is not None
        ]
        body = el("dl", *(Html(row) for row in rows))
        shown.append(el("article", el("h3", f"Example {place}"), body, class_="sample", aria_label=f"Example {place}"))
    more = len(facts.samples) - MOST_SAMPLES
    note = f" {more} more are in samples.json." if more > 0 else ""
    return join([el("p", f"Greedy continuations of prompts that were not trained on.{note}"), *shown])


def traffic_of_a_client(facts: Facts) -> str:
    """What one client sends in a round, in words, or ""."""
    rounds = [r for r in facts.rounds if r.get("answered") and number(r.get("bytes_up"))]
    if not rounds:
        return ""
    each = sum(r["bytes_up"] for r in rounds) / sum(len(r["answered"]) for r in rounds)
    return f"{format_bytes(each)} sent by a client in a round"


def client_titles(facts: Facts, clients: int) -> list[str]:
    """What each client is called: by its name or its domain, and its number."""
    owners = facts.partition.get("client_names") or _main_domains(facts)
    return [f"{owners[k]} {k}" if owners and k < len(owners) else str(k) for k in range(clients)]


def _main_domains(facts: Facts) -> Sequence[str] | None:
    """Each client's domain, if every client has only one."""
    counts, names = facts.partition.get("domain_counts"), facts.partition.get("domains")
    if not counts or not names or any(sum(c > 0 for c in row) != 1 for row in counts):
        return None
    return [str(names[max(range(len(row)), key=row.__getitem__)]) for row in counts]
