"""What a run directory says, read once for all sections of the report; whatever is missing is empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.progress import format_metric, lower_is_better, main_metric
from fedlora.runs.config_changes import Change
from fedlora.runs.rundir import RunDir

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """One run.

    Args:
        path: of its folder.
        config: resolved.
        records: lines of metrics.jsonl.
        metric: the figure that its rounds report.
        partition, baselines, environment, result: what the files of these names hold.
        samples: entries with "prompt", "reference", "before" and "after".
        finished: whether all its rounds are done.
        changes: of its config, by resumes.
    """

    path: Path
    config: RunConfig
    records: Sequence[Record] = ()
    metric: str = "accuracy"
    partition: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    finished: bool = False
    changes: Sequence[Change] = ()

    @classmethod
    def read(cls, run: RunDir) -> Facts:
        """Everything that is there.

        Raises:
            RunDirError: a file is damaged.
        """
        records = run.read_metrics()
        return cls(
            path=run.path,
            config=run.config,
            records=records,
            metric=reported_metric(records),
            **{
                name: run.read_json(f"{name}.json") or {}
                for name in ("partition", "baselines", "environment", "result")
            },
            samples=run.read_json("samples.json") or (),
            finished=run.finished,
            changes=run.changes,
        )

    @cached_property
    def evaluated(self) -> list[Record]:
        """The lines that have the main figure."""
        return [record for record in self.records if self.value(record) is not None]

    @cached_property
    def last(self) -> Record:
        """Of the evaluated lines that of the round whose model was kept: the best if rounds were selected, or the last.

        Raises:
            IndexError: none was evaluated.
        """
        kept = self.result.get("kept_round")
        return next((record for record in self.evaluated if record["round"] == kept), self.evaluated[-1])

    @property
    def test_size(self) -> int:
        """How many examples the main figure is measured on; 0 where that is not known."""
        return self.measured_on(self.last) if self.evaluated else int(self.partition.get("test_size") or 0)

    def measured_on(self, record: Record) -> int:
        """How many examples a round's main figure is measured on; 0 where that is not known."""
        clients = (record.get("federated") or {}).get("clients") or {}
        known = record.get("sample") or self.partition.get("test_size")
        return int(known or sum(row["examples"] for row in clients.values()))

    @cached_property
    def rounds(self) -> list[Record]:
        """The lines of rounds of training."""
        return [record for record in self.records if record["round"] > 0]

    @property
    def done(self) -> int:
        """The last round that is on record."""
        return self.records[-1]["round"] if self.records else 0

    @cached_property
    def domains(self) -> list[str]:
        """Names of the test set's domains, in order."""
        names = (name for record in self.records for name in record.get("domains") or {})
        return list(dict.fromkeys(names))

    @cached_property
    def clients(self) -> int:
        """How many clients there are, as far as the files tell."""
        known = {int(k) for record in self.rounds for kind in PLACES for k in record.get(kind) or ()}
        return max(len(self.partition.get("sizes") or ()), max(known, default=-1) + 1)

    def value(self, record: Record, metric: str = "", *, domain: str | None = None) -> float | None:
        """A figure of a round, the main one if none is named, on the whole test set or on one domain."""
        return metric_of(record, metric or self.metric, domain)

    def show(self, record: Record, metric: str = "", *, domain: str | None = None) -> str:
        """The same as text."""
        return format_metric(metric or self.metric, self.value(record, metric, domain=domain))

    def points(self, key: str) -> list[tuple[int, float]]:
        """(round, value) of a figure in the rounds of training that have it."""
        return [(record["round"], value) for record in self.rounds if (value := number(record.get(key))) is not None]

    def total(self, key: str) -> float:
        """The sum of a figure over all rounds."""
        return sum(number(record.get(key)) or 0.0 for record in self.records)


PLACES = ("asked", "answered", "refused", "missing", "late", "dropped", "offline", "spent")
"""Keys of a line of metrics under which client numbers stand."""


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def metric_of(record: Record, metric: str, domain: str | None = None) -> float | None:
    """A figure of one round, on the whole test set or on one domain."""
    of = record if domain is None else (record.get("domains") or {}).get(domain) or {}
    return number(of.get(metric))


def better(metric: str, one: float, other: float) -> bool:
    """Whether `one` is better than `other`."""
    return one < other if lower_is_better(metric) else one > other


def statuses(record: Record) -> dict[int, str]:
    """What became of each client in a round, by number; those not named were not asked."""
    found: dict[int, str] = {}
    # Later kinds win: a client that was asked and came late stands under both.
    for kind in ("offline", "missing", "dropped", "late", "refused", "answered"):
        found.update((int(k), kind) for k in record.get(kind) or ())
    for k, reason in (record.get("refused") or {}).items():
        if "privacy budget is spent" in str(reason):
            found[int(k)] = "spent"
    return found


def interval(facts: Facts, record: Record) -> tuple[float, float] | None:
    """The 95% interval of a round's share of right answers to the test examples; None for other figures.

    Wilson's score interval ("Probable Inference, the Law of Succession, and Statistical Inference", Journal of the
    American Statistical Association 22, 1927), which is not empty where all examples are right.
    """
    size, value = facts.measured_on(record), float(record[facts.metric])
    if facts.metric != "accuracy" or not size:
        return None
    z2 = 1.96**2
    middle = (value + z2 / (2 * size)) / (1 + z2 / size)
    half = math.sqrt(z2) / (1 + z2 / size) * math.sqrt(max(value * (1 - value), 0.0) / size + z2 / (4 * size**2))
    return middle - half, middle + half


def reported_metric(records: Sequence[Record]) -> str:
    """The name of the figure that a run reports; its loss where it has no other."""
    name = main_metric(records[0]) if records else "accuracy"
    there = {key for record in records for key, value in record.items() if number(value) is not None}
    return name if name in there or "loss" not in there else "loss"
