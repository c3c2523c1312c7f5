"""Record of one round: the clients that were sampled, the outcome of each, and the traffic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.errors import RoundError
from fedlora.federation.client_pool import ClientReply, PartialAggregate
from fedlora.federation.plausibility import no_losses
from fedlora.federation.simulated_devices import SimulatedDevices
from fedlora.lowrank import DeltaSum


@dataclass
class RoundRecord:
    """Record of one round.

    Args:
        number: Of the round, from 1.
        asked: Clients that were sent a request.
        offline: Clients that were not there to be asked (simulated devices).
        measures_error: Whether the sum of the ideal update is kept, to measure the aggregation error.

    Attributes:
        answered: Clients whose reply was aggregated.
        refused: Clients whose reply was not, and why.
        missing: Clients without a reply at the deadline.
        dropped: Clients that dropped out (simulated devices).
        late: Clients that missed the simulated deadline.
        spent: Of the refused, those whose privacy budget is spent.
        lost: Whether too few answered, so that the round changed nothing.
        simulated_s: Client -> simulated seconds until its reply.
        doubted: Clients whose loss is left out of the mean.
        clients: Client -> its figures.
        ideal: Sum over the updates of n_k s_k B_k A_k; `weight` is the sum of n_k.
    """

    number: int
    asked: Sequence[int]
    offline: list[int] = field(default_factory=list)
    measures_error: bool = False
    answered: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)
    lost: bool = False
    doubted: list[int] = field(default_factory=list)
    simulated_s: dict[int, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    ideal: DeltaSum = field(default_factory=DeltaSum)
    weight: float = 0.0

    def add(self, reply: ClientReply) -> None:
        """Write down the outcome of one client."""
        client_id, failure = reply.client_id, reply.failure
        self.bytes_down += reply.bytes_down
        self.bytes_up += reply.bytes_up
        if reply.simulated_s is not None:
            self.simulated_s[client_id] = reply.simulated_s
        if failure is None:
            self.answered.append(client_id)
            self.clients[client_id] = dict(reply.figures)
            if reply.update is not None and self.measures_error:
                self.ideal.add(reply.update.adapter.pairs, reply.update.num_examples)
                self.weight += reply.update.num_examples
        elif failure.kind in ("refused", "spent"):
            self.refused[client_id] = failure.why
            if failure.kind == "spent":
                self.spent.append(client_id)
        else:
            outcomes = {"missing": self.missing, "dropped": self.dropped, "late": self.late}
            outcomes[failure.kind].append(client_id)

    def add_partial(self, partial: PartialAggregate) -> None:
        """Take over the ideal sum of clients whose outcomes are written down already."""
        self.ideal.extend(partial.ideal)
        self.weight += partial.weight

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

    def failed(self, share: float) -> bool:
        """Whether the round is lost, and not to simulated devices alone."""
        return self.lost and not _lost_to_devices(self.asked, self.answered, [*self.dropped, *self.late], share)

    def no_quorum(self, share: float, deadline_s: float, cure: str) -> RoundError:
        """What to say where the quorum was missed, with the clients' reasons."""
        reasons = [f"client {k}: {why}" for k, why in sorted(self.refused.items())]
        reasons += [f"client {k}: no reply within {deadline_s:g} s" for k in self.missing]
        needed = quorum_of(len(self.asked), share)
        return RoundError(
            f"round {self.number}: {len(self.answered)} of {len(self.asked)} clients answered, the quorum is {needed}; "
            f"{'; '.join(reasons[:3])}{' ...' if len(reasons) > 3 else ''} ({cure})",
            code="no-quorum",
        )

    def outcome(self) -> dict[str, Any]:
        """The clients' part of a line of metrics."""
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "asked": list(self.asked),
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


def failed_at_the_end(lines: Sequence[Mapping[str, Any]], share: float) -> int:
    """How many of the last rounds in succession failed (`RoundRecord.failed`), by a run's lines of metrics."""
    count = 0
    for line in reversed(lines):
        away = [*line.get("dropped", ()), *line.get("late", ())]
        if not line.get("lost") or _lost_to_devices(line["asked"], line["answered"], away, share):
            break
        count += 1
    return count


def _lost_to_devices(asked: Sequence[int], answered: Sequence[int], away: Sequence[int], share: float) -> bool:
    """Whether a lost round would have had its quorum if no simulated device had dropped out or been late."""
    return not asked or len(answered) + len(away) >= quorum_of(len(asked), share)


def quorum_of(asked: int, share: float) -> int:
    """How many of the asked must answer: the share, rounded up, at least one (0.07 of 100 are 7, in floats too)."""
    return max(1, math.ceil(asked * share - 1e-9))
