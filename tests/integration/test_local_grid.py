"""The in-process grid behaves as Flower's grids do."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.flower.task_identity import task_identity
from fedlora.testing.loopback_grid import LoopbackGrid

app = ClientApp()


@app.train()
def _train(message: Message, context: Context) -> Message:
    asked = message.content.config_records["q"]
    if asked["x"] == 13:
        raise ValueError("unlucky")
    asked["x"] = -1  # a client may do as it likes with its own copy
    seen = int(context.state.config_records.get("seen", ConfigRecord({"n": 0}))["n"]) + 1
    context.state["seen"] = ConfigRecord({"n": seen})
    return Message(
        RecordDict({"a": ConfigRecord({"node": context.node_config["partition-id"], "seen": seen})}), reply_to=message
    )


@pytest.fixture
def grid() -> LoopbackGrid:
    return LoopbackGrid(app, [{"partition-id": k} for k in range(3)], {"k": 1})


def ask(grid: LoopbackGrid, node: int, x: int = 0) -> tuple[Message, list[Message]]:
    with task_identity(1):
        message = Message(RecordDict({"q": ConfigRecord({"x": x})}), node, "train")
        return message, list(grid.pull_messages(grid.push_messages([message])))


def test_each_node_answers_for_itself_and_keeps_its_state(grid: LoopbackGrid) -> None:
    nodes = list(grid.get_node_ids())
    for turn in (1, 2):
        for number, node in enumerate(nodes):
            message, (reply,) = ask(grid, node)
            assert dict(reply.content.config_records["a"]) == {"node": number, "seen": turn}
            assert reply.metadata.reply_to_message_id == message.metadata.message_id
            assert message.content.config_records["q"]["x"] == 0


def test_an_exception_becomes_an_error_reply(grid: LoopbackGrid) -> None:
    _, (reply,) = ask(grid, 2, x=13)
    assert reply.has_error()
    assert "ValueError: unlucky" in str(reply.error.reason)


def test_an_unknown_node_is_unavailable(grid: LoopbackGrid) -> None:
    _, (reply,) = ask(grid, 99)
    assert reply.has_error()


def test_a_reply_is_handed_out_once(grid: LoopbackGrid) -> None:
    with task_identity(1):
        ids = list(grid.push_messages([Message(RecordDict({"q": ConfigRecord({"x": 0})}), 2, "train")]))
        assert len(list(grid.pull_messages(ids))) == 1
        assert list(grid.pull_messages(ids)) == []


def test_the_task_identity_is_given_back() -> None:
    from flwr.supercore.task_identity import TaskIdentity

    with task_identity(5, 6):
        with task_identity(7, 8):
            assert TaskIdentity.run_id == 7
        assert (TaskIdentity.run_id, TaskIdentity.node_id) == (5, 6)
    assert TaskIdentity._run_id is None
