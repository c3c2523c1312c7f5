"""The seam of a round: a pool of clients that can be asked to train and to evaluate, wherever they are.

`LocalClients` trains them in this process, `fedlora.simulation` in several processes or on a Ray cluster, and
`fedlora.flower.FlowerClients` sends Flower messages to nodes. The server's loop knows none of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from fedlora.adapter import ALL_PARTS
from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.errors import PoolError, RoundError
from fedlora.federation.plausibility import Expectations
from fedlora.lowrank import DeltaSum
from fedlora.training.evaluate import Measures


@dataclass(frozen=True)
class ClientInfo:
    """What is known of a client that can be asked.

    Args:
        client_id: Its number in the partition.
        rank: That it asked for; None: the config's.
        num_examples: That it said it has; None: it did not say.
    """

    client_id: int
    rank: int | None = None
    num_examples: int | None = None


@dataclass(frozen=True)
class RoundRequest:
    """A round's work.

    Args:
        number: Of the round, from 1.
        clients: Those that were sampled, in ascending order.
        state: On which they train.
        digests: Identity of the base weights by version, as this run has made them ("" for the pristine ones).
        expected: What replies are held against.
        kept_rounds: Client -> the last round of which its update was used; see `TrainRequest.kept_round`.
        of_run: Whether the state is one of the run's. An adapter from elsewhere is measured as it is, whatever the rule
            would let clients train and keep.
    """

    number: int
    clients: Sequence[int]
    state: GlobalState
    digests: Mapping[int, str] = field(default_factory=lambda: {0: ""})
    expected: Expectations = field(default_factory=Expectations)
    kept_rounds: Mapping[int, int] = field(default_factory=dict)
    of_run: bool = True

    @property
    def base_digest(self) -> str:
        """Identity of the base weights on which the clients train."""
        return self.digests[self.state.base_version]


FailureKind = Literal["refused", "missing", "spent", "dropped", "late"]
"""A reply that was refused, none before the deadline, a privacy budget that is spent, a simulated device that dropped
out, and one that would have missed the simulated deadline."""


@dataclass(frozen=True)
class Failure:
    """Why there is no update of a client."""

    kind: FailureKind
    why: str = ""


@dataclass(frozen=True)
class ClientReply:
    """The outcome of one client in a round.

    Args:
        client_id: Whose.
        update: What it sent; None where it failed, or where a `PartialAggregate` has it.
        sends: The parts of the update that it sent; the others are its plan's.
        failure: Why it is left out of the round.
        figures: What is written down of it, with its weight as "num_examples" or "weight".
        bytes_down: That were sent to it.
        bytes_up: That came back.
        simulated_s: Simulated seconds until its reply.
    """

    client_id: int
    update: ClientUpdate | None = None
    sends: frozenset[str] = ALL_PARTS
    failure: Failure | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    simulated_s: float | None = None

    def failed(self, failure: Failure, *, bytes_up: int = 0) -> ClientReply:
        """This client, which is left out of the round."""
        return replace(self, failure=failure, bytes_up=self.bytes_up + bytes_up)

    def with_bytes(self, *, up: int, down: int = 0) -> ClientReply:
        """This client, with more traffic."""
        return replace(self, bytes_up=self.bytes_up + up, bytes_down=self.bytes_down + down)


@dataclass(frozen=True)
class PartialAggregate:
    """Updates of several clients as weighted means, for a rule that claims LINEAR.

    Args:
        updates: One for each layout and each start of what is not sent.
        ideal: Sum over the clients of n_k s_k B_k A_k, where the aggregation error is measured.
        weight: Sum of their n_k.
    """

    updates: Sequence[ClientUpdate]
    ideal: DeltaSum = field(default_factory=DeltaSum)
    weight: float = 0.0


Reply = ClientReply | PartialAggregate


ServerPart = Literal["test", "validation"]
"""Examples that the server has."""

SHARED = " (shared)"
"""After the name of a part of a client's examples: measured with the state's own model, where clients keep parts."""

Sums = Mapping[str, np.ndarray]
"""Statistics of some examples that add up, as `Task.sums` gives them."""


@dataclass(frozen=True)
class ClientEvaluation:
    """What a client measured of a state, on examples that it keeps apart.

    Args:
        client_id: Whose.
        sums: Of each part that was asked for and that the client may report on ("test", "validation").
        failure: Why there are none.
        bytes_down: That were sent to it.
        bytes_up: That came back.
    """

    client_id: int
    sums: Mapping[str, Sums] = field(default_factory=dict)
    failure: Failure | None = None
    bytes_down: int = 0
    bytes_up: int = 0


class MeasuringProcesses(Protocol):
    """Processes that have the server's examples, and share a measurement."""

    @property
    def threads(self) -> int:
        """Of each process."""
        ...

    def measure(self, request: RoundRequest, part: ServerPart, batches: Sequence[np.ndarray]) -> Sequence[Measures]:
        """Measure the request's state on examples of the server's.

        Args:
            request: The state.
            part: Which of the server's examples.
            batches: Positions in them.

        Returns:
            The measures of each batch, to the same bits whichever process measured it.
        """
        ...


class ClientPool(Protocol):
    """Clients that can be asked."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Who is there and does not take part -> why."""
        ...

    def available(self, round_number: int, needed: int) -> Mapping[int, ClientInfo]:
        """The clients that can be asked, by number; another object for one that came back as another node.

        Args:
            round_number: 0 before the first round of a run, or of a resumed one.
            needed: How many must be there before a round begins; the pool may wait for them.

        Raises:
            RoundError: nobody is there, or nobody can take part.
        """
        ...

    def leave_out(self, client_id: int, why: str) -> None:
        """A client cannot be served: it is not available until it has changed."""
        ...

    @abstractmethod
    def train(self, request: RoundRequest) -> Generator[Reply, None, None]:
        """Ask the sampled clients; yield the outcome of each, trained ones in their order, and partial aggregates last.

        A caller that has seen enough closes the generator: nobody else is asked, and what is under way comes to nothing
        and is not counted.
        """
        ...

    @abstractmethod
    def evaluate(self, request: RoundRequest, parts: Sequence[str]) -> Generator[ClientEvaluation, None, None]:
        """Let clients measure the request's state on examples that they keep apart; yield the outcome of each.

        Args:
            request: The clients, and the state after round `number`. Simulated devices take no time for it.
            parts: Some of "test" and "validation"; where clients keep parts of their models, they are measured with
                these, and with the state's own model under the same names followed by `SHARED`.
        """
        ...

    @property
    def measuring(self) -> MeasuringProcesses | None:
        """Processes that can measure on the server's examples; None: only the server's own can."""
        ...


class SimulatedClients(ClientPool):
    """What the pools of a simulation share: all clients of a partition can be asked in every round.

    Args:
        clients: All of them, by number.
    """

    def __init__(self, clients: Mapping[int, ClientInfo]) -> None:
        self._clients = clients

    @property
    def left_out(self) -> Mapping[str, str]:
        """Nobody: a client that cannot be served ends the run at its start."""
        return {}

    def available(self, round_number: int, needed: int) -> Mapping[int, ClientInfo]:
        """All clients of the partition, in every round."""
        return self._clients

    def leave_out(self, client_id: int, why: str) -> None:
        """Raise `PoolError`: all clients have the run's own config."""
        raise PoolError(f"client {client_id}: {why}", code="client-cannot-be-served")

    @property
    def measuring(self) -> MeasuringProcesses | None:
        """None: the clients are in the server's own process."""
        return None


def nobody(left_out: Mapping[str, str]) -> RoundError:
    """The error of a run in which no client can take part.

    Args:
        left_out: Node -> why it is left out.
    """
    reasons = [f"node {node}: {why}" for node, why in left_out.items()]
    return RoundError(f"no node can take part; {'; '.join(reasons[:3])}", code="no-node")
