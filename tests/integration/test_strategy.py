"""The server's loop on grids that lose, delay, double and misdeliver, and on runs that stop and go on."""

from __future__ import annotations

import gc
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from support.errors import raises
from support.federations import deploy
from support.interrupted import cut
from support.nothing_lost import Witness
from support.states import same_adapter
from support.tiny_federations import MakeConfig

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import BaseUpdate, ClientPlan, GlobalState
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import ReplyError, RoundError, RunDirError
from fedlora.federation.protocol import PartDigests, TrainRequest
from fedlora.federation.round_record import quorum_of
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.messages import HeldParts, RequestEncoder, decode_request, decode_request_head
from fedlora.flower.server_app import serve
from fedlora.flower.task_identity import task_identity
from fedlora.hashing import tensors_digest
from fedlora.model.base_history import can_follow, digest_of, next_digest
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.workspace import open_workspace
from fedlora.wire_formats import layout_json


class Heard(Witness):
    """What a run says; sees that nothing of it is lost."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(RunDir.create(config, overwrite=True))
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class Troubled(LoopbackGrid):
    """A grid on which all messages are under way at once, as on a real one; subclasses make the trouble."""

    def __init__(self, config: RunConfig) -> None:
        nodes = [{"partition-id": k} for k in range(len(open_workspace(config).data.clients))]
        super().__init__(client_app.app, nodes, {"toml": config.to_toml()})
        self.polls: Counter[str] = Counter()
        self.to: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self.to |= dict(zip(ids, messages, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        self.polls[message_id] += 1
        return self.trouble(message_id, self.to[message_id].metadata.message_type, self.to[message_id])

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        return self.really(message_id)

    def really(self, message_id: str) -> list[Message]:
        return list(super().pull_messages([message_id]))

    def client(self, message: Message) -> int:
        return message.metadata.dst_node_id - 2


def federate(config: RunConfig, grid: LoopbackGrid | None = None, heard: Heard | None = None) -> RunOutcome:
    heard = heard or Heard(config)
    with task_identity(1):
        outcome = serve(grid or Troubled(config), config, heard.rundir, heard, resume=False)
    assert heard.rounds == list(range(config.rounds + 1))
    return outcome


# ------------------------------------------------------------------------------------------------ grids


class Late(Troubled):
    """Each reply is there at its third look only; the first client's at the tenth."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        return self.really(message_id) if self.polls[message_id] >= (3 if self.client(message) else 10) else []


class Twice(Troubled):
    """Each reply comes twice."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        return self.really(message_id) * 2


class Misdelivers(Troubled):
    """At the first look, somebody else's reply is there instead, and his own at the next."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        if self.polls[message_id] == 1:
            return [reply for reply in self.held if reply.metadata.reply_to_message_id != message_id]
        self.held = self.really(message_id)
        return self.held

    held: list[Message] = []  # noqa: RUF012


class EmptyAtFirst(Troubled):
    """Nodes come one by one."""

    looks = 0

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return list(super().get_node_ids())[: max(0, self.looks - 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid", [Late, Twice, *(pytest.param(one, marks=pytest.mark.slow) for one in (Misdelivers, EmptyAtFirst))]
)
def test_how_replies_arrive_changes_no_bit(tiny_config: MakeConfig, grid: type[Troubled]) -> None:
    config = tiny_config("rounds=2", "runtime.cohort=1")
    plain = run_simulation(config, RunDir.create(config), Callback())
    troubled = federate(tiny_config("rounds=2", "runtime.cohort=1", name="troubled"), grid(config))
    assert same_adapter(plain.adapter, troubled.adapter)
    assert [r["answered"] for r in troubled.records[1:]] == [[0, 1, 2, 3]] * 2


class NeverAnswers(Troubled):
    """Client 0, whose reply is waited for first, never answers in training."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        return [] if kind == "train" and self.client(message) == 0 else self.really(message_id)


@pytest.mark.slow
def test_a_round_goes_on_at_its_deadline_with_all_that_is_there(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=2", "server.deadline_s=0.05")
    for record in federate(config, NeverAnswers(config)).records[1:]:
        assert record["missing"] == [0]
        assert record["answered"] == [1, 2, 3]
        assert record["refused"] == {}


@pytest.mark.slow
def test_a_missing_client_counts_against_the_quorum(tiny_config: MakeConfig) -> None:
    config = tiny_config("server.deadline_s=0.05", "server.quorum=0.76")
    with raises(RoundError, "no-quorum", "3 of 4", "the quorum is 4", "client 0", "0.05 s"):
        federate(config, NeverAnswers(config))


class Leaves(Troubled):
    """From round 2 on the node of client 3 is gone; Flower says so in its own name (source node 1)."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        if self.client(message) != 3 or message.metadata.group_id in ("", "1"):
            return self.really(message_id)
        reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node unavailable"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return [reply]


@pytest.mark.slow
def test_a_node_that_leaves_is_named_and_the_rounds_go_on(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    _, first, *others = federate(config, Leaves(config)).records
    assert first["answered"] == [0, 1, 2, 3]
    for record in others:
        assert record["answered"] == [0, 1, 2]
        assert "Node unavailable" in record["refused"]["3"]


class RefusesPush(Troubled):
    """The grid takes no message of training to client 1: `None` for an id, or no id at all."""

    nothing: list[Any] = [None]  # noqa: RUF012

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        refused = message.metadata.message_type == "train" and self.client(message) == 1
        return self.nothing if refused else super().push_messages([message])


@pytest.mark.parametrize("nothing", [[None], []])
def test_a_message_that_the_grid_does_not_take_costs_one_client(tiny_config: MakeConfig, nothing: list[Any]) -> None:
    config = tiny_config("rounds=1")
    grid = RefusesPush(config)
    grid.nothing = nothing
    record = federate(config, grid).records[1]
    assert record["answered"] == [0, 2, 3]
    assert "did not take its message" in record["refused"]["1"]


class Silent(Troubled):
    """Nobody answers anything but client 2's hello."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        return self.really(message_id) if self.client(message) == 2 else []


def test_nodes_that_say_nothing_at_the_start_are_left_out_and_named(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "server.deadline_s=0.05")
    heard = Heard(config)
    assert federate(config, Silent(config), heard).records[1]["answered"] == [2]
    assert "refused node 2: it did not answer" in heard.lines
    assert heard.lines[-1].startswith("only 1 of 4 clients are there")


def test_no_node_at_all_says_what_to_do(tiny_config: MakeConfig) -> None:
    config = tiny_config("server.node_timeout_s=0.01")

    class Nobody(Troubled):
        def get_node_ids(self) -> Iterable[int]:
            return []

    with raises(RoundError, "no-node", "0.01 s", "server.node_timeout_s"):
        federate(config, Nobody(config))


class Boasts(Troubled):
    """Client 0 claims more examples than there can be."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        replies = self.really(message_id)
        if kind == "train" and self.client(message) == 0:
            replies[0].content.metric_records["metrics"]["num_examples"] = 10**18
        return replies


def test_bytes_of_refused_replies_are_bytes(tiny_config: MakeConfig) -> None:
    whole = federate(tiny_config("rounds=1")).records[1]
    config = tiny_config("rounds=1", name="boasts")
    record = federate(config, Boasts(config)).records[1]
    assert "server.max_examples" in record["refused"]["0"]
    assert record["bytes_up"] == whole["bytes_up"]


@pytest.mark.parametrize(
    ("asked", "share", "needed"), [(100, 0.07, 7), (100, 0.55, 55), (4, 0.5, 2), (5, 0.5, 3), (1, 0.01, 1), (3, 1.0, 3)]
)
def test_the_quorum_is_the_share_rounded_up(asked: int, share: float, needed: int) -> None:
    assert quorum_of(asked, share) == needed


# ------------------------------------------------------------------------------------------------ frozen parts, ranks


def ffa_plan(rank: int) -> ClientPlan:
    A, B = torch.arange(20.0).reshape(4, 5), torch.ones(3, 4)
    pair = LoraPair(A[:rank], B[:, :rank] * 1.0, 1.0)
    return ClientPlan(AdapterState({"m": pair}), trains=frozenset(("B",)), sends=frozenset(("B",)))


def planned(plan: ClientPlan, client_id: int = 0) -> TrainRequest:
    return TrainRequest(plan, 1, client_id, digests=PartDigests()(plan))


def test_digests_follow_the_rank_of_each_plan() -> None:
    digests = PartDigests()
    known = {rank: tensors_digest({"m:A": ffa_plan(rank).adapter.pairs["m"].A}) for rank in (1, 2, 3, 4)}
    draw = random.Random(0)
    for _ in range(200):  # each plan's tensors are freed, so that the next one's may lie at the same address
        rank = draw.randint(1, 4)
        assert digests(ffa_plan(rank))["A"] == known[rank]


def test_the_encoder_holds_no_more_than_the_plans_under_way() -> None:
    encoder = RequestEncoder()
    for number in range(50):
        encoder.encode(planned(ffa_plan(2), number))
    gc.collect()
    assert len(encoder._arrays) <= 4


@pytest.mark.slow
def test_ffa_with_mixed_ranks_sends_each_client_its_a_once(tiny_config: MakeConfig) -> None:
    settings = ("strategy.name=ffa", "clients.ranks=[4,2,1,3]", "rounds=4", "runtime.cohort=1")
    config = tiny_config(*settings)
    outcome = run_simulation(config, RunDir.create(config), Callback())

    class Forgets(Callback):
        def round_started(self, number: int, asked: object) -> None:
            client_app.held_parts = HeldParts()

    again = deploy(tiny_config(*settings, name="forgetful"), Forgets())
    assert same_adapter(outcome.adapter, again.adapter)
    assert again.records[2]["bytes_down"] > outcome.records[2]["bytes_down"]
    first, *others = [record["bytes_down"] for record in outcome.records[1:]]
    frozen = outcome.state.adapter.nbytes(("A",)) * (4 + 2 + 1 + 3) // 4
    layout = json.dumps(layout_json(outcome.state.adapter.tensors(("A",))))[1:-1]  # of one digit for any of the ranks
    assert [first - other for other in others] == [frozen + 4 * len(f"{layout}, ")] * 3
    assert all(not record["refused"] for record in (*outcome.records[1:], *again.records[1:]))


def test_a_client_refuses_parts_of_another_hash() -> None:
    content = RequestEncoder().encode(planned(ffa_plan(2)))
    head, held = decode_request_head(content), HeldParts()
    with raises(ReplyError, "parts-differ"):
        decode_request(content, {**head, "digests": head["digests"] | {"A": "0" * 64}}, held)
    assert held.get("0" * 64) is None
    assert decode_request(content, head, held) is not None


class Swaps(Troubled):
    """A node that was client 0 at the start is client 1 afterwards."""

    def trouble(self, message_id: str, kind: str, message: Message) -> Iterable[Message]:
        if kind == "train" and self.client(message) == 0:
            self._contexts[2].node_config["partition-id"] = 1
        return self.really(message_id)


def test_a_node_that_changed_its_number_does_not_train_under_the_old_one(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1")
    record = federate(config, Swaps(config)).records[1]
    assert record["answered"] == [1, 2, 3]
    assert "the plan is for client 0, and this node is client 1" in record["refused"]["0"]


# ------------------------------------------------------------------------------------------------ versions of the base


def base_update(since: int, version: int, value: float = 1.0) -> BaseUpdate:
    return BaseUpdate(since, version, AdapterState({"m": LoraPair(torch.ones(1, 2) * value, torch.ones(2, 1), 1.0)}))


def test_a_digest_moves_with_every_change_and_with_nothing_else() -> None:
    adapter = AdapterState({"m": base_update(0, 1).change.pairs["m"]})
    old = GlobalState(adapter, base_updates=(base_update(0, 1), base_update(1, 2)))
    grown = GlobalState(adapter, base_updates=(*old.base_updates, base_update(2, 3)))
    compacted = GlobalState(adapter, base_updates=(base_update(0, 2, 2.0), base_update(2, 3)))
    folded = GlobalState(adapter, base_updates=(base_update(0, 3, 3.0),))
    assert next_digest("d", old, GlobalState(adapter, base_updates=(base_update(0, 2, 2.0),))) == "d"
    assert next_digest("d", old, grown) == next_digest("d", old, compacted) != "d"
    assert next_digest("d", old, folded) != "d"


def test_a_base_that_somebody_else_changed_is_not_taken_for_a_known_one(tiny_config: MakeConfig) -> None:
    base = open_workspace(tiny_config()).base
    name = base.targets[0]
    shape = base.layout()[name]
    pair = LoraPair(torch.ones(1, shape.d_in), torch.ones(shape.d_out, 1), 1.0)
    base.rebase(0, ())
    assert digest_of(base) == ""
    base.rebase(7, (BaseUpdate(0, 7, AdapterState({name: pair})),))
    try:
        assert digest_of(base) != ""
        assert not can_follow(base, "target", "since")
    finally:
        base.rebase(0, ())


# ------------------------------------------------------------------------------------------------ stop and go on


def test_a_run_that_stopped_in_its_first_round_has_one_line_for_round_0(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1")
    rundir = RunDir.create(config)
    cut(rundir, 1)
    resumed = run_simulation(config, RunDir.open(rundir.path), Callback(), resume=True)
    assert [record["round"] for record in resumed.records] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("finished", "rule"),
    [
        (True, "flora"),
        (False, "fedavg"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, "fedavg"), (False, "flora")]),
    ],
)
def test_a_run_that_goes_on_to_more_rounds_ends_as_one_that_had_them(
    tiny_config: MakeConfig, rule: str, finished: bool
) -> None:
    settings = (f"strategy.name={rule}", "server.fraction=0.5")
    whole = tiny_config(*settings, "rounds=4", name="whole")
    expected = run_simulation(whole, RunDir.create(whole), Callback())
    few, more = (tiny_config(*settings, f"rounds={rounds}", name="more") for rounds in (2, 4))
    rundir = RunDir.create(few)
    if finished:
        run_simulation(few, rundir, Callback())
    else:
        cut(rundir, 2)
    outcome = run_simulation(more, RunDir.open(rundir.path), Callback(), resume=True)
    assert same_adapter(outcome.adapter, expected.adapter)
    assert [record["round"] for record in outcome.records] == [0, 1, 2, 3, 4]
    assert RunDir.open(rundir.path).config == more
    assert RunDir.open(rundir.path).finished
    with raises(RunDirError, "rounds-already-done", 4):
        run_simulation(few, RunDir.open(rundir.path), Callback(), resume=True)
    assert RunDir.open(rundir.path).finished  # and nothing was undone


def test_resuming_with_another_config_is_refused_in_python_too(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config("rounds=1")
    rundir = RunDir.create(config)
    run_simulation(config, rundir, Callback())
    with raises(RunDirError, "config-differs", "adapter.rank", 4, 2):
        run_simulation(tiny_config("rounds=2", "adapter.rank=2"), rundir, Callback(), resume=True)
