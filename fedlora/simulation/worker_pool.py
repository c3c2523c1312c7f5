"""Clients that train in several processes, each with a base of its own.

Clients go out in waves, in the order of their numbers: a group for each place of the pool, shared out by the work that
they are expected to be. So the cohort in which a client trains, and with it every bit, is a function of the config
alone and never of time.

For a rule that claims LINEAR each process keeps a sum, and sends it once a round. For any other, updates are handed on
in the order of the clients' numbers, a few waves ahead of the rule at most.

A process that dies in a round (killed, out of memory, its host gone) is replaced, or another one stands in for it: it
gets the same groups of clients again, so that the round ends with the same bytes. In a private run it is not: noise
that was drawn once is not drawn again, and the run ends, to be resumed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, final

import numpy as np

from fedlora.errors import PoolError, in_words
from fedlora.federation.client_pool import (
    ClientEvaluation,
    ClientInfo,
    ClientReply,
    PartialAggregate,
    Reply,
    RoundRequest,
    ServerPart,
    SimulatedClients,
)
from fedlora.federation.planner import Held
from fedlora.progress import activity
from fedlora.simulation.pool_worker import (
    Begin,
    Doing,
    EndRound,
    EvaluateClients,
    Failed,
    JobResult,
    MeasureBatches,
    StartRound,
    TrainGroup,
    serve,
)
from fedlora.simulation.processes import Child, Helper, listen
from fedlora.training.evaluate import Measures

AHEAD = 2
"""Waves that are under way at once: one that trains, and one that waits for it to be done."""
MOST_DEATHS = 3
"""Deaths of one kind that end a run."""

Job = TrainGroup | EndRound | EvaluateClients | MeasureBatches


@dataclass(eq=False)
class _Worker:
    """A process, and the results that it still owes: for which place each is, and whether anybody waits for it."""

    helper: Helper
    results: SimpleQueue[Any]
    owed: deque[tuple[int, bool]] = field(default_factory=deque)


@dataclass
class _Place:
    """A share of each round's clients.

    Args:
        worker: Who trains them.
        done: Jobs of this round whose results have come.
        pending: Jobs whose results are still to come.
        ready: Results that have come before they were asked for.
        work: That it was given in this round.
    """

    worker: _Worker
    done: list[Job] = field(default_factory=list)
    pending: deque[Job] = field(default_factory=deque)
    ready: deque[JobResult[Any] | PartialAggregate] = field(default_factory=deque)
    work: float = 0.0


@final
class WorkerPool(SimulatedClients):
    """A pool of clients in several processes; see the module and `fedlora.federation.client_pool`.

    Args:
        hire: Starts the process of a place that does `fedlora.simulation.pool_worker.serve`.
        places: How many processes there are.
        begin: What each is told first.
        clients: All clients.
        work: For each client, how much it is expected to be, in any unit.
        sums: Whether the rule needs sums alone.
        say: Told of a process that died and was replaced.
    """

    def __init__(
        self,
        hire: Callable[[int], Helper],
        places: int,
        begin: Begin,
        clients: Mapping[int, ClientInfo],
        work: Sequence[float],
        *,
        sums: bool,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(clients)
        self._hire, self._begin = hire, begin
        self._work, self._sums, self._say = work, sums, say
        self._held: dict[int, Held] = {}
        self._deaths: Counter[str] = Counter()
        self._request: RoundRequest | None = None
        workers = [self._started(place) for place in range(places)]  # all at once, before any is waited for
        self._places = [_Place(worker) for worker in workers]

    def train(self, request: RoundRequest) -> Generator[Reply, None, None]:
        """Train the sampled clients.

        Raises:
            PoolError: a process cannot go on, or has died and cannot be replaced.
        """
        self._settle()
        self._request = request
        for number, place in enumerate(self._places):
            place.work = 0.0
            self._tell(place.worker, StartRound(number, request))
        size = self._begin.cohort * len(self._places)
        todo = deque(request.clients[start : start + size] for start in range(0, len(request.clients), size))
        under_way: deque[list[int]] = deque()
        while todo or under_way:
            while todo and len(under_way) < AHEAD:
                under_way.append(self._send(todo.popleft()))
            replies: list[ClientReply] = []
            for number in under_way.popleft():
                trained: JobResult[ClientReply] = self._result(number)
                replies.extend(trained.found)
                ids = [reply.client_id for reply in trained.found]
                self._held.update(zip(ids, trained.held, strict=True))
            yield from sorted(replies, key=lambda reply: reply.client_id)
        if self._sums:
            for number in range(len(self._places)):
                self._ask(number, EndRound(number))
            for number in range(len(self._places)):
                yield self._result(number)

    def evaluate(self, request: RoundRequest, parts: Sequence[str]) -> Generator[ClientEvaluation, None, None]:
        """Let the processes measure the state, each for a part of the clients."""
        self._settle()
        self._request = request
        number = len(self._places)
        groups = [request.clients[place::number] for place in range(number)]
        for place, ids in enumerate(groups):
            held = [self._held.get(client_id) or Held() for client_id in ids]
            clients = [self._clients[client_id] for client_id in ids]
            self._ask(place, EvaluateClients(place, request, parts, clients, held))
        found: list[ClientEvaluation] = []
        for place, ids in enumerate(groups):
            evaluated: JobResult[ClientEvaluation] = self._result(place)
            found.extend(evaluated.found)
            self._held.update(zip(ids, evaluated.held, strict=True))
        yield from sorted(found, key=lambda one: one.client_id)

    @property
    def measuring(self) -> WorkerPool:
        """These processes."""
        return self

    @property
    def threads(self) -> int:
        """Of each process."""
        threads = self._begin.config.runtime.threads
        assert threads is not None
        return threads

    def measure(self, request: RoundRequest, part: ServerPart, batches: Sequence[np.ndarray]) -> Sequence[Measures]:
        """Let the processes measure the state, each every so many of the batches."""
        self._settle()
        self._request = request
        number = len(self._places)
        for place in range(number):
            self._ask(place, MeasureBatches(place, request, part, batches[place::number]))
        found: list[Measures] = [{} for _ in batches]
        for place in range(number):
            measured: JobResult[Measures] = self._result(place)
            found[place::number] = measured.found
        return found

    def _settle(self) -> None:
        """Take in what is still to come of a round that the rule broke off, and forget what was done."""
        for number, place in enumerate(self._places):
            while place.pending:
                self._result(number)
            place.done = []
            place.ready.clear()  # of a round that was broken off while one process stood in for two places

    def _send(self, wave: Sequence[int]) -> list[int]:
        """Share some clients out, the largest first, to whoever has least to do; the places that got any."""
        groups: list[list[int]] = [[] for _ in self._places]
        for client_id in sorted(wave, key=lambda k: -self._work[k]):
            free = [number for number, group in enumerate(groups) if len(group) < self._begin.cohort]
            chosen = min(free, key=lambda number: self._places[number].work)
            groups[chosen].append(client_id)
            self._places[chosen].work += self._work[client_id]
        busy = [number for number, group in enumerate(groups) if group]
        for number in busy:
            ids = sorted(groups[number])
            held = [self._held.get(client_id) or Held() for client_id in ids]
            self._ask(number, TrainGroup(number, [self._clients[client_id] for client_id in ids], held))
        return busy

    # ------------------------------------------------------------------------------------------------ processes

    def _started(self, number: int) -> _Worker:
        helper = self._hire(number)
        worker = _Worker(helper, listen(helper.pipe))
        self._tell(worker, self._begin)
        return worker

    def _tell(self, worker: _Worker, job: Any) -> None:
        """Send a job; that its process is gone is found when its result is waited for."""
        try:
            worker.helper.pipe.tell(job)
        except OSError:
            activity.debug("a process is gone")

    def _ask(self, number: int, job: Job, *, wanted: bool = True) -> None:
        place = self._places[number]
        if wanted:
            place.pending.append(job)
        place.worker.owed.append((number, wanted))
        self._tell(place.worker, job)

    def _result(self, number: int) -> Any:
        """The next result of a place, in the order in which it was asked."""
        place = self._places[number]
        while not place.ready:
            worker = place.worker
            match worker.results.get():
                case Doing(text):
                    activity.info("%s", text)
                case Failed(why):
                    raise PoolError(f"a process that trains clients cannot go on: {why}", code="worker-failed")
                case None:
                    self._replace(worker)
                case Exception() as error:
                    why = f"its answer cannot be read: {in_words(error)}"
                    raise PoolError(f"a process that trains clients cannot go on: {why}", code="worker-failed")
                case result:
                    owner, wanted = worker.owed.popleft()
                    if wanted:
                        self._places[owner].done.append(self._places[owner].pending.popleft())
                        self._places[owner].ready.append(result)
        return place.ready.popleft()

    def _replace(self, worker: _Worker) -> None:
        """Let others do what a dead process had to do, from the beginning of the round where it kept a sum.

        Raises:
            PoolError: the run cannot go on without it.
        """
        how = worker.helper.wait()
        self._deaths[how] += 1
        lost = f"a process that trains clients {how} on {worker.helper.host}"
        if self._begin.config.example_privacy is not None or self._deaths[how] >= MOST_DEATHS:
            times = "" if self._deaths[how] < MOST_DEATHS else f", the {self._deaths[how]}rd time"
            raise PoolError(
                f"{lost}{times}: resume the run; where memory ran out (-9), with a lower runtime.processes or "
                "runtime.cohort",
                code="worker-died",
            )
        for number, place in enumerate(self._places):
            if place.worker is worker:
                place.worker = self._successor(number, worker, lost)
                assert self._request is not None
                self._tell(place.worker, StartRound(number, self._request))
                if self._sums and not any(isinstance(job, EndRound) for job in place.done):
                    for job in place.done:
                        self._ask(number, job, wanted=False)
                pending, place.pending = place.pending, deque()
                for job in pending:
                    self._ask(number, job)

    def _successor(self, number: int, dead: _Worker, lost: str) -> _Worker:
        """A new process, or one that lives and stands in."""
        try:
            started = self._started(number)
        except (OSError, PoolError) as error:
            living = list({id(p.worker): p.worker for p in self._places if p.worker is not dead}.values())
            if not living:
                raise PoolError(f"{lost}, and no other can be started: {in_words(error)}", code="worker-died") from None
            self._say(f"{lost}: another process takes its clients, from the beginning of its part of the round")
            return min(living, key=lambda worker: sum(place.worker is worker for place in self._places))
        self._say(f"{lost}: a new one takes its clients, from the beginning of its part of the round")
        return started


@contextmanager
def child_processes(environments: Sequence[Mapping[str, str]]) -> Iterator[Callable[[int], Child]]:
    """Inside, the result starts the process of a place on this machine; all of them end with the context.

    Args:
        environments: Variables of each place's process besides this one's.
    """
    children: list[Child] = []

    def hire(place: int) -> Child:
        children.append(Child(serve, environments[place]))
        return children[-1]

    try:
        yield hire
    finally:
        for child in children:
            child.end()
