"""What a process of a crew does: asks its share of a round's clients, which are nodes on a grid of its own.

For a rule that needs sums alone it keeps one running sum of what its clients sent, and gives that away when the round
is over; for any other it hands over each update.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from queue import SimpleQueue
from typing import Any

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from fedlora.adapter import DeltaSum
from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.errors import FedloraError
from fedlora.federation.load_rule import load_rule
from fedlora.federation.round_record import Round
from fedlora.flower import client_app
from fedlora.flower.app_config import config_of
from fedlora.flower.asking import Asker
from fedlora.flower.following import show
from fedlora.flower.local_grid import LocalGrid, raise_unexpected, task_identity
from fedlora.flower.node_registry import Node
from fedlora.flower.sums import RunningSums, Sums, sums_suffice
from fedlora.progress import NoProgress, Watcher
from fedlora.simulation.processes import Channel, listen
from fedlora.training.workspace import open_workspace
from fedlora.unexpected import describe_exception


@dataclass(frozen=True)
class Begin:
    """The first thing that a process is told.

    Args:
        run_config: as the ClientApp sees it, with this process's share of the machine.
        clients: how many there are.
        cohort: how many train at once.
        modules: in which what the config names is defined.
    """

    run_config: Mapping[str, bool | float | int | str]
    clients: int
    cohort: int
    modules: Sequence[str] = ()


@dataclass(frozen=True)
class Stand:
    """Where a round starts.

    Args:
        number: of the round.
        state: of the server.
        base_digest: names the base of the state.
        median_change: of the clients in the rounds before.
    """

    number: int
    state: GlobalState
    base_digest: str
    median_change: float | None = None


@dataclass(frozen=True)
class AskThese:
    """Ask some clients, together.

    Args:
        nodes: of these clients, with what they hold.
    """

    nodes: Sequence[Node]


@dataclass(frozen=True)
class GiveSums:
    """The round is over."""


@dataclass
class Asked:
    """What became of an `AskThese`.

    Args:
        books: of these clients alone.
        nodes: with what they hold now.
        updates: what they sent; none where the process keeps the sum.
    """

    books: Round
    nodes: Sequence[Node]
    updates: Sequence[ClientUpdate]


@dataclass
class Doing:
    """What the process is doing, for whoever watches the run."""

    text: str


@dataclass
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
        share = Share(_next(jobs))
        with Watcher(tell):
            while (job := _next(jobs)) is not None:
                answer = share.do(job)
                if answer is not None:
                    pipe.tell(answer)
    except Exception as error:
        pipe.tell(Failed(str(error) if isinstance(error, FedloraError) else describe_exception(error)))


def _next(jobs: SimpleQueue[Any]) -> Any:
    job = jobs.get()
    if isinstance(job, Exception):
        raise job
    return job


def simulated_nodes(clients: int) -> list[dict[str, int]]:
    """Node configs of a simulation, one for each client."""
    return [{"partition-id": k, "num-partitions": clients} for k in range(clients)]


def cohort_grid(run_config: Mapping[str, bool | float | int | str], clients: int, cohort: int) -> LocalGrid:
    """A grid of all clients, of which so many train at once."""
    grid = LocalGrid(client_app.app, simulated_nodes(clients), run_config)
    grid.window, grid.together = cohort, client_app.train_rounds
    return grid


class Share:
    """The process's part of a run."""

    def __init__(self, begin: Begin) -> None:
        for module in begin.modules:
            import_module(module)
        grid = cohort_grid(begin.run_config, begin.clients, begin.cohort)
        config = config_of(Context(1, 1, UserConfig(), RecordDict(), UserConfig(begin.run_config)))
        self._rule, self._workspace = load_rule(config), open_workspace(config)
        self._grid = grid
        run = str(begin.run_config.get("run-id", ""))
        self._asker = Asker(grid, config, self._rule, self._workspace, NoProgress(), client_app.frozen_store.put, run)
        self._digests = {0: ""}
        self._sums = RunningSums()

    def do(self, job: Stand | AskThese | GiveSums) -> Asked | Sums | None:
        """One job."""
        if isinstance(job, AskThese):
            with task_identity(run_id=1):
                return self._ask(job)
        if isinstance(job, GiveSums):
            return self._sums.close()
        self._start, self._sums = job, RunningSums()
        self._digests[job.state.base_version] = job.base_digest
        show(self._workspace.base, job.state, job.base_digest, self._digests)
        return None

    def _ask(self, job: AskThese) -> Asked:
        state = self._start.state
        who = _Here({node.client_id: node for node in job.nodes})
        books = Round(self._start.number, list(who.nodes), median_change=self._start.median_change)
        updates = self._asker.updates(state, self._start.base_digest, books, who)
        if not sums_suffice(self._rule):
            given = list(updates)
            raise_unexpected(self._grid)
            return Asked(books, job.nodes, given)
        for update in updates:
            sends = self._asker.plan(state, who.nodes[update.client_id]).sends
            self._sums.add(update, update.adapter.tensors(sends), books.ideal)
            books.ideal = DeltaSum()
        raise_unexpected(self._grid)
        return Asked(books, job.nodes, ())


@dataclass(frozen=True)
class _Here:
    """Simulated nodes are always there."""

    nodes: Mapping[int, Node]

    def is_there(self, client_id: int) -> bool:
        return client_id in self.nodes
