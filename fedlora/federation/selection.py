"""Which round's model is the best so far, and whether the rounds still get better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from fedlora.config import SelectionConfig
from fedlora.errors import ConfigError, nearest
from fedlora.progress import lower_is_better
from fedlora.tasks import Task


@final
class Selection:
    """Compares rounds by their validation figures, from the first that was trained on.

    Args:
        config: The table [selection].
        task: Whose figures are compared.
        history: Lines of metrics so far.
    """

    def __init__(self, config: SelectionConfig, task: Task, history: Sequence[Mapping[str, Any]]) -> None:
        self.metric = config.metric or task.metric
        self._config, self._higher = config, _higher(config, self.metric, task)
        self.best: Best | None = None
        self._without_better = 0
        for record in history:
            self.see(record)

    def see(self, record: Mapping[str, Any]) -> bool:
        """Whether a line of metrics is of a round that is better than all before.

        Raises:
            ConfigError: its validation figures have no such metric.
        """
        figures: Mapping[str, Any] = record.get("validation") or {}
        if not figures or not record["round"]:
            return False
        if self.metric not in figures:
            raise ConfigError(
                f"selection.metric names the figure {self.metric!r}, which this task has not; "
                f"{nearest(self.metric, tuple(figures))}",
                code="unknown-metric",
            )
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
