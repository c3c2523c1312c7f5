"""What is told while a run goes on: terminals, trackers, the files of a run, and whatever a user adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from fedlora.aggregators import GlobalState
from fedlora.config import RunConfig


@dataclass(frozen=True)
class Evaluation:
    """Figures by name ("accuracy", "loss", ...).

    Args:
        overall: over all examples.
        domains: domain -> the same figures over its examples, the largest first; empty without a domain column.
        measures: what the task measured of each example, [n, ...] by name, in the examples' order.
        sums: the task's statistics of all examples, from which `overall` follows.
        rows: positions of the test examples that were measured; None: all of them.
    """

    overall: dict[str, float]
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    measures: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    sums: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    rows: np.ndarray | None = field(default=None, compare=False)


class Callback:
    """Told what happens in a run; every method does nothing unless a subclass overrides it.

    Calls come from one thread, in the order of the run. What a callback raises ends the run.
    """

    def started(self, config: RunConfig, clients: int, rounds: int) -> None:
        """The run begins, or goes on, with so many clients, up to round `rounds`."""

    def round_started(self, number: int, asked: Sequence[int]) -> None:
        """A round begins; these clients were sampled."""

    def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
        """The outcome of one client; if it is left out of the round, `note` says why."""

    def evaluated(self, state: GlobalState, evaluation: Evaluation) -> None:
        """A state was evaluated on the server's test examples or a sample of them; the server's base holds it."""

    def measured(self, record: Mapping[str, Any]) -> None:
        """A round's line of metrics is complete; its state is not kept yet."""

    def state_reached(self, state: GlobalState) -> None:
        """The state after a round, or the one before the first."""

    def best_reached(self, state: GlobalState) -> None:
        """With `[selection]`: this round is the best so far; its checkpoint was written."""

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """A round is over (round 0: the evaluation before training); this is its line of metrics."""

    def ended(self, state: GlobalState) -> None:
        """All rounds are done; the server's base holds the state."""

    def message(self, text: str) -> None:
        """Anything else worth a line."""


@final
class Callbacks(Callback):
    """Several callbacks as one, told in their order."""

    def __init__(self, *callbacks: Callback) -> None:
        self._all = callbacks


def _tell_all(name: str) -> Callable[..., None]:
    def tell(self: Callbacks, *args: Any) -> None:
        for one in self._all:
            getattr(one, name)(*args)

    return tell


for _name in [name for name in vars(Callback) if not name.startswith("_")]:
    setattr(Callbacks, _name, _tell_all(_name))
