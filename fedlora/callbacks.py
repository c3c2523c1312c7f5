"""What is told while a run goes on: terminals, trackers, the files of a run, and whatever a user adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from fedlora.aggregators import GlobalState
from fedlora.config import RunConfig

if TYPE_CHECKING:
    from fedlora.training.evaluate import Evaluation


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
        """A state was evaluated on the server's test examples; the server's base holds it."""

    def measured(self, record: Mapping[str, Any]) -> None:
        """A round's line of metrics is complete; its state is not kept yet."""

    def state_reached(self, state: GlobalState) -> None:
        """The state after a round, or the one before the first."""

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

    def started(self, config: RunConfig, clients: int, rounds: int) -> None:
        """Tell all."""
        for one in self._all:
            one.started(config, clients, rounds)

    def round_started(self, number: int, asked: Sequence[int]) -> None:
        """Tell all."""
        for one in self._all:
            one.round_started(number, asked)

    def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
        """Tell all."""
        for one in self._all:
            one.reply(number, client_id, ok, note)

    def evaluated(self, state: GlobalState, evaluation: Evaluation) -> None:
        """Tell all."""
        for one in self._all:
            one.evaluated(state, evaluation)

    def measured(self, record: Mapping[str, Any]) -> None:
        """Tell all."""
        for one in self._all:
            one.measured(record)

    def state_reached(self, state: GlobalState) -> None:
        """Tell all."""
        for one in self._all:
            one.state_reached(state)

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """Tell all."""
        for one in self._all:
            one.round_ended(record)

    def ended(self, state: GlobalState) -> None:
        """Tell all."""
        for one in self._all:
            one.ended(state)

    def message(self, text: str) -> None:
        """Tell all."""
        for one in self._all:
            one.message(text)
