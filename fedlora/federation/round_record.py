"""The books of one round: who was asked, what became of each, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.adapter import DeltaSum
from fedlora.errors import RoundError
from fedlora.federation.plausibility import no_losses
from fedlora.federation.simulated_devices import SimulatedDevices


@dataclass
class Round:
    """The books of one round.

    Args:
        number: of the round, from 1.
        asked: clients that were sent a plan.
        offline: clients that were not there to be asked (simulated devices).
        answered: clients whose reply was folded in.
        refused: clients whose reply was not, and why.
        missing: clients without a reply at the deadline.
        dropped: clients that dropped out (simulated devices).
        late: clients that missed the simulated deadline.
        spent: of the refused, those whose privacy budget is spent.
        lost: whether too few answered, so that the round changed nothing.
        simulated_s: client -> simulated seconds until its reply.
        median_change: of the clients in the rounds before (`fedlora.federation.plausibility`); None: it is not known.
        claims: client -> examples that its node said it has, of all nodes.
        doubted: clients whose loss is left out of the mean.
    """

    number: int
    asked: list[int]
    answered: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    offline: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)
    lost: bool = False
    median_change: float | None = None
    claims: Mapping[int, int] = field(default_factory=dict)
    doubted: list[int] = field(default_factory=list)
    simulated_s: dict[int, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    ideal: DeltaSum = field(default_factory=DeltaSum)
    weight: float = 0.0

    def add(self, shares: Sequence[Round]) -> None:
        """Take over what became of some of the asked, from the books of those who asked them.

        Args:
            shares: of clients that come after all those that stand here; only theirs have to be put in order.
        """
        for ours, *theirs in zip(self._lists(), *(share._lists() for share in shares), strict=True):
            ours.extend(sorted(client_id for some in theirs for client_id in some))
        for table, *others in zip(self._tables(), *(share._tables() for share in shares), strict=True):
            table.update(sorted(row for other in others for row in other.items()))
        for share in shares:
            self.add_cost(share)
            self.ideal.extend(share.ideal)
            self.weight += share.weight

    def add_cost(self, share: Round) -> None:
        """Take over what some of the asked cost, whatever they answered."""
        self.bytes_up += share.bytes_up
        self.bytes_down += share.bytes_down
        self.spent.extend(sorted(share.spent))

    def _lists(self) -> tuple[list[int], ...]:
        return self.answered, self.missing, self.dropped, self.late

    def _tables(self) -> tuple[dict[int, Any], ...]:
        return self.refused, self.simulated_s, self.clients

    def mean(self, metric: str) -> float | None:
        """The mean of a client metric, weighted by examples."""
        rows = [(row.get("weight", row["num_examples"]), row[metric]) for row in self.clients.values() if metric in row]
        return sum(n * value for n, value in rows) / sum(n for n, _ in rows) if rows else None

    def doubt(self) -> None:
        """Leave losses out that cannot be the model's; once all replies are there."""
        self.doubted = no_losses({k: row["loss"] for k, row in self.clients.items() if "loss" in row})
        for client_id in self.doubted:
            del self.clients[client_id]["loss"]

    def has_quorum(self, share: float) -> bool:
        """Whether that share of the asked answered (of none asked, nobody is enough)."""
        return len(self.answered) >= quorum_of(len(self.asked), share)

    def no_quorum(self, share: float, deadline_s: float, cure: str) -> RoundError:
        """What to say where the quorum was missed, with the clients' reasons."""
        reasons = [f"client {k}: {why}" for k, why in sorted(self.refused.items())]
        reasons += [f"client {k}: no reply within {deadline_s:g} s" for k in self.missing]
        needed = quorum_of(len(self.asked), share)
        return RoundError(
            f"round {self.number}: {len(self.answered)} of {len(self.asked)} clients answered, the quorum is {needed}; "
            f"{'; '.join(reasons[:3])}{' ...' if len(reasons) > 3 else ''} ({cure})"
        )

    def lost_to_devices(self, share: float) -> bool:
        """Whether the quorum is missed, and would not be if no simulated device had dropped out or been late."""
        there = len(self.answered) + len(self.dropped) + len(self.late)
        return len(self.answered) < quorum_of(len(self.asked), share) <= there or not self.asked

    def outcome(self) -> dict[str, Any]:
        """What a line of metrics says of the clients."""
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "asked": self.asked,
            "answered": self.answered,
            "refused": {str(k): why for k, why in self.refused.items()},
            "missing": self.missing,
            "clients": {str(k): row for k, row in self.clients.items()},
            **({"lost": True} if self.lost else {}),
            **({"loss_left_out": self.doubted} if self.doubted else {}),
        }

    def simulated(self, devices: SimulatedDevices) -> dict[str, Any]:
        """What a line of metrics says of simulated devices; nothing where there are none.

        The round takes as long as its slowest reply, or until the deadline if anybody dropped out or was late.
        """
        if not devices.simulated:
            return {}
        seconds = max((self.simulated_s[k] for k in self.answered), default=0.0)
        if devices.deadline_s is not None and (self.dropped or self.late):
            seconds = devices.deadline_s
        return {
            "offline": self.offline,
            "dropped": self.dropped,
            "late": self.late,
            "lost": self.lost,
            "simulated_seconds": seconds,
        }


def quorum_of(asked: int, share: float) -> int:
    """How many of the asked must answer: the share, rounded up, at least one (0.07 of 100 are 7, in floats too)."""
    return max(1, math.ceil(asked * share - 1e-9))
