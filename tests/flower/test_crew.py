"""The crew's own part, with threads for processes: who is asked with whom, when, and what becomes of the answers."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.callbacks import Callback
from fedlora.errors import PoolError
from fedlora.federation.round_record import Round
from fedlora.flower.node_registry import Node
from fedlora.simulation.partial_aggregates import RunningSums
from fedlora.simulation.pool_worker import Asked, AskThese, Begin, Failed, GiveSums, Stand, serve
from fedlora.simulation.processes import Pipe
from fedlora.simulation.worker_pool import AHEAD, WorkerPool

STATE = GlobalState(AdapterState(dense={"x": torch.zeros(2)}))
Answer = Callable[[AskThese], Any]


class Thread:
    """A child that writes down what it is told; a client's update is its number, and client 13 fails."""

    def __init__(self, pause: float = 0.0, answer: Answer | None = None, *, sums: bool = False) -> None:
        here, there = multiprocessing.Pipe()
        self.pipe, self._there = Pipe(here), Pipe(there)
        self.told: list[Any] = []
        self._pause, self._answer, self._sums = pause, answer or self._asked, sums
        self._running = RunningSums()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait(self) -> str:
        return "ended with status -9"

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.tell(None)
        self._thread.join()

    def fail(self, why: str) -> None:
        """Say that it cannot go on, and be gone."""
        self._there.tell(Failed(why))
        self.pipe.tell(None)
        self._thread.join()

    @property
    def groups(self) -> list[list[int]]:
        """Clients that were asked together."""
        return [[node.client_id for node in job.nodes] for job in self.told if isinstance(job, AskThese)]

    def _work(self) -> None:
        while (job := self._there.hear()) is not None:
            self.told.append(job)
            if isinstance(job, AskThese):
                time.sleep(self._pause)
                if (answer := self._answer(job)) is None:
                    break
                self._there.tell(answer)
            elif isinstance(job, GiveSums):
                self._there.tell(self._running.close())
            elif isinstance(job, Stand):
                self._running = RunningSums()
        self._there.connection.close()

    def _asked(self, job: AskThese) -> Asked:
        books, updates = Round(self.told[1].number, [node.client_id for node in job.nodes]), []
        for node in job.nodes:
            node.frozen = f"held by {node.client_id}"
            if node.client_id == 13:
                books.refused[13] = "unlucky"
                continue
            value = torch.full((2,), float(node.client_id))
            updates.append(ClientUpdate(node.client_id, AdapterState(dense={"x": value}), 1.0 + node.client_id % 3))
            books.answered.append(node.client_id)
            books.clients[node.client_id] = {"loss": 0.5}
            books.bytes_up += 8
            if self._sums:
                self._running.add(updates[-1], updates[-1].adapter.tensors(), books.ideal)
        return Asked(books, job.nodes, () if self._sums else updates)


Make = Callable[..., WorkerPool]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Thread] = []

    def crew(
        children: Sequence[Thread], cohort: int = 2, work: Sequence[float] = (1.0,) * 20, sums: bool = False
    ) -> WorkerPool:
        made.extend(children)
        return WorkerPool(children, Begin({"k": 2}, len(work), cohort), work, sums=sums)  # type: ignore[arg-type]

    yield crew
    for child in made:
        child.end()


def nodes(count: int = 20) -> dict[int, Node]:
    return {k: Node(k, k + 2) for k in range(count)}


def ask(
    crew: WorkerPool, asked: Sequence[int], books: Round | None = None, there: dict[int, Node] | None = None
) -> list[Any]:
    books = books or Round(1, list(asked))
    return list(crew.updates(STATE, "", books, there or nodes(), Callback()))


def test_updates_come_in_the_order_of_the_clients(make: Make) -> None:
    updates = ask(make([Thread(pause=0.02), Thread()]), range(13))
    assert [update.client_id for update in updates] == list(range(13))
    assert [float(update.adapter.dense["x"][0]) for update in updates] == list(range(13))


@pytest.mark.parametrize("pauses", [(0.0, 0.0), (0.03, 0.0), (0.0, 0.03)])
def test_who_trains_with_whom_is_no_matter_of_time(make: Make, pauses: tuple[float, float]) -> None:
    children = [Thread(pause) for pause in pauses]
    ask(make(children, work=[1.0, 5.0, 1.0, 1.0, 2.0, 2.0, 3.0, 1.0, 1.0]), range(9))
    # Of each four the largest first, to whoever has had less so far, and two for each.
    assert [child.groups for child in children] == [[[1, 3], [5, 7]], [[0, 2], [4, 6], [8]]]


def test_a_round_begins_like_the_one_before_it(make: Make) -> None:
    children = [Thread(), Thread(), Thread()]
    crew = make(children, work=[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    ask(crew, range(7))
    first = [child.groups for child in children]
    ask(crew, range(7))
    assert [child.groups for child in children] == [2 * groups for groups in first]


def test_no_more_is_under_way_than_a_few_waves(make: Make) -> None:
    children = [Thread(), Thread()]
    updates = make(children, cohort=1).updates(STATE, "", Round(1, list(range(20))), nodes(), Callback())
    for taken in range(1, 7):
        next(updates)
        time.sleep(0.02)
        assert sum(map(len, (group for child in children for group in child.groups))) <= taken + 2 * AHEAD


def test_books_and_nodes_are_those_of_one_process(make: Make) -> None:
    there, books = nodes(), Round(3, [2, 5, 11, 12, 13, 14])
    ask(make([Thread(), Thread()]), books.asked, books, there)
    assert books.answered == list(books.clients) == [2, 5, 11, 12, 14]
    assert (books.refused, books.bytes_up) == ({13: "unlucky"}, 40)
    assert {k: node.frozen for k, node in there.items() if node.frozen} == {k: f"held by {k}" for k in books.asked}
    assert there[5].node_id == 7


def test_every_process_knows_where_the_round_starts(make: Make) -> None:
    children = [Thread(), Thread()]
    ask(make(children), [3, 4])
    for child in children:
        begin, stand, job = child.told
        assert isinstance(begin, Begin)
        assert isinstance(stand, Stand)
        assert (begin.run_config, begin.clients, stand.number) == ({"k": 2}, 20, 1)
        assert torch.equal(stand.state.adapter.dense["x"], torch.zeros(2))
        assert isinstance(job, AskThese)


def test_one_sum_of_each_process_weighs_what_its_clients_weigh(make: Make) -> None:
    children = [Thread(sums=True), Thread(sums=True)]
    crew = make(children, sums=True)
    for asked in (range(5), range(3, 13)):
        updates = ask(crew, asked)
        assert len(updates) == 2
        weights = [1.0 + k % 3 for k in asked]
        assert sum(update.num_examples for update in updates) == sum(weights)
        mean = sum(u.num_examples * u.adapter.dense["x"] for u in updates) / sum(weights)
        assert mean.tolist() == pytest.approx(
            2 * [sum(w * k for w, k in zip(weights, asked, strict=True)) / sum(weights)], rel=1e-12
        )


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_round_that_was_broken_off_leaves_nothing_to_the_next(make: Make, sums: bool, taken: int) -> None:
    children, books = [Thread(sums=sums), Thread(sums=sums)], Round(1, list(range(12)))
    crew = make(children, cohort=1, sums=sums)
    broken = crew.updates(STATE, "", books, nodes(), Callback())
    for _ in range(taken):
        next(broken)
    broken.close()
    assert books.bytes_up == 8 * sum(len(child.groups) for child in children)  # what was under way was sent, too
    if not sums:
        assert books.answered == [0, 1][: 2 * taken]
    updates = ask(crew, [14, 15, 16])
    assert [update.client_id for update in updates] == ([14, 15] if sums else [14, 15, 16])
    assert sum(update.num_examples for update in updates) == sum(1.0 + k % 3 for k in (14, 15, 16))


def test_a_process_without_a_client_gives_no_sum(make: Make) -> None:
    (update,) = ask(make([Thread(sums=True), Thread(sums=True)], sums=True), [4])
    assert (update.client_id, update.num_examples) == (4, 2.0)


def test_sums_are_kept_apart_by_layout() -> None:
    def update(client_id: int, rank: int) -> ClientUpdate:
        pair = LoraPair(torch.ones(rank, 3), torch.full((2, rank), float(client_id)), 1.0)
        return ClientUpdate(client_id, AdapterState({"m": pair}), 1.0)

    sums = RunningSums()
    for one in (update(1, 2), update(2, 1), update(3, 2)):
        sums.add(one, one.adapter.tensors({"B"}), Round(1, []).ideal)
    first, second = sums.close().updates
    assert (first.client_id, first.num_examples, first.adapter.pairs["m"].B.tolist()) == (1, 2.0, [[2.0, 2.0]] * 2)
    assert first.adapter.pairs["m"].A.dtype == torch.float32  # it was not sent, and is not averaged
    assert (second.client_id, second.num_examples, second.adapter.pairs["m"].B.tolist()) == (2, 1.0, [[2.0]] * 2)


def test_sums_are_kept_apart_by_what_was_not_sent() -> None:
    """One A for both would be another change of weights than either client has made."""

    def update(client_id: int, a: float) -> ClientUpdate:
        pair = LoraPair(torch.full((1, 3), a), torch.full((2, 1), float(client_id)), 1.0)
        return ClientUpdate(client_id, AdapterState({"m": pair}), 1.0)

    sums = RunningSums()
    for one in (update(1, 1.0), update(2, 5.0), update(3, 1.0)):
        sums.add(one, one.adapter.tensors({"B"}), Round(1, []).ideal)
    found = [(u.client_id, u.num_examples, float(u.adapter.pairs["m"].A[0, 0])) for u in sums.close().updates]
    assert found == [(1, 2.0, 1.0), (2, 1.0, 5.0)]


def test_a_process_that_dies_ends_the_run_with_a_cure(make: Make) -> None:
    crew = make([Thread(), Thread(answer=lambda _: None)], cohort=1)
    with pytest.raises(PoolError, match=r"status -9: resume the run; where memory ran out"):
        ask(crew, range(6))


def test_a_process_that_cannot_go_on_says_why(make: Make) -> None:
    with pytest.raises(PoolError, match="no room"):
        ask(make([Thread(answer=lambda _: Failed("no room"))]), [0])


def test_a_process_that_could_not_begin_says_why(make: Make) -> None:
    """It says so before it is asked anything, and is gone when it is."""
    child = Thread()
    crew = make([child])
    child.fail("no such rule")
    with pytest.raises(PoolError, match="no such rule"):
        ask(crew, [0])


class _Unreadable:
    def __reduce__(self) -> Any:
        return _no_memory, ()


def _no_memory() -> None:
    raise MemoryError("no room for it")


def test_nobody_waits_for_an_answer_that_cannot_be_read(make: Make) -> None:
    with pytest.raises(PoolError, match="no room for it"):
        ask(make([Thread(answer=lambda _: _Unreadable())]), [0])


def test_a_process_that_cannot_read_its_job_says_so() -> None:
    here, there = (Pipe(end) for end in multiprocessing.Pipe())
    thread = threading.Thread(target=serve, args=(there,), daemon=True)
    thread.start()
    here.tell(_Unreadable())
    failed = here.hear()
    assert isinstance(failed, Failed)
    assert failed.why.startswith("memory ran out (no room for it)")
    thread.join()


def test_any_tensor_survives_the_pipe() -> None:
    here, there = (Pipe(end) for end in multiprocessing.Pipe())
    sent = {
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "turned": torch.randn(4, 3, dtype=torch.float64).T,
        "one": torch.tensor(7),
        "none": torch.empty(0, 5),
    }
    here.tell(sent)
    got = there.hear()
    for name, value in sent.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)
    got["half"].zero_()  # its memory is its own
    assert sent["half"].sum() == 15
