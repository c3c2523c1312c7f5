"""The pool's own part, with threads for processes: who trains with whom, when, and what becomes of the results."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.errors import PoolError
from fedlora.federation.client_pool import ClientInfo, ClientReply, Failure, PartialAggregate, RoundRequest
from fedlora.simulation.partial_aggregates import RunningAggregate
from fedlora.simulation.pool_worker import Begin, EndRound, Failed, JobResult, StartRound, TrainGroup, serve
from fedlora.simulation.processes import Pipe
from fedlora.simulation.worker_pool import AHEAD, WorkerPool

STATE = GlobalState(AdapterState(dense={"x": torch.zeros(2)}))
Answer = Callable[[TrainGroup], Any]
PUBLIC = SimpleNamespace(example_privacy=None)
PRIVATE = SimpleNamespace(example_privacy=object())


class Thread:
    """A child that writes down what it is told; a client's update is its number, and client 13 fails.

    Args:
        pause: Seconds that each group takes.
        answer: Of a group, in the place of the real one; None of it: the thread is gone.
        sums: Whether it keeps the sum.
        lives: Groups that it trains before it is gone.
    """

    def __init__(
        self, pause: float = 0.0, answer: Answer | None = None, *, sums: bool = False, lives: int = 1000
    ) -> None:
        here, there = multiprocessing.Pipe()
        self.host = "a host"
        self.pipe, self._there = Pipe(here), Pipe(there)
        self.told: list[Any] = []
        self._pause, self._answer, self._sums, self._lives = pause, answer or self._trained, sums, lives
        self._running: dict[int, RunningAggregate] = {}
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
        """Clients that trained together."""
        return [[client.client_id for client in job.clients] for job in self.told if isinstance(job, TrainGroup)]

    def _work(self) -> None:
        while (job := self._there.hear()) is not None:
            self.told.append(job)
            if isinstance(job, TrainGroup):
                time.sleep(self._pause)
                self._lives -= 1
                if self._lives < 0 or (answer := self._answer(job)) is None:
                    break
                self._there.tell(answer)
            elif isinstance(job, EndRound):
                self._there.tell(self._running.pop(job.place).close())
            elif isinstance(job, StartRound):
                self._running[job.place] = RunningAggregate(measures_error=False)
        self._there.connection.close()

    def _trained(self, job: TrainGroup) -> JobResult[ClientReply]:
        replies = []
        for client, held in zip(job.clients, job.held, strict=True):
            k = client.client_id
            held.digests = frozenset({f"held by {k}"})
            if k == 13:
                replies.append(ClientReply(k).failed(Failure("refused", "unlucky")))
                continue
            adapter = AdapterState(dense={"x": torch.full((2,), float(k))})
            update = ClientUpdate(k, adapter, 1.0 + k % 3)
            reply = ClientReply(k, update, figures={"loss": 0.5}, bytes_up=8)
            if self._sums:
                self._running[job.place].add(update, adapter.tensors())
                reply = replace(reply, update=None)
            replies.append(reply)
        return JobResult(replies, job.held)


Make = Callable[..., WorkerPool]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(said: list[str]) -> Iterator[Make]:
    made: list[Thread] = []

    def pool(
        children: Sequence[Thread],
        cohort: int = 2,
        work: Sequence[float] = (1.0,) * 20,
        sums: bool = False,
        spare: Sequence[Thread] = (),
        config: Any = PUBLIC,
    ) -> WorkerPool:
        made.extend((*children, *spare))
        waiting = [*children, *spare]

        def hire(place: int) -> Thread:
            if not waiting:
                raise OSError("no room")
            return waiting.pop(0)

        begin = Begin(config, cohort, "a run")
        clients = {k: ClientInfo(k) for k in range(len(work))}
        return WorkerPool(hire, len(children), begin, clients, work, sums=sums, say=said.append)  # type: ignore[arg-type]

    yield pool
    for child in made:
        child.end()


def train(pool: WorkerPool, asked: Sequence[int]) -> list[Any]:
    return list(pool.train(RoundRequest(1, list(asked), STATE)))


def updates(replies: Sequence[Any]) -> list[ClientUpdate]:
    """All updates, those of partial aggregates too."""
    found = []
    for reply in replies:
        if isinstance(reply, PartialAggregate):
            found.extend(reply.updates)
        elif reply.update is not None:
            found.append(reply.update)
    return found


def test_replies_come_in_the_order_of_the_clients(make: Make) -> None:
    replies = train(make([Thread(pause=0.02), Thread()]), range(13))
    assert [reply.client_id for reply in replies] == list(range(13))
    assert [float(update.adapter.dense["x"][0]) for update in updates(replies)] == list(range(13))


@pytest.mark.parametrize("pauses", [(0.0, 0.0), (0.03, 0.0), (0.0, 0.03)])
def test_who_trains_with_whom_is_no_matter_of_time(make: Make, pauses: tuple[float, float]) -> None:
    children = [Thread(pause) for pause in pauses]
    train(make(children, work=[1.0, 5.0, 1.0, 1.0, 2.0, 2.0, 3.0, 1.0, 1.0]), range(9))
    # Of each four the largest first, to whoever has had less so far, and two for each.
    assert [child.groups for child in children] == [[[1, 3], [5, 7]], [[0, 2], [4, 6], [8]]]


def test_a_round_begins_like_the_one_before_it(make: Make) -> None:
    children = [Thread(), Thread(), Thread()]
    pool = make(children, work=[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    train(pool, range(7))
    first = [child.groups for child in children]
    train(pool, range(7))
    assert [child.groups for child in children] == [2 * groups for groups in first]


def test_no_more_is_under_way_than_a_few_waves(make: Make) -> None:
    children = [Thread(), Thread()]
    replies = make(children, cohort=1).train(RoundRequest(1, list(range(20)), STATE))
    for taken in range(1, 7):
        next(replies)
        time.sleep(0.02)
        assert sum(map(len, (group for child in children for group in child.groups))) <= taken + 2 * AHEAD


def test_outcomes_are_those_of_one_process(make: Make) -> None:
    asked, pool = [2, 5, 11, 12, 13, 14], make([Thread(), Thread()])
    replies = train(pool, asked)
    assert [reply.client_id for reply in replies if reply.failure is None] == [2, 5, 11, 12, 14]
    (failed,) = [reply for reply in replies if reply.failure is not None]
    assert (failed.client_id, failed.failure) == (13, Failure("refused", "unlucky"))
    assert sum(reply.bytes_up for reply in replies) == 40


def test_what_a_client_holds_goes_to_whoever_trains_it_next(make: Make) -> None:
    children = [Thread(), Thread()]
    pool = make(children)
    train(pool, [3, 4])
    train(pool, [4, 5])
    held = {
        client.client_id: held.digests
        for child in children
        for job in [job for job in child.told if isinstance(job, TrainGroup)][-1:]
        for client, held in zip(job.clients, job.held, strict=True)
    }
    assert held[4] == {"held by 4"}


def test_every_process_knows_where_the_round_starts(make: Make) -> None:
    children = [Thread(), Thread()]
    train(make(children), [3, 4])
    for child in children:
        begin, start, job = child.told
        assert isinstance(begin, Begin)
        assert isinstance(start, StartRound)
        assert (begin.run, start.request.number) == ("a run", 1)
        assert torch.equal(start.request.state.adapter.dense["x"], torch.zeros(2))
        assert isinstance(job, TrainGroup)


def test_one_sum_of_each_process_weighs_what_its_clients_weigh(make: Make) -> None:
    children = [Thread(sums=True), Thread(sums=True)]
    pool = make(children, sums=True)
    for asked in (range(5), range(3, 13)):
        found = updates(train(pool, asked))
        assert len(found) == 2
        weights = [1.0 + k % 3 for k in asked]
        assert sum(update.num_examples for update in found) == sum(weights)
        mean = sum(u.num_examples * u.adapter.dense["x"] for u in found) / sum(weights)
        assert mean.tolist() == pytest.approx(
            2 * [sum(w * k for w, k in zip(weights, asked, strict=True)) / sum(weights)], rel=1e-12
        )


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_round_that_was_broken_off_leaves_nothing_to_the_next(make: Make, sums: bool, taken: int) -> None:
    pool = make([Thread(sums=sums), Thread(sums=sums)], cohort=1, sums=sums)
    broken = pool.train(RoundRequest(1, list(range(12)), STATE))
    for _ in range(taken):
        next(broken)
    broken.close()
    found = updates(train(pool, [14, 15, 16]))
    assert [update.client_id for update in found] == ([14, 15] if sums else [14, 15, 16])
    assert sum(update.num_examples for update in found) == sum(1.0 + k % 3 for k in (14, 15, 16))


def test_a_process_without_a_client_gives_no_sum(make: Make) -> None:
    (update,) = updates(train(make([Thread(sums=True), Thread(sums=True)], sums=True), [4]))
    assert (update.client_id, update.num_examples) == (4, 2.0)


def test_sums_are_kept_apart_by_layout() -> None:
    def update(client_id: int, rank: int) -> ClientUpdate:
        pair = LoraPair(torch.ones(rank, 3), torch.full((2, rank), float(client_id)), 1.0)
        return ClientUpdate(client_id, AdapterState({"m": pair}), 1.0)

    sums = RunningAggregate(measures_error=False)
    for one in (update(1, 2), update(2, 1), update(3, 2)):
        sums.add(one, one.adapter.tensors({"B"}))
    first, second = sums.close().updates
    assert (first.client_id, first.num_examples, first.adapter.pairs["m"].B.tolist()) == (1, 2.0, [[2.0, 2.0]] * 2)
    assert first.adapter.pairs["m"].A.dtype == torch.float32  # it was not sent, and is not averaged
    assert (second.client_id, second.num_examples, second.adapter.pairs["m"].B.tolist()) == (2, 1.0, [[2.0]] * 2)


def test_sums_are_kept_apart_by_what_was_not_sent() -> None:
    """One A for both would be another change of weights than either client has made."""

    def update(client_id: int, a: float) -> ClientUpdate:
        pair = LoraPair(torch.full((1, 3), a), torch.full((2, 1), float(client_id)), 1.0)
        return ClientUpdate(client_id, AdapterState({"m": pair}), 1.0)

    sums = RunningAggregate(measures_error=False)
    for one in (update(1, 1.0), update(2, 5.0), update(3, 1.0)):
        sums.add(one, one.adapter.tensors({"B"}))
    found = [(u.client_id, u.num_examples, float(u.adapter.pairs["m"].A[0, 0])) for u in sums.close().updates]
    assert found == [(1, 2.0, 1.0), (2, 1.0, 5.0)]


# ---------------------------------------------------------------------------------------------------- deaths


def same(one: Sequence[ClientUpdate], other: Sequence[ClientUpdate]) -> bool:
    return [(u.client_id, u.num_examples, u.adapter.dense["x"].tolist()) for u in one] == [
        (u.client_id, u.num_examples, u.adapter.dense["x"].tolist()) for u in other
    ]


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("lives", [0, 1, 2, 3])
@pytest.mark.parametrize("replaced", [True, False])
def test_a_process_that_dies_in_a_round_changes_nothing_of_it(
    make: Make, said: list[str], sums: bool, lives: int, replaced: bool
) -> None:
    """By a new process, or by one that stands in; in the rounds after it, too."""
    whole = make([Thread(sums=sums), Thread(sums=sums)], sums=sums)
    spare = [Thread(sums=sums)] if replaced else []
    pool = make([Thread(sums=sums), Thread(sums=sums, lives=lives)], sums=sums, spare=spare)
    for _ in range(2):
        expected, found = train(whole, range(13)), train(pool, range(13))
        assert same(updates(found), updates(expected))
        assert [type(reply) for reply in found] == [type(reply) for reply in expected]
    (line,) = said
    assert "status -9 on a host" in line
    assert ("a new one" if replaced else "another process") in line


@pytest.mark.parametrize("sums", [False, True])
def test_a_round_broken_off_while_one_process_stands_in_leaves_nothing_to_the_next(make: Make, sums: bool) -> None:
    """What the one that stands in has done for its own place waits there, and is not the next round's."""
    whole = make([Thread(sums=sums), Thread(sums=sums)], cohort=1, sums=sums)
    pool = make([Thread(sums=sums), Thread(sums=sums, lives=0)], cohort=1, sums=sums)
    broken = pool.train(RoundRequest(1, list(range(12)), STATE))
    next(broken)
    next(broken)
    broken.close()
    assert same(updates(train(pool, [14, 15, 16])), updates(train(whole, [14, 15, 16])))


def test_three_deaths_of_one_kind_end_the_run_with_the_reason_and_the_host(make: Make, said: list[str]) -> None:
    doomed = [Thread(answer=lambda _: None) for _ in range(4)]
    pool = make([Thread(), doomed[0]], cohort=1, spare=doomed[1:])
    with raises(PoolError, "worker-died", "status -9", "a host", "3rd"):
        train(pool, range(6))
    assert len(said) == 2


def test_the_last_process_that_dies_ends_the_run(make: Make) -> None:
    with raises(PoolError, "worker-died", "status -9", "no room"):
        train(make([Thread(answer=lambda _: None)]), [0])


def test_private_noise_is_not_drawn_again(make: Make) -> None:
    pool = make([Thread(), Thread(answer=lambda _: None)], cohort=1, spare=[Thread()], config=PRIVATE)
    with raises(PoolError, "worker-died", "status -9"):
        train(pool, range(6))


def test_a_process_that_cannot_go_on_says_why(make: Make) -> None:
    with raises(PoolError, "worker-failed", "no room"):
        train(make([Thread(answer=lambda _: Failed("no room"))]), [0])


def test_a_process_that_could_not_begin_says_why(make: Make) -> None:
    """It says so before it is asked anything, and is gone when it is."""
    child = Thread()
    pool = make([child])
    child.fail("no such rule")
    with raises(PoolError, "worker-failed", "no such rule"):
        train(pool, [0])


class _Unreadable:
    def __reduce__(self) -> Any:
        return _no_memory, ()


def _no_memory() -> None:
    raise MemoryError("no room for it")


def test_nobody_waits_for_an_answer_that_cannot_be_read(make: Make) -> None:
    with raises(PoolError, "worker-failed", "no room for it"):
        train(make([Thread(answer=lambda _: _Unreadable())]), [0])


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
