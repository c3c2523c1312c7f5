"""The sections about the clients: each takes the facts and returns its blocks, none where it has nothing to say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlora.fairness import fairness
from fedlora.progress import format_bytes, format_metric, format_seconds, lower_is_better, trouble
from fedlora.report._blocks import Block, Table, short
from fedlora.report._client_charts import KINDS, MOST_ROWS, holdings, participation_grid, traffic_columns
from fedlora.report._facts import Facts, Record, better, number, statuses
from fedlora.report.figures import Chart
from fedlora.report.line_charts import Line, line_chart

MOST_COLUMNS = 60
MOST_ROUNDS = 120
"""More rounds than these are put together in the grid, and the worst of each group is drawn."""


def traffic(facts: Facts) -> list[Block]:
    """Bytes and time of the rounds."""
    rounds = [record for record in facts.rounds if "bytes_up" in record]
    if not rounds:
        return []
    size = math.ceil(len(rounds) / MOST_COLUMNS)
    groups = [rounds[k : k + size] for k in range(0, len(rounds), size)]
    up, down = ([_sum(group, key) for group in groups] for key in ("bytes_up", "bytes_down"))
    draw = traffic_columns([group[0]["round"] for group in groups], size, up, down)
    sent, received = format_bytes(sum(up)), format_bytes(sum(down))
    label = f"Column chart of bytes by round; all clients together sent {sent} and received {received}."
    caption = "Bytes of the tensors that all clients sent and received."
    if size > 1:
        caption += f" One column is {size} rounds."
    if facts.config.privacy is None:
        spent = f"The rounds took {format_seconds(facts.total('seconds'))}."
    else:
        spent = "The duration of the rounds says something about the clients' data and is secret under privacy."
    if facts.total("seconds_evaluate"):
        spent += f" Evaluation took {format_seconds(facts.total('seconds_evaluate'))} of that."
    if facts.total("simulated_seconds"):
        spent += f" On the simulated devices and links they took {format_seconds(facts.total('simulated_seconds'))}."
    return [Chart(draw, label, caption), spent]


def evaluation(facts: Facts) -> list[Block]:
    """What each client measured on examples that it keeps apart."""
    if not facts.evaluated or not (federated := facts.last.get("federated")):
        return []
    metric, clients, names = facts.metric, federated["clients"], facts.partition.get("client_names") or ()
    beside = _other_models(facts, federated)
    rows = [
        (
            names[int(k)] if int(k) < len(names) else f"client {k}",
            f"{row['examples']:.0f}",
            facts.show(row),
            *(facts.show(model.get(k) or {}) for model in beside.values()),
            short(row["loss"]),
        )
        for k, row in sorted(clients.items(), key=lambda one: trouble(metric, one[1].get(metric)))
    ]
    examples = sum(row["examples"] for row in clients.values())
    said = (
        f"{len(clients)} clients measured the model of round {facts.last['round']} on {examples:.0f} examples of their "
        f"own that nobody trains on, and sent sums: {facts.show(federated['figures'])} over all examples, "
        f"{facts.show(federated.get('macro') or {})} as the mean over clients, "
        f"{facts.show(federated.get('worst_tenth') or {})} over the worst tenth of them."
    )
    out: list[Block] = [said]
    if federated["left_out"]:
        out.append(" ".join(f"Client {k} is left out: {why}." for k, why in federated["left_out"].items()))
    out += [text for name, model in beside.items() if (text := _gains(facts, clients, model, name))]
    head = ("client", "examples", metric.replace("_", " "), *beside, "loss")
    return [*out, Table("Each client, the worst first", head, rows, "Each client" if len(rows) > 20 else "")]


def _other_models(facts: Facts, federated: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What each client's own model is read against, on the same examples: name -> client -> figures."""
    if "shared" not in federated:
        return {}
    alone = (facts.baselines.get("local_only") or {}).get("clients") or ()
    own = {str(row["client"]): row["own"] for row in alone if "own" in row}
    return {"shared model": federated["shared"]["clients"]} | ({"model trained alone": own} if own else {})


def _gains(facts: Facts, clients: Mapping[str, Any], model: Mapping[str, Any], name: str) -> str:
    """Who is better off with a model of its own, and the worst tenth with the other one."""
    both = [(row[facts.metric], model[k][facts.metric]) for k, row in clients.items() if k in model]
    if not both:
        return ""
    gain = sum(better(facts.metric, mine, other) for mine, other in both)
    lose = sum(better(facts.metric, other, mine) for mine, other in both)
    spread = fairness([other for _, other in both], higher_is_better=not lower_is_better(facts.metric))
    means = format_metric(facts.metric, spread.mean), format_metric(facts.metric, spread.worst_decile)
    return (
        f"Against the {name} ({means[0]} as the mean over clients, {means[1]} over the worst tenth) {gain} of "
        f"{len(both)} clients gain by a model of their own and {lose} lose."
    )


def privacy(facts: Facts) -> list[Block]:
    """What is guaranteed, and what has been spent of it by round."""
    table = facts.config.privacy
    if table is None:
        return [
            "This run has no differential privacy. What a client sends reaches the server as it is, and may reveal "
            "the examples behind it. A table [privacy] in the config makes every client train with differential "
            "privacy."
        ]
    claim = facts.result.get("privacy") or {}
    covers = {
        "example": "It covers one example of one client, not all that a person or an institution holds.",
        "client": "It covers all that one client holds, against whoever sees the global models but not the server.",
    }
    blocks: list[Block] = [
        f"{claim['statement']}."
        if claim.get("statement")
        else "The run has no final claim yet: it is written when the run is finished.",
        f"{covers[table.unit]} A smaller epsilon is a stronger guarantee.",
    ]
    points = facts.points("epsilon")
    if points:
        lines = [Line("epsilon", points, "c3")]
        if table.epsilon is not None:
            lines.append(Line("limit", [(x, table.epsilon) for x, _ in points], "c6", dash="--"))
        caption = "Privacy spent: the largest epsilon over the clients."
        blocks.append(line_chart(lines, "epsilon", caption, from_zero=True))
    rows = [(name, value) for name, value in claim.items() if name != "statement"]
    return [*blocks, *([Table("The privacy claim", (), rows, "The claim in numbers")] if rows else [])]


def participation(facts: Facts) -> list[Block]:
    """Clients by rounds, and what became of each."""
    rounds, clients = facts.rounds, facts.clients
    if not rounds or not clients:
        return []
    order = list(KINDS)
    grid = np.zeros((clients, len(rounds)), dtype=int)
    for column, record in enumerate(rounds):
        for client, kind in statuses(record).items():
            grid[client, column] = order.index(kind)
    counts = np.stack([(grid == place).sum(axis=1) for place in range(len(KINDS))], axis=1)
    seen = np.flatnonzero(counts.sum(axis=0))
    words = [KINDS[order[place]][2] for place in seen]
    summary = "; ".join(f"{kind}: {count}" for kind, count in zip(words, counts.sum(axis=0)[seen], strict=True))
    names, caption = client_names(facts), "One row for each client, one column for each round"
    rows = [(name, *row[seen]) for name, row in zip(names, counts, strict=True)]
    high, wide = math.ceil(clients / MOST_ROWS), math.ceil(len(rounds) / MOST_ROUNDS)
    if high > 1 or wide > 1:
        caption = f"A cell is {high} clients in {wide} rounds and shows the worst that happened in it"
        names = [f"{k} to {min(k + high, clients) - 1}" if high > 1 else names[k] for k in range(0, clients, high)]
        grid = np.maximum.reduceat(grid, range(0, clients, high), axis=0)
        grid = np.maximum.reduceat(grid, range(0, len(rounds), wide), axis=1)
    label = f"Grid of {clients} clients by {len(rounds)} rounds. Number of cells: {summary}."
    draw = participation_grid(grid, names, [record["round"] for record in rounds[::wide]])
    blocks: list[Block] = [Chart(draw, label, f"{caption}. In all: {summary}.")]
    reasons = Counter(str(why) for record in rounds for why in (record.get("refused") or {}).values())
    if reasons:
        blocks.append(Table("Why replies were refused", ("reason", "replies"), reasons.most_common(20), words=True))
    away = Counter(pair for record in rounds for pair in (record.get("turned_away") or {}).items())
    if away:
        left_out = [(node, why, count) for (node, why), count in away.most_common(20)]
        blocks.append(Table("Nodes that took no part", ("node", "reason", "rounds"), left_out, words=True))
    head = ("client", *(kind.split(",")[0] for kind in words))
    return [*blocks, Table("Rounds of each client", head, rows, "Each client in numbers")]


def partition(facts: Facts) -> list[Block]:
    """What each client holds."""
    sizes = facts.partition.get("sizes")
    if not sizes:
        return [] if facts.config.privacy is None else ["What each client holds is secret under [privacy]."]
    what, counts, kinds = "", [[size] for size in sizes], ["training examples"]
    for kind, names in (("domain", "domains"), ("label", "label_names")):  # labels, where there are both
        if facts.partition.get(f"{kind}_counts"):
            what, counts = kind, facts.partition[f"{kind}_counts"]
            kinds = [str(name) for name in facts.partition[names]]
    smallest, largest, clients = min(sizes), max(sizes), client_names(facts)[: len(sizes)]
    line = f"{len(sizes)} clients, {sum(sizes)} training examples, {smallest} to {largest} on a client."
    for kind in ("label", "domain"):
        divergence = number(facts.partition.get(f"{kind}_js_divergence"))
        if divergence is not None:
            line += f" Mean Jensen-Shannon divergence of the {kind}s: {divergence:.3f} bits (0: all clients alike)."
    several = len(kinds) > 1
    of = f"examples of each {what}" if several else "examples"
    caption = f"Training {of} on each client ({facts.config.partition.name})."
    label = f"Chart of the {of} on {len(sizes)} clients; they have {smallest} to {largest} training examples."
    draw = holdings(np.asarray(counts), kinds, clients)
    rows = [(name, size, *(row if several else ())) for name, size, row in zip(clients, sizes, counts, strict=True)]
    head = ("client", "examples", *(kinds if several else ()))
    return [line, Chart(draw, label, caption), Table("What each client holds", head, rows, "Each client in numbers")]


def client_names(facts: Facts) -> list[str]:
    """What each client is called: by its name or its only domain, and its number."""
    owners = facts.partition.get("client_names")
    counts, domains = (facts.partition.get(key) for key in ("domain_counts", "domains"))
    if not owners and counts and domains and all(sum(count > 0 for count in row) == 1 for row in counts):
        owners = [domains[int(np.argmax(row))] for row in counts]
    return [f"{owners[k]} {k}" if owners and k < len(owners) else str(k) for k in range(facts.clients)]


def _sum(group: Sequence[Record], key: str) -> float:
    return sum(number(record.get(key)) or 0.0 for record in group)
