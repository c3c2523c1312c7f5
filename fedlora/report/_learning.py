"""The sections about learning: each takes the facts and returns its blocks, none where it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedlora.privacy.disclosure import RECORD
from fedlora.progress import (
    NOT_METRICS,
    SAMPLED,
    before_training,
    beside_accuracy,
    beside_baselines,
    format_bytes,
    format_metric,
    format_seconds,
)
from fedlora.report._blocks import Block, Table, short
from fedlora.report._facts import Facts, Record, number
from fedlora.report.line_charts import Line, accuracy_curve, line_chart

MOST_SAMPLES = 12
MOST_CLASSES = 12  # that are shown without being asked for
BESIDE = (NOT_METRICS | RECORD) - {"loss"}
"""What a line of metrics has beside the figures of an evaluation."""


def learning(facts: Facts) -> list[Block]:
    """The main figure by round, on the whole test set and on each domain."""
    if not facts.evaluated:
        return []
    curve = accuracy_curve(facts.records, facts.metric, before_training(facts.config))
    return [curve, _outcome(facts), *_by_class(facts), _figures(facts), _by_round(facts)]


def samples(facts: Facts) -> list[Block]:
    """What the model answers to held-out prompts, before and after the training."""
    if not facts.samples:
        return []
    more = len(facts.samples) - MOST_SAMPLES
    blocks: list[Block] = ["Greedy continuations of prompts that were not trained on."]
    names = {
        "prompt": "prompt",
        "before": before_training(facts.config),
        "after": "after training",
        "reference": "test set",
    }
    for place, entry in enumerate(facts.samples[:MOST_SAMPLES], 1):
        rows = [(name, entry[key]) for key, name in names.items() if entry.get(key) is not None]
        blocks.append(Table(f"Example {place}", (), rows, words=True))
    return blocks + ([f"{more} more are in samples.json."] if more > 0 else [])


def client_losses(facts: Facts) -> list[Block]:
    """The spread of the clients' own training losses in each round."""
    losses = {}
    for record in facts.rounds:
        found = [number(row.get("loss")) for row in (record.get("clients") or {}).values()]
        if any(loss is not None for loss in found):
            losses[record["round"]] = np.quantile([x for x in found if x is not None], [0, 0.25, 0.5, 0.75, 1])
    if not losses:
        return [] if facts.config.privacy is None else ["The clients' own losses are secret under [privacy]."]
    least, lower, middle, upper, most = np.array(list(losses.values())).T
    lines = [Line("median", list(zip(losses, middle, strict=True)), bands=[(least, most), (lower, upper)])]
    caption = (
        "Training loss of the clients that answered: the line is the median, the dark band holds the middle half of "
        "the clients, the light band all of them."
    )
    final = facts.rounds[-1]
    columns = {"examples": "num_examples", "steps": "steps", "training loss": "loss", "seconds": "seconds"}
    cells = [(k, *(short(row.get(key)) for key in columns.values())) for k, row in (final.get("clients") or {}).items()]
    table = Table(f"Clients in round {final['round']}", ("client", *columns), cells, "Each client in the last round")
    return [line_chart(lines, "the clients' training loss", caption), table]


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
    return [line_chart([Line("", points)], "aggregation error", explained, from_zero=True)]


def _outcome(facts: Facts) -> Table:
    """The run beside what it began with and baselines, where there are any."""
    metric, first, last = facts.metric, facts.evaluated[0], facts.last
    records: list[tuple[str, Record]] = [(before_training(facts.config), first)] if first["round"] == 0 else []
    records.append((f"federated, round {last['round']}", last))
    strong = len(records) - 1
    records += beside_accuracy(metric, last)
    records += beside_baselines(metric, last, facts.baselines)
    rows = [(name, *(facts.show(of, domain=domain) for domain in (None, *facts.domains))) for name, of in records]
    caption = f"{metric.replace('_', ' ').capitalize()} on the test set"
    return Table(caption, ("", "all", *facts.domains), rows, strong=strong)


def _by_class(facts: Facts) -> list[Table]:
    classes = facts.last.get("classes") or {}
    names = dict.fromkeys(name for row in classes.values() for name in row)
    rows = [(name, *(format_metric(key, number(row.get(key))) for key in names)) for name, row in classes.items()]
    caption = f"Each class after round {facts.last['round']}"
    return [Table(caption, ("class", *names), rows, caption if len(rows) > MOST_CLASSES else "")] if rows else []


def _figures(facts: Facts) -> Table:
    first, last = facts.evaluated[0], facts.last
    names = [name for name, value in last.items() if name not in BESIDE and isinstance(value, int | float)]
    records = ([(before_training(facts.config), first)] if first["round"] == 0 else []) + [
        (f"round {last['round']}", last)
    ]
    rows = [(name.replace("_", " "), *(facts.show(record, name) for _, record in records)) for name in names]
    return Table("All figures on the test set", ("", *(name for name, _ in records)), rows, "All figures")


def _by_round(facts: Facts) -> Table:
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("train loss", "train_loss", short),
        ("aggregation error", "aggregation_error", short),
        ("sent", "bytes_up", format_bytes),
        ("received", "bytes_down", format_bytes),
        ("epsilon", "epsilon", short),
        ("asked", "asked", short),
        ("answered", "answered", short),
        ("time", "seconds", format_seconds),
    ]
    if not any("epsilon" in record for record in facts.rounds):
        columns = [column for column in columns if column[0] != "epsilon"]
    rules = dict.fromkeys(name for record in facts.rounds for name in record.get("rule") or {})
    rows = []
    for record in facts.records:
        mark = SAMPLED if "sample" in record else ""
        row = [record["round"], *(mark + facts.show(record, domain=domain) for domain in (None, *facts.domains))]
        for _, key, show in columns:
            value = record.get(key)
            value = number(len(value) if isinstance(value, list) else value)
            row.append("-" if value is None else show(value))
        rows.append([*row, *(short((record.get("rule") or {}).get(name)) for name in rules)])
    head = ["round", facts.metric.replace("_", " "), *facts.domains, *(name for name, *_ in columns), *rules]
    sampled = next((record["sample"] for record in facts.records if "sample" in record), None)
    note = f" ({SAMPLED}: measured on {sampled} of the test examples)" if sampled else ""
    return Table(f"Every round{note}", head, rows, "All rounds in numbers")
