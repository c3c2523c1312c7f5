"""What a process of a `WorkerPool` does: trains groups of clients as `LocalClients`.

For a rule that claims LINEAR it keeps one running sum of what its clients sent, and hands that over when the round is
over; for any other it hands over each update.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, final

import numpy as np

from fedlora.config import RunConfig
from fedlora.errors import FedloraError
from fedlora.federation.client_ledger import NOWHERE, LedgerPlace
from fedlora.federation.client_pool import (
    ClientEvaluation,
    ClientInfo,
    ClientReply,
    PartialAggregate,
    RoundRequest,
    ServerPart,
)
from fedlora.federation.client_store import NOTHING_KEPT, ClientStore
from fedlora.federation.load_rule import load_rule
from fedlora.federation.local_clients import LocalClients
from fedlora.federation.planner import Held, Planner
from fedlora.progress import Watcher
from fedlora.simulation.partial_aggregates import RunningAggregate, sums_suffice
from fedlora.simulation.processes import Channel, listen
from fedlora.training.evaluate import Measures
from fedlora.training.workspace import open_workspace
from fedlora.unexpected import describe_exception

Found = TypeVar("Found", ClientReply, ClientEvaluation, Measures)


@dataclass(frozen=True)
class Begin:
    """The first thing that a process is told.

    Args:
        config: Of the run, with this process's share of the machine and what "auto" chose.
        cohort: How many clients train at once.
        run: Id of the run's directory.
        ledgers: Where private clients keep their ledgers.
        store: Where clients keep what they train and do not send.
        modules: In which what the config names is defined.
    """

    config: RunConfig
    cohort: int
    run: str = ""
    ledgers: LedgerPlace = NOWHERE
    store: ClientStore = NOTHING_KEPT
    modules: Sequence[str] = ()


@dataclass(frozen=True)
class StartRound:
    """A round begins for one place of the pool.

    Args:
        place: Whose sum is begun: a process may stand in for another that has died.
        request: Of the round.
    """

    place: int
    request: RoundRequest


@dataclass(frozen=True)
class TrainGroup:
    """Train some clients together.

    Args:
        place: For which.
        clients: At most a cohort.
        held: What each of them holds.
    """

    place: int
    clients: Sequence[ClientInfo]
    held: Sequence[Held]


@dataclass(frozen=True)
class EvaluateClients:
    """Let some clients measure a state.

    Args:
        place: For which.
        request: The state.
        parts: Of their examples.
        clients: In the order of their numbers.
        held: What each of them holds.
    """

    place: int
    request: RoundRequest
    parts: Sequence[str]
    clients: Sequence[ClientInfo]
    held: Sequence[Held]


@dataclass(frozen=True)
class MeasureBatches:
    """Measure a state on examples of the server's, which each process has.

    Args:
        place: For which.
        request: The state.
        part: Which of the server's examples.
        batches: Positions in them.
    """

    place: int
    request: RoundRequest
    part: ServerPart
    batches: Sequence[np.ndarray]


@dataclass(frozen=True)
class EndRound:
    """Hand over the sum of a place."""

    place: int


@dataclass(frozen=True)
class JobResult(Generic[Found]):
    """What came of a `TrainGroup`, an `EvaluateClients` or a `MeasureBatches`.

    Args:
        found: Of each client or batch; replies are without the updates where the process keeps the sum.
        held: What each client holds now.
    """

    found: Sequence[Found]
    held: Sequence[Held] = ()


@dataclass(frozen=True)
class Doing:
    """What the process is doing, for whoever watches the run."""

    text: str


@dataclass(frozen=True)
class Failed:
    """The process cannot go on."""

    why: str


def serve(pipe: Channel) -> None:
    """Do what comes through the pipe, in its order, until nobody is at its other end."""
    jobs = listen(pipe)  # a server that waits for room in the pipe would not read the answers
    last = 0.0

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            pipe.tell(Doing(text))

    try:
        with Watcher(tell):
            worker = PoolWorker(_next(jobs))
            while (job := _next(jobs)) is not None:
                result = worker.do(job)
                if result is not None:
                    pipe.tell(result)
    except Exception as error:
        pipe.tell(Failed(str(error) if isinstance(error, FedloraError) else describe_exception(error)))


def _next(jobs: SimpleQueue[Any]) -> Any:
    job = jobs.get()
    if isinstance(job, Exception):
        raise job
    return job


@final
class PoolWorker:
    """The process's part of a run."""

    def __init__(self, begin: Begin) -> None:
        for module in begin.modules:
            import_module(module)
        config = begin.config
        self._rule, workspace = load_rule(config), open_workspace(config)
        self._clients = LocalClients(config, self._rule, workspace, begin.cohort, begin.run, begin.ledgers, begin.store)
        self._measures_error = Planner(config, self._rule, workspace).measures_error
        self._sums: dict[int, RunningAggregate] = {}

    def do(
        self, job: StartRound | TrainGroup | EndRound | EvaluateClients | MeasureBatches
    ) -> JobResult[Any] | PartialAggregate | None:
        """One job."""
        if isinstance(job, MeasureBatches):
            return JobResult(self._clients.measured(job.request, job.part, job.batches))
        if isinstance(job, EvaluateClients):
            return JobResult(self._clients.evaluate_some(job.request, job.clients, job.held, job.parts), job.held)
        if isinstance(job, TrainGroup):
            return self._train(job)
        if isinstance(job, EndRound):
            return self._sums.pop(job.place).close()
        self._request = job.request
        self._sums[job.place] = RunningAggregate(measures_error=self._measures_error)
        return None

    def _train(self, job: TrainGroup) -> JobResult[ClientReply]:
        replies = self._clients.train_together(self._request, job.clients, job.held)
        if not sums_suffice(self._rule):
            return JobResult(replies, job.held)
        for reply in replies:
            if reply.update is not None:
                self._sums[job.place].add(reply.update, reply.update.adapter.tensors(reply.sends))
        return JobResult([replace(reply, update=None) for reply in replies], job.held)
