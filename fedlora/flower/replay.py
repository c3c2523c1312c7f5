"""A run again, in this process, in which each round's updates come from the clients that answered then.

Clients that are killed, or are late, make a deployed run another one than its simulation. Which of them answered is in
its metrics: with the same ones in each round the simulation has the same updates, and must end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Error, Message, MessageType
from flwr.common.constant import ErrorCode

from fedlora.errors import ConfigError, RoundError
from fedlora.flower.local_grid import LocalGrid


def answered_in(records: Iterable[Mapping[str, Any]]) -> dict[int, frozenset[int]]:
    """Round -> the clients whose update was folded in, by a run's lines of metrics."""
    return {int(record["round"]): frozenset(record["answered"]) for record in records if "answered" in record}


class ReplayGrid(LocalGrid):
    """A grid on which the clients answer that answered before; of the others it says that they are not there.

    Args:
        *args: of `LocalGrid`.
        answered: round -> those clients.
        **kwargs: of `LocalGrid`.
    """

    def __init__(self, *args: Any, answered: Mapping[int, frozenset[int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answered = answered

    def _answer(self, message: Message) -> Message:
        context = self._contexts.get(message.metadata.dst_node_id)
        if message.metadata.message_type == MessageType.TRAIN and context is not None:
            client_id, number = context.node_config["partition-id"], int(message.metadata.group_id)
            if client_id not in self.answered.get(number, ()):
                error = Error(ErrorCode.NODE_UNAVAILABLE, "it did not answer in the run that is replayed")
                return Message(error, reply_to=message)
        return super()._answer(message)


def require_rounds(before: Iterable[Mapping[str, Any]], rounds: int) -> None:
    """Raise `ConfigError` where a replay would have more or fewer rounds than the run has, before it is trained."""
    last = max(answered_in(before), default=0)
    if rounds != last:
        raise ConfigError(
            f"a replay has the rounds of its run, which are {last}, and the config asks for {rounds}: "
            f"replay it with --set rounds={last}"
        )


def require_same(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> None:
    """Raise `RoundError` where the replay folded in other clients than the run: a client failed that did not then."""
    then, now = answered_in(before), answered_in(after)
    for number in sorted(then.keys() | now.keys()):
        if then.get(number) != now.get(number):
            here, there = sorted(now.get(number, ())), sorted(then.get(number, ()))
            raise RoundError(
                f"round {number} of the replay has updates of clients {here}, and the run had those of {there}: "
                "replay it with the run's config and data"
            )
