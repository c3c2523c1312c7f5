"""Which round's model is the best so far, and whether the rounds still get better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from fedlora.config import RunConfig, SelectionConfig
from fedlora.errors import ConfigError, nearest
from fedlora.progress import lower_is_better
from fedlora.tasks import Task

MISSING = 0.1
"""Share of the examples by which a round's figures may lack clients that reported before, and still be compared."""
GONE = 3
"""Evaluations in succession without a client after which rounds are compared without it."""


@final
class Selection:
    """Compares rounds by their validation figures, from the first that was trained on.

    A lost round is passed over: its model is that of the round before it, which was compared.

    Figures that clients report are compared where they are of the same clients but for a tenth of the examples: a round
    that lacks more is passed over. Where a client stays away, or where clients that are all asked are joined by
    another, the comparison is made anew.

    Args:
        config: With a table [selection].
        task: Whose figures are compared.
        history: Lines of metrics so far.

    Attributes:
        best: The best round so far; None: there is none yet.
        said: What is to be told of the last line that was seen; "": nothing.
    """

    def __init__(self, config: RunConfig, task: Task, history: Sequence[Mapping[str, Any]]) -> None:
        assert config.selection is not None
        self.metric = config.selection.metric or task.metric
        self._config, self._evaluation = config.selection, config.evaluation
        self._higher = _higher(config.selection, self.metric, task)
        self.best: Best | None = None
        self.said = ""
        self._without_better = 0
        self._examples: dict[str, float] = {}  # of each client, as it last reported them
        self._away: dict[str, int] = {}  # evaluations in succession that lack a client which reported before
        for record in history:
            self.see(record)

    def see(self, record: Mapping[str, Any]) -> bool:
        """Whether a line of metrics is of a round that is better than all before.

        Raises:
            ConfigError: its validation figures have no such metric.
        """
        figures: Mapping[str, Any] = record.get("validation") or {}
        self.said = ""
        comparable = self._evaluation.on != "clients" or self._is_of_the_same(record.get("federated") or {})
        if not figures or not record["round"] or record.get("lost"):
            return False
        if self.metric not in figures:
            raise ConfigError(
                f"selection.metric names the figure {self.metric!r}, which this task has not; "
                f"{nearest(self.metric, tuple(figures))}",
                code="unknown-metric",
            )
        if not comparable:
            away = ", ".join(sorted(self._away, key=int))
            self.said = (
                f"round {record['round']} is not compared with others (selection): client {away} reported before, and "
                "does not now"
            )
            return False
        value = figures[self.metric]
        if value is None or not math.isfinite(value) or not self._is_better(value):
            self._without_better += 1
            return False
        self.best, self._without_better = Best(int(record["round"]), self.metric, float(value)), 0
        return True

    @property
    def stopped(self) -> str | None:
        """Why the run ends before its last round; None: it goes on."""
        patience = self._config.patience
        if patience is None or self._without_better < patience:
            return None
        best = "no round had a figure" if self.best is None else f"round {self.best.round} is still the best"
        return f"{best} by {self.metric} after {self._without_better} more evaluations (selection.patience)"

    def _is_of_the_same(self, found: Mapping[str, Any]) -> bool:
        """Whether the figures of a round are of nearly all clients that have reported; notes who did."""
        reported = {number: float(row["examples"]) for number, row in found.get("clients", {}).items()}
        away = {n: self._away.get(n, 0) + 1 for n in found.get("left_out", {}) if n in self._examples}
        gone = [number for number, times in away.items() if times >= GONE]
        new = sum(size for number, size in reported.items() if number not in self._examples)
        joined = self._evaluation.clients_fraction == 1.0 and new > MISSING * sum(reported.values())
        if gone or joined:
            self.best, self._without_better = None, 0
            self._examples = {number: size for number, size in self._examples.items() if number not in gone}
        self._away = {number: times for number, times in away.items() if number not in gone}
        self._examples = {**self._examples, **reported}
        missing = sum(self._examples[number] for number in self._away)
        return missing <= MISSING * (missing + sum(reported.values()))

    def _is_better(self, value: float) -> bool:
        if self.best is None:
            return True
        gain = value - self.best.value if self._higher else self.best.value - value
        return gain > self._config.min_delta


@dataclass(frozen=True)
class Best:
    """The best round so far: its number, and its validation figure."""

    round: int
    metric: str
    value: float


def _higher(config: SelectionConfig, metric: str, task: Task) -> bool:
    if config.mode != "auto":
        return config.mode == "max"
    return task.higher_is_better if metric == task.metric else not lower_is_better(metric)
