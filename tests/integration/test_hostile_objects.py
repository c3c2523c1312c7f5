"""Objects that no honest node pushes: whatever they are, their sender alone is refused, and memory stays bounded.

Laws: `pull_reply` returns a message or raises `ReplyError`, for any tree of objects; it holds less than twice the bytes
that the reply may have; the SuperLink is told that the reply was received, good or bad; an error of the server's own
link is blamed on no node.
"""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import httpx
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from support.errors import raises
from support.hostile_objects import Link, Pushed, Thing, bombs, everything, grid_on, mutate, thing_of
from support.nothing_lost import Witness
from support.on_a_grid import serve_on
from support.tiny_federations import MakeConfig

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientPlan
from fedlora.config import RunConfig
from fedlora.errors import ReplyError, RoundError
from fedlora.federation.protocol import TrainedReply, TrainRequest
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.arrays import to_array
from fedlora.flower.bounded_pull import Allowed, pull_reply
from fedlora.flower.messages import BUFFER, encode_note, encode_reply
from fedlora.flower.task_identity import task_identity
from fedlora.flower.update_checks import check_head, check_update
from fedlora.runs.rundir import RunDir
from fedlora.testing.loopback_grid import LoopbackGrid

TREES = 3000


def request_of(*shape: int) -> TrainRequest:
    """A request for one tensor and two small ones."""
    pair = LoraPair(torch.ones(2, 3), torch.ones(4, 2), 2.0)
    return TrainRequest(ClientPlan(AdapterState({"m": pair}, {"head": torch.zeros(shape)})), 1, 0, "base")


def answer_to(request: TrainRequest) -> Message:
    content = encode_reply(TrainedReply(request, request.starts, {"num_examples": 7, "loss": 0.5}), seed=0)
    with task_identity(1):
        question = Message(RecordDict(), 2, "train")
        question.metadata.__dict__["_message_id"] = "f" * 64
        return Message(content, reply_to=question)


def allowed(request: TrainRequest) -> Allowed:
    return Allowed(request.reply_nbytes)


def outcome(link: Any, request: TrainRequest, limit: Allowed) -> str:
    """What becomes of a reply: "valid", or the code and the words with which it is refused."""
    try:
        reply = pull_reply(grid_on(link), "f" * 64, limit, 0.01)
        assert reply is not None
        check_head(reply)
        check_update(reply.content, request)
    except ReplyError as error:
        return " ".join([error.code, *str(error).split()[:4]]) if str(error).isprintable() else "UNPRINTABLE"
    return "valid"


def test_an_honest_reply_comes_through_as_flower_would_inflate_it() -> None:
    request = request_of(1000)
    reply = answer_to(request)
    link = Link(reply, pushed := Pushed.of(thing_of(reply)))
    got = pull_reply(grid_on(link), "f" * 64, allowed(request), 1.0)
    assert got is not None
    flowers = inflate_object_from_contents(pushed.tree.object_id, dict(pushed.contents))
    assert got.object_id == flowers.object_id == reply.object_id
    assert got.metadata.message_id == pushed.tree.object_id
    assert link.confirmed == [pushed.tree.object_id]
    assert link._client.event_hooks == {"request": [], "response": []}


@pytest.mark.slow
def test_thousands_of_mutated_trees_end_in_a_refusal_and_in_bounded_memory() -> None:
    draw, request, found = random.Random(0), request_of(64), Counter[str]()
    reply, limit = answer_to(request), allowed(request)
    honest = thing_of(reply)
    for number in range(TREES):
        root = deepcopy(honest)
        said = mutate(root, draw)
        pushed = Pushed.of(root)
        link = Link(reply, pushed, missing=[draw.choice(list(pushed.contents))] if number % 50 == 0 else [])
        traced = number % 8 == 0  # which takes ten times as long
        try:
            if traced:
                tracemalloc.start()
            found[outcome(link, request, limit)] += 1
            peak = tracemalloc.get_traced_memory()[1]
        except Exception as error:
            raise AssertionError(f"tree {number} ({said}): {type(error).__name__}: {error}") from error
        finally:
            tracemalloc.stop()
        assert peak < 2 * limit.most_bytes, (number, said)
        assert link.confirmed == [pushed.tree.object_id], (number, said)
    assert "UNPRINTABLE" not in found
    assert found.pop("valid") < TREES / 4
    assert len(found) > 15, found  # many different checks are met


@pytest.mark.parametrize("bomb", bombs(8 << 20))
def test_no_reply_takes_twice_the_memory_that_it_may_have(bomb: str) -> None:
    size = 8 << 20
    request = request_of(size // 4)
    reply, limit = answer_to(request), allowed(request)
    root = thing_of(reply)
    bombs(size)[bomb](everything(root))
    link = Link(reply, Pushed.of(root))
    tracemalloc.start()
    try:
        pull_reply(grid_on(link), "f" * 64, limit, 0.01)
        said = "it came"
    except ReplyError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * limit.most_bytes
    assert link.pulled < 2 * limit.most_bytes
    assert (said == "it came") == (bomb == "as it was asked for"), said


def test_an_array_of_many_chunks_is_joined_without_being_there_twice() -> None:
    size = 24 << 20
    request = request_of(size // 4)
    reply, limit = answer_to(request), allowed(request)
    reply.content.array_records["update"][BUFFER] = to_array(random.Random(0).randbytes(request.reply_nbytes))
    link = Link(reply, Pushed.of(thing_of(reply)))
    tracemalloc.start()
    try:
        assert pull_reply(grid_on(link), "f" * 64, limit, 0.01) is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * size


@pytest.mark.parametrize("kind", ["node_unavail", "msg_unavail"])
def test_what_the_superlink_itself_says_of_a_node_comes_through(kind: str) -> None:
    question = answer_to(request_of(1)).metadata
    question.__dict__["_message_id"] = "f" * 64
    said = create_message_error_unavailable_res_message(question, kind)
    got = pull_reply(grid_on(Link(said, Pushed.of(thing_of(said)))), "f" * 64, Allowed(), 1.0)
    assert got is not None
    assert got.error == said.error
    with raises(ReplyError, "flower-error"):
        check_head(got)


def test_messages_that_nobody_asked_for_are_no_replies() -> None:
    """A node can push a message to the server that is no reply; Flower hands it over with whatever is pulled next."""
    request = request_of(64)
    reply = answer_to(request)
    link = Link(reply, Pushed.of(thing_of(reply)))
    with task_identity(1, 9):
        link.beside = [message_to_proto(Message(RecordDict(), 1, "train"))] * 3
    assert outcome(link, request, allowed(request)) == "valid"
    assert pull_reply(grid_on(link), "e" * 64, allowed(request), 0.01) is None


@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), OSError("gone"), ValueError("Invalid protobuf")])
@pytest.mark.parametrize("call", ["PullMessages", "PullObject", "ConfirmMessageReceived"])
def test_a_failure_of_the_servers_own_link_is_no_nodes_fault(error: Exception, call: str) -> None:
    request = request_of(64)
    reply = answer_to(request)
    link = Link(reply, Pushed.of(thing_of(reply)))

    def fail(_: Any) -> Any:
        raise error

    setattr(link, call, fail)
    with pytest.raises(type(error), match=str(error)):
        pull_reply(grid_on(link), "f" * 64, allowed(request), 0.01)


# ------------------------------------------------------------------------------------------------ in a run


class Patched(LoopbackGrid):
    """A grid that inflates a node's replies as Flower's do, from objects that the node may have changed.

    Args:
        config: of the run.
        node_id: of the node with a patched Flower.
        kind: of the messages that it answers so.
        change: to the objects of the reply.
    """

    def __init__(self, config: RunConfig, node_id: int, kind: str, change: Callable[[Thing], object]) -> None:
        nodes = [{"partition-id": k} for k in range(4)]
        super().__init__(client_app.app, nodes, {"toml": config.to_toml()})
        self._node_id, self._kind, self._change = node_id, kind, change

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._through_flower(reply) for reply in super().pull_messages(message_ids)]

    def _through_flower(self, reply: Message) -> Message:
        if (reply.metadata.src_node_id, reply.metadata.message_type) != (self._node_id, self._kind):
            return reply
        root = thing_of(reply)
        for thing in everything(root):
            self._change(thing)
        pushed = Pushed.of(root)
        message = inflate_object_from_contents(pushed.tree.object_id, dict(pushed.contents))
        assert isinstance(message, Message)
        return message


def run(config: RunConfig, grid: LoopbackGrid) -> tuple[RunOutcome, list[str]]:
    said = Witness(RunDir.create(config, overwrite=True))
    return serve_on(grid, config, said, rundir=said.rundir), said.lines


def body_of(kind: str, body: bytes) -> Callable[[Thing], object]:
    """A change of the bodies of all objects of a type."""
    return lambda thing: setattr(thing, "body", body) if thing.kind == kind else None


BROKEN = {
    "Message": b"\xff",
    "RecordDict": b"null",
    "ArrayRecord": b"[]",
    "Array": b"[" * 100_000,
    "ConfigRecord": b"\x0a\xff",
    "MetricRecord": b"\xff\xff\xff",
    "ArrayChunk": b"",
}


@pytest.mark.slow
def test_a_node_whose_replies_cannot_be_inflated_is_named_and_the_rounds_go_on(tiny_config: MakeConfig) -> None:
    kinds = iter(BROKEN.items())

    class Each(Patched):
        def _through_flower(self, reply: Message) -> Message:
            if (reply.metadata.src_node_id, reply.metadata.message_type) == (self._node_id, self._kind):
                self._change = body_of(*next(kinds))  # another one in each round
            return super()._through_flower(reply)

    config = tiny_config(f"rounds={len(BROKEN)}", "train.steps=1")
    outcome, _ = run(config, Each(config, 3, "train", lambda thing: None))
    for record in outcome.records[1:]:
        assert record["answered"] == [0, 2, 3]
        assert list(record["refused"]) == ["1"]
        assert record["refused"]["1"].isprintable()


def test_a_node_whose_hello_cannot_be_inflated_is_turned_away(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "server.node_timeout_s=0.02")
    outcome, lines = run(config, Patched(config, 3, "query.hello", body_of("ConfigRecord", b"\xff")))
    assert outcome.records[1]["answered"] == [0, 2, 3]
    assert outcome.records[1]["turned_away"].keys() == {"3"}
    assert any(line.startswith("refused node 3: its reply cannot be read") for line in lines)


def test_below_the_quorum_the_round_fails_in_words(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1", "server.quorum=1.0")
    with raises(RoundError, "no-quorum", "client 1: its reply cannot be read"):
        run(config, Patched(config, 3, "train", body_of("RecordDict", b"null")))


def test_an_error_of_the_grid_ends_the_run_as_what_it_is(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1")

    class Broken(Patched):
        def _through_flower(self, reply: Message) -> Message:
            raise ValueError("the grid is broken")

    with pytest.raises(ValueError, match="the grid is broken"):
        run(config, Broken(config, 3, "train", lambda thing: None))


def test_what_a_client_tells_of_an_error_fits_into_what_it_may_send() -> None:
    note = encode_note("error", error="\U0001f600" * 100_000)
    reply = answer_to(request_of(1))
    reply.content = note
    link = Link(reply, Pushed.of(thing_of(reply)))
    got = pull_reply(grid_on(link), "f" * 64, Allowed(), 1.0)
    assert got is not None
    assert isinstance(got.content["reply"], ConfigRecord)
    with raises(ReplyError, "client-error", "\U0001f600"):
        check_head(got)
