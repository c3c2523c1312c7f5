"""Nodes that come late, leave, come back, lose their message, and rounds that too few of them answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from support.errors import raises
from support.nothing_lost import Witness
from support.on_a_grid import serve_on
from support.tiny_federations import MakeConfig

from fedlora.config import RunConfig
from fedlora.errors import RoundError
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower import mailbox as post
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.workspace import open_workspace

Config = dict[str, bool | float | int | str]


@pytest.fixture(autouse=True)
def quick_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "SOONEST_S", 0.002)


class Story(Witness):
    """Does something to the grid when a round begins, hears what is said, and sees that nothing is lost."""

    def __init__(self, rundir: RunDir, grid: Moving, chapters: dict[int, Callable[[Moving], None]]) -> None:
        super().__init__(rundir)
        self.grid, self.chapters, self.lines = grid, chapters, []  # type: ignore[var-annotated]

    def round_ended(self, record: Any) -> None:
        super().round_ended(record)
        if record["round"] + 1 in self.chapters:
            self.chapters[record["round"] + 1](self.grid)

    def round_started(self, number: int, asked: Sequence[int]) -> None:
        super().round_started(number, asked)
        self.grid.round = number

    def message(self, text: str) -> None:
        self.lines.append(text)


class Moving(LoopbackGrid):
    """A grid whose nodes come and go; node 2 + k is client k at the start."""

    def __init__(self, config: RunConfig, there: Iterable[int] = range(4)) -> None:
        everybody = range(len(open_workspace(config).data.clients))
        super().__init__(client_app.app, [{"partition-id": k} for k in everybody], {"toml": config.to_toml()})
        self.there = [k + 2 for k in there]
        self.lost: set[str] = set()
        self.silent: set[int] = set()
        self.kinds: list[tuple[str, int]] = []
        self.round = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.there)

    def add(self, node_id: int, node_config: Config) -> None:
        from flwr.app import Context, RecordDict
        from flwr.app.user_config import UserConfig

        known = next(iter(self._contexts.values()))
        config = UserConfig(known.run_config)
        self._contexts[node_id] = Context(1, node_id, UserConfig(node_config), RecordDict(), config)
        self.there.append(node_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        (message_id,) = super().push_messages([message])
        self.kinds.append((message.metadata.message_type, message.metadata.dst_node_id))
        if message.metadata.dst_node_id in self.silent and message.metadata.message_type == "train":
            self.lost.add(message_id)
        return [message_id]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        message = self._waiting.get(message_id)
        if message is not None and message.metadata.dst_node_id not in self.there:
            return [Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node unavailable"), reply_to=message)]
        return [] if message_id in self.lost else super().pull_messages([message_id])


def tell(config: RunConfig, grid: Moving, **chapters: Callable[[Moving], None]) -> tuple[RunOutcome, list[str]]:
    rundir = RunDir.create(config, overwrite=True)
    story = Story(rundir, grid, {int(name[1:]): does for name, does in chapters.items()})
    outcome = serve_on(grid, config, story, rundir=rundir)
    assert story.rounds == list(range(config.rounds + 1))
    return outcome, story.lines


def answered(outcome: RunOutcome) -> list[list[int]]:
    return [record["answered"] for record in outcome.records[1:]]


def same(left: RunOutcome, right: RunOutcome) -> bool:
    weights = "adapter_model.safetensors"
    return (left.rundir.adapter_dir / weights).read_bytes() == (right.rundir.adapter_dir / weights).read_bytes()


# ------------------------------------------------------------------------------------------------ coming and going


def test_a_node_that_comes_late_takes_part_from_the_next_round(tiny_config: MakeConfig) -> None:
    config = tiny_config("server.node_timeout_s=0.02")
    outcome, lines = tell(config, Moving(config, there=(0, 1, 2)), r3=lambda grid: grid.there.append(5))
    assert answered(outcome) == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert "only 3 of 4 clients are there; the run goes on without the others: client 3" in lines
    assert "client 3 takes part from round 3 on" in lines


def test_a_node_that_left_is_asked_again_when_it_is_back_under_its_id(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    grid = Moving(config)
    outcome, lines = tell(config, grid, r2=lambda g: g.there.remove(3), r3=lambda g: g.there.append(3))
    told = [line for line in lines if line.startswith("client 1 is ")]
    assert [line.partition(":")[0] for line in told] == ["client 1 is registered and away", "client 1 is back"]
    assert answered(outcome) == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert outcome.records[2]["refused"] == {"1": "its node is not there"}
    assert grid.kinds.count(("query.hello", 3)) == 1
    assert grid.kinds.count(("train", 3)) == 2  # nothing is sent to who is not there


@pytest.mark.slow
def test_a_client_that_is_back_under_a_new_id_replaces_its_old_one(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=4")

    def restart(grid: Moving) -> None:
        grid.add(99, {"partition-id": 1})  # the grid has not missed the old one yet

    def miss(grid: Moving) -> None:
        grid.there.remove(3)

    outcome, lines = tell(config, Moving(config), r2=restart, r3=miss)
    assert lines.count("refused node 99: client 1 is there already") == 1
    assert answered(outcome) == [[0, 1, 2, 3]] * 4
    assert "client 1 takes part from round 3 on" in lines


def test_a_refused_node_that_was_put_right_is_let_in(tiny_config: MakeConfig) -> None:
    config = tiny_config("server.node_timeout_s=0.02", "rounds=2")
    grid = Moving(config, there=(0, 1, 2))
    grid.add(50, {"partition-id": 7})

    def cure(grid: Moving) -> None:
        grid._contexts[50].node_config["partition-id"] = 3

    outcome, lines = tell(config, grid, r2=cure)
    (why,) = [line for line in lines if line.startswith("refused node 50: ")]
    assert outcome.records[1]["turned_away"] == {"50": why.removeprefix("refused node 50: ")}
    assert "client 7" in why
    assert "turned_away" not in outcome.records[2]
    assert answered(outcome) == [[0, 1, 2], [0, 1, 2, 3]]


def test_a_late_node_whose_rank_the_rule_refuses_does_not_end_the_run(tiny_config: MakeConfig) -> None:
    config = tiny_config("server.node_timeout_s=0.02", "rounds=2")
    outcome, lines = tell(
        config, Moving(config, there=(0, 1, 2)), r2=lambda g: g.add(50, {"partition-id": 3, "rank": 2})
    )
    assert answered(outcome) == [[0, 1, 2]] * 2
    assert any(line.startswith("refused node 50: ") and "rank" in line for line in lines)


def test_a_node_that_asks_for_a_rank_trains_at_it(tiny_config: MakeConfig) -> None:
    config = tiny_config("strategy.name=flora", "rounds=1", "runtime.cohort=1")
    grid = Moving(config)
    grid._contexts[3].node_config["rank"] = 2
    outcome, _ = tell(config, grid)
    ranked = tiny_config(
        "strategy.name=flora", "rounds=1", "runtime.cohort=1", "clients.ranks=[4,2,4,4]", name="ranked"
    )
    assert same(outcome, run_simulation(ranked, RunDir.create(ranked)))


def test_nobody_waits_for_a_node_that_starts_no_app(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "server.node_timeout_s=0.05")  # and a deadline of an hour
    grid = Moving(config)
    hello = grid.push_messages

    def deaf(messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        (message_id,) = hello([message])
        if message.metadata.dst_node_id == 5:
            grid.lost.add(message_id)
        return [message_id]

    grid.push_messages = deaf  # type: ignore[method-assign]
    outcome, _ = tell(config, grid)
    assert answered(outcome) == [[0, 1, 2]]


# ------------------------------------------------------------------------------------------------ lost messages


def test_a_message_that_its_node_lost_does_not_hold_up_the_round(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=2", "server.node_timeout_s=0.02")  # and a deadline of an hour
    grid = Moving(config)
    grid.silent.add(3)
    outcome, lines = tell(config, grid, r2=lambda g: g.silent.clear())
    first, second = outcome.records[1:]
    assert first["answered"] == [0, 2, 3]
    assert "its node no longer has the message" in first["refused"]["1"]
    assert second["answered"] == [0, 1, 2, 3]
    assert grid.kinds.count(("train", 3)) == post.TRIES + 1
    assert grid.kinds.count(("query.hello", 3)) == 1 + post.TRIES
    assert sum("client 1 is asked again" in line for line in lines) == post.TRIES - 1


def test_a_slow_node_is_not_taken_for_one_that_lost_its_message(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "server.node_timeout_s=0.001")

    class Slow(Moving):
        """Answers in the order in which it was asked, as SuperNodes do, and training at the twentieth look only."""

        looks = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            (message_id,) = message_ids
            message = self._waiting.get(message_id)
            if message is not None and message.metadata.dst_node_id == 3 and self.round:
                self.looks += message.metadata.message_type == "train"
                if self.looks < 20 or (message.metadata.message_type != "train" and self.pending(3)):
                    return []
            return super().pull_messages([message_id])

        def pending(self, node_id: int) -> bool:
            sent = [m.metadata for m in self._waiting.values()]
            return any(m.message_type == "train" and m.dst_node_id == node_id for m in sent)

    outcome, _ = tell(config, Slow(config))
    assert answered(outcome) == [[0, 1, 2, 3]]


@pytest.mark.slow
def test_a_late_reply_is_dropped(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays where it is: the next round's result is that of a run in which it never came."""
    monkeypatch.setattr(post, "SOONEST_S", 600.0)  # a node that is asked by then would say that it lost its message
    late, never = tiny_config("rounds=2", "server.deadline_s=0.3"), tiny_config("rounds=2", name="never")
    grid = Moving(late)
    grid.silent.add(3)

    def comes(grid: Moving) -> None:
        grid.silent.clear()
        grid.lost.clear()  # from now on the first round's reply is there to be pulled

    outcome, _ = tell(late, grid, r2=comes)
    assert outcome.records[1]["missing"] == [1]
    replayed = run_simulation(never, RunDir.create(never), replay=outcome.records)
    assert answered(outcome) == [[0, 2, 3], [0, 1, 2, 3]]
    assert same(outcome, replayed)


# ------------------------------------------------------------------------------------------------ the quorum


def leave(*nodes: int) -> Callable[[Moving], None]:
    return lambda grid: [grid.there.remove(node) for node in nodes] and None


def back(*nodes: int) -> Callable[[Moving], None]:
    return lambda grid: grid.there.extend(nodes)


def test_a_round_without_quorum_changes_nothing_and_the_next_one_tries_again(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=3", "server.node_timeout_s=0.02", "server.quorum=0.75")
    outcome, lines = tell(config, Moving(config), r2=leave(2, 3), r3=back(2, 3))
    first, second, third = outcome.records[1:]
    assert (first.get("lost"), second.get("lost"), third.get("lost")) == (None, True, None)
    assert second["accuracy"] == first["accuracy"]
    assert second["refused"] == {"0": "its node is not there", "1": "its node is not there"}
    assert third["answered"] == [0, 1, 2, 3]
    assert "round 2: 2 nodes are there, the quorum is 3; waiting up to 0.02 s" in lines
    assert any("2 of 4 clients answered, the quorum is 3" in line and "going on with round 3" in line for line in lines)
    assert outcome.state.round == 3


@pytest.mark.slow
def test_a_lost_round_is_like_a_round_of_nobody_for_the_adapter(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=3", "server.node_timeout_s=0.02", "server.quorum=0.75")
    outcome, _ = tell(config, Moving(config), r2=leave(2, 3), r3=back(2, 3))
    again = tiny_config("rounds=3", "server.quorum=0.75", name="again")
    assert same(outcome, run_simulation(again, RunDir.create(again), replay=outcome.records))


def test_too_many_lost_rounds_end_the_run_with_everything_written(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=9", "server.node_timeout_s=0.01", "server.max_failed_rounds=2")
    with raises(RoundError, "no-quorum", "round 4: 0 of 4", "the quorum is 2", "client 0: its node is not there"):
        tell(config, Moving(config), r2=leave(2, 3, 4, 5))
    lines = RunDir.open(f"{config.output}/tiny").read_metrics()
    assert [bool(record.get("lost")) for record in lines] == [False, False, True, True, True]


@pytest.mark.slow
def test_after_too_many_lost_rounds_a_resume_goes_on_where_it_stopped(tiny_config: MakeConfig) -> None:
    settings = ("rounds=4", "server.node_timeout_s=0.01", "server.max_failed_rounds=0", "runtime.cohort=1")
    config, whole = tiny_config(*settings), tiny_config(*settings, name="whole")
    grid = Moving(config)
    with raises(RoundError, "no-quorum", "round 3", "fedlora run --resume"):
        tell(config, grid, r3=leave(2, 3, 4, 5))
    path = RunDir.open(f"{config.output}/tiny").path
    lines = RunDir.open(path).read_metrics()
    assert [record["round"] for record in lines] == [0, 1, 2, 3]
    assert set(lines[-1]["refused"]) == {"0", "1", "2", "3"}
    resumed = run_simulation(config, RunDir.open(path), resume=True)
    assert answered(resumed) == [[0, 1, 2, 3]] * 4
    assert same(resumed, run_simulation(whole, RunDir.create(whole)))


def test_a_last_round_without_quorum_is_no_end(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=2", "server.node_timeout_s=0.01")
    with raises(RoundError, "no-quorum", "round 2: 0 of 4"):
        tell(config, Moving(config), r2=leave(2, 3, 4, 5))
    assert not RunDir.open(f"{config.output}/tiny").finished


def test_that_no_node_is_there_is_said_at_once(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=2", "server.node_timeout_s=0.05")
    grid = Moving(config)
    story = Story(RunDir.create(config), grid, {2: leave(2, 3, 4, 5)})
    with raises(RoundError, "no-quorum"):
        serve_on(grid, config, story, rundir=story.rundir)
    assert story.lines[-1] == "round 2: no node is there, the quorum is 2; waiting up to 0.05 s"


def test_a_round_waits_for_its_quorum_and_no_longer(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=2", "server.node_timeout_s=600")

    class Returns(Moving):
        looks = 0

        def get_node_ids(self) -> Iterable[int]:
            self.looks += not self.there
            if self.looks == 5:
                self.there = [2, 3]
            return super().get_node_ids()

    outcome, _ = tell(config, Returns(config), r2=leave(2, 3, 4, 5))
    assert answered(outcome) == [[0, 1, 2, 3], [0, 1]]
