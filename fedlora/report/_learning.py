"""The sections about learning: each takes the facts and returns its blocks, none where it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fedlora.progress import beside_accuracy, format_bytes, format_seconds
from fedlora.report._blocks import Block, Table, short
from fedlora.report._facts import Facts, Record, number
from fedlora.report.figures import Chart
from fedlora.report.line_charts import MOST_LINES, Line, accuracy_curve, line_chart

MOST_SAMPLES = 12


def learning(facts: Facts) -> list[Block]:
    """The main figure by round, on the whole test set and on each domain."""
    if not facts.evaluated:
        return []
    draw, lines = accuracy_curve(facts.records, facts.metric)
    words, first, last = facts.metric.replace("_", " "), facts.evaluated[0], facts.evaluated[-1]
    label = (
        f"Line chart of {words} by round, from {facts.show(first)} in round {first['round']}. "
        f"After round {last['round']}: {', '.join(line.label for line in lines)}."
    )
    caption = f"{words.capitalize()} on the test set after each round"
    caption += "; round 0 is the base model before any training." if first["round"] == 0 else "."
    if len(facts.domains) > MOST_LINES:
        caption += f" The first {MOST_LINES} of {len(facts.domains)} domains are drawn; the table has all."
    return [Chart(draw, label, caption), _outcome(facts), _by_round(facts)]


def samples(facts: Facts) -> list[Block]:
    """What the model answers to held-out prompts, before and after the training."""
    if not facts.samples:
        return []
    more = len(facts.samples) - MOST_SAMPLES
    blocks: list[Block] = ["Greedy continuations of prompts that were not trained on."]
    names = {"prompt": "prompt", "before": "base model", "after": "after training", "reference": "test set"}
    for place, entry in enumerate(facts.samples[:MOST_SAMPLES], 1):
        rows = [(name, entry[key]) for key, name in names.items() if entry.get(key) is not None]
        blocks.append(Table(f"Example {place}", (), rows, words=True))
    return blocks + ([f"{more} more are in samples.json."] if more > 0 else [])


def client_losses(facts: Facts) -> list[Block]:
    """The spread of the clients' own training losses in each round."""
    rows = []
    for record in facts.rounds:
        found = [v for row in (record.get("clients") or {}).values() if (v := number(row.get("loss"))) is not None]
        if found:
            rows.append((record["round"], np.quantile(found, [0, 0.25, 0.5, 0.75, 1])))
    if not rows:
        return [] if facts.config.privacy is None else ["The clients' own losses are secret under [privacy]."]
    end, last = rows[-1]
    least, lower, middle, upper, most = zip(*(found for _, found in rows), strict=True)
    points = [(x, y) for (x, _), y in zip(rows, middle, strict=True)]
    lines = [Line(f"median {last[2]:.4g}", points, "c0", [(least, most), (lower, upper)])]
    label = (
        f"Line chart of the clients' training loss by round. In round {end} the median is {last[2]:.3g}; "
        f"half of the clients are between {last[1]:.3g} and {last[3]:.3g}, all between {last[0]:.3g} and {last[4]:.3g}."
    )
    caption = (
        "Training loss of the clients that answered: the line is the median, the dark band holds the middle half of "
        "the clients, the light band all of them."
    )
    final = facts.rounds[-1]
    columns = {"examples": "num_examples", "steps": "steps", "training loss": "loss", "seconds": "seconds"}
    cells = [(k, *(short(row.get(key)) for key in columns.values())) for k, row in (final.get("clients") or {}).items()]
    table = Table(f"Clients in round {final['round']}", ("client", *columns), cells, "Each client in the last round")
    return [Chart(line_chart(lines, ylabel="training loss"), label, caption), table]


def aggregation_error(facts: Facts) -> list[Block]:
    """How far the broadcast is from the mean of the clients' updates."""
    points = facts.points("aggregation_error")
    if not points:
        return []
    explained = (
        "|D − D*| / |D*|: how far the change that the server broadcasts is from the weighted mean of the clients' own "
        "changes. 0 is exact; 1 is as far off as changing nothing."
    )
    largest = max(error for _, error in points)
    if largest < 1e-6:
        return [f"Exact in every round (largest: {largest:.1g}).", explained]
    (start, before), (end, after) = points[0], points[-1]
    label = f"Line chart of the aggregation error by round, {before:.3g} in round {start}, {after:.3g} in round {end}."
    return [Chart(line_chart([Line(f"{after:.4g}", points)], from_zero=True), label, explained)]


def _outcome(facts: Facts) -> Table:
    """The run beside its base model and baselines, where there are any."""
    metric, first, last = facts.metric, facts.evaluated[0], facts.evaluated[-1]
    records: list[tuple[str, Record]] = [("base model", first)] if first["round"] == 0 else []
    records.append((f"federated, round {last['round']}", last))
    strong = len(records) - 1
    records += beside_accuracy(metric, last)
    alone = facts.baselines.get("local_only") or {}
    records += [(f"one client alone, {which}", alone[which]) for which in ("best", "mean", "worst") if which in alone]
    if facts.baselines.get("centralised"):
        records.append(("all data in one place", facts.baselines["centralised"]))
    rows = [(name, *(facts.show(of, domain) for domain in (None, *facts.domains))) for name, of in records]
    caption = f"{metric.replace('_', ' ').capitalize()} on the test set"
    return Table(caption, ("", "all", *facts.domains), rows, strong=strong)


def _by_round(facts: Facts) -> Table:
    def amount(key: str, show: Callable[[float], str]) -> Callable[[Record], str]:
        return lambda record: "-" if (value := number(record.get(key))) is None else show(value)

    def of_rule(name: str, record: Record) -> str:
        return short((record.get("rule") or {}).get(name))

    def clients(key: str) -> Callable[[Record], object]:
        return lambda record: len(record[key]) if key in record else "-"

    columns: list[tuple[str, Callable[[Record], object]]] = [
        ("round", lambda record: record["round"]),
        (facts.metric.replace("_", " "), facts.show),
        *((name, partial(facts.show, domain=name)) for name in facts.domains),
        ("train loss", amount("train_loss", "{:.4g}".format)),
        ("aggregation error", amount("aggregation_error", "{:.4g}".format)),
        ("sent", amount("bytes_up", format_bytes)),
        ("received", amount("bytes_down", format_bytes)),
        *([("epsilon", amount("epsilon", "{:.4g}".format))] if any("epsilon" in r for r in facts.rounds) else []),
        ("asked", clients("asked")),
        ("answered", clients("answered")),
        ("time", amount("seconds", format_seconds)),
    ]
    rules = dict.fromkeys(name for record in facts.rounds for name in record.get("rule") or {})
    columns += [(name, partial(of_rule, name)) for name in rules]
    rows = [[show(record) for _, show in columns] for record in facts.records]
    return Table("Every round", [name for name, _ in columns], rows, "All rounds in numbers")
