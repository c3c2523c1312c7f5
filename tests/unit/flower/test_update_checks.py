"""Each hostile or broken reply is refused by the check that it is meant for, and the valid one passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientPlan
from fedlora.errors import ReplyError
from fedlora.federation.protocol import TrainedReply, TrainRequest
from fedlora.flower.arrays import to_array
from fedlora.flower.messages import BUFFER, encode_note, encode_reply
from fedlora.flower.task_identity import task_identity
from fedlora.flower.update_checks import check_head, check_update
from fedlora.wire_formats import WIRES, encode_change

PLAN = ClientPlan(AdapterState({"m": LoraPair(torch.ones(4, 8), torch.ones(6, 4), 2.0)}, {"head": torch.zeros(2)}))
REQUEST = TrainRequest(PLAN, 5, 1, "base")


def good() -> RecordDict:
    return encode_reply(TrainedReply(REQUEST, PLAN.adapter.tensors(), {"num_examples": 7, "loss": 0.5}), seed=0)


def arrays(content: RecordDict) -> ArrayRecord:
    return content.array_records["update"]


def put(array: Array, name: str = BUFFER) -> Callable[[RecordDict], None]:
    return lambda content: arrays(content).update({name: array})


def head(**fields: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        before = json.loads(str(content.config_records["reply"]["json"]))
        content.config_records["reply"] = ConfigRecord({"json": json.dumps({**before, **fields})})

    return change


NBYTES = 4 * (4 * 8 + 6 * 4 + 2)


def laid_out(**dense: torch.Tensor) -> Callable[[RecordDict], None]:
    """As a client that understood other tensors than were asked for."""
    return head(layout=TrainRequest(ClientPlan(AdapterState({}, dense)), 5, 1, "base").layout_digest)


BROKEN: dict[str, tuple[Callable[[RecordDict], Any], str, str]] = {
    "npz": (put(Array(np.zeros(58, np.float32))), "no-buffer", "one buffer"),
    "another type": (put(Array("float32", (58,), to_array(b"").stype, bytes(NBYTES))), "no-buffer", "one buffer"),
    "another length": (put(Array("uint8", (1,), to_array(b"").stype, bytes(NBYTES))), "no-buffer", "one buffer"),
    "short": (put(to_array(bytes(NBYTES - 1))), "other-size", f"{NBYTES - 1} bytes of tensors, {NBYTES}"),
    "long": (put(to_array(bytes(NBYTES + 4))), "other-size", f"{NBYTES + 4} bytes of tensors, {NBYTES}"),
    "empty": (put(to_array(b"")), "other-size", "0 bytes"),
    "an array more": (put(to_array(b""), "../../x"), "unexpected-records", "'buffer'"),
    "no array": (lambda content: arrays(content).clear(), "unexpected-records", "'buffer'"),
    "other tensors": (laid_out(x=torch.zeros(58)), "other-layout", "others than were asked for"),
    "no layout": (head(layout=None), "other-layout", "others than were asked for"),
    "a layout of its own": (head(layout=[["m:A", "float32", [4, 8]]]), "other-layout", "others than were asked for"),
    "extra record": (lambda content: content.update({"peft": ConfigRecord({"x": 1})}), "unexpected-records", "records"),
    "no metrics": (lambda content: content.pop("metrics"), "unexpected-records", "metrics"),
    "other round": (head(round=4), "other-round", "round 4, not 5"),
    "a round in words": (head(round="5"), "other-round", "not 5"),
    "stale base": (head(base_digest="old"), "other-base", "base"),
}


def test_the_valid_reply_passes_with_its_values() -> None:
    tensors, figures = check_update(good(), REQUEST)
    assert figures == {"num_examples": 7, "loss": 0.5}
    assert tensors.keys() == PLAN.adapter.tensors().keys()
    assert all(torch.equal(tensors[k], v) for k, v in PLAN.adapter.tensors().items())


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reply_is_refused_by_name(case: str) -> None:
    change, code, named = BROKEN[case]
    content = good()
    change(content)
    with raises(ReplyError, code, named):
        check_update(content, REQUEST)


# ------------------------------------------------------------------------------------------------ wire formats

G = torch.Generator().manual_seed(0)
START = torch.randn(4, 30, generator=G)
BF16 = TrainRequest(ClientPlan(AdapterState({}, {"w": START})), 1, 0, wire="bfloat16")
INT8 = TrainRequest(ClientPlan(AdapterState({}, {"w": START})), 1, 0, wire="int8")
GOOD = bytes(encode_change(INT8.headers["w"], START + 0.1, START, 0))


BROKEN_INT8: dict[str, tuple[bytes, str, str]] = {
    "raw": (START.numpy().tobytes(), "other-size", "480 bytes of tensors, 136"),
    "bfloat16": (
        bytes(encode_change(BF16.headers["w"], START + 0.1, START, 0)),
        "other-size",
        "240 bytes of tensors, 136",
    ),
    "without steps": (GOOD[16:], "other-size", "120 bytes of tensors, 136"),
    "a negative step": (b"\0\0\0\xc0" + GOOD[4:], "invalid-codes", "negative step"),
    "a code of -128": (GOOD[:-1] + b"\x80", "invalid-codes", "-128"),
}


@pytest.mark.parametrize("case", ["good", *BROKEN_INT8])
def test_an_int8_reply_is_checked_by_its_length_first(case: str) -> None:
    content = encode_reply(TrainedReply(INT8, {"w": START + 0.1}, {"num_examples": 1}), seed=0)
    if case == "good":
        assert torch.allclose(check_update(content, INT8)[0]["w"], START + 0.1, atol=1e-3)
        return
    buffer, code, named = BROKEN_INT8[case]
    put(to_array(buffer))(content)
    with raises(ReplyError, code, named):
        check_update(content, INT8)


@pytest.mark.parametrize("wire", WIRES)
def test_a_reply_in_another_format_is_refused_whatever_its_length(wire: str) -> None:
    asked = TrainRequest(INT8.plan, 1, 0, wire="float32" if wire == "int8" else "int8")
    content = encode_reply(TrainedReply(replace(INT8, wire=wire), {"w": START + 0.1}, {"num_examples": 1}), seed=0)
    with raises(ReplyError, "other-layout", "wire format"):
        check_update(content, asked)


# ------------------------------------------------------------------------------------------------ heads


def reply_with(content: RecordDict | None, error: Error | None = None) -> Message:
    with task_identity(1):
        question = Message(RecordDict(), 2, "train")
        return Message(content, reply_to=question) if content is not None else Message(error, reply_to=question)


def headed(text: str) -> RecordDict:
    return RecordDict({"reply": ConfigRecord({"json": text})})


@pytest.mark.parametrize(
    ("reply", "code", "named"),
    [
        (reply_with(None, Error(0, "Traceback\n  File\nValueError: boom")), "flower-error", "ValueError: boom"),
        (reply_with(encode_note("error", error="no\nsuch file")), "client-error", "such file"),
        (reply_with(encode_note("bogus")), "unknown-kind", "bogus"),
        (reply_with(encode_note("spent", error="spent")), "unknown-kind", "spent"),  # no private run
        (reply_with(RecordDict()), "unreadable-head", "head"),
        (reply_with(headed("[" * 100_000)), "unreadable-head", "head"),
        (reply_with(headed("[1]")), "other-protocol", "protocol"),
        (reply_with(headed('{"protocol": 1}')), "other-protocol", "protocol"),
    ],
)
def test_an_error_or_an_unreadable_reply_says_so_in_one_line(reply: Message, code: str, named: str) -> None:
    with raises(ReplyError, code, named):
        check_head(reply)
