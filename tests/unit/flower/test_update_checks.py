"""Each hostile or broken reply is refused by the check that it is meant for, and the valid one passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientPlan
from fedlora.errors import ReplyError
from fedlora.federation.protocol import TrainedReply, TrainRequest
from fedlora.flower.arrays import change_array
from fedlora.flower.messages import encode_note, encode_reply
from fedlora.flower.task_identity import task_identity
from fedlora.flower.update_checks import check_head, check_update
from fedlora.wire_formats import BF16_STYPE, INT8_STYPE, STYPE, encode_change

PLAN = ClientPlan(AdapterState({"m": LoraPair(torch.ones(4, 8), torch.ones(6, 4), 2.0)}, {"head": torch.zeros(2)}))
REQUEST = TrainRequest(PLAN, 5, 1, "base")


def good() -> RecordDict:
    return encode_reply(TrainedReply(REQUEST, PLAN.adapter.tensors(), {"num_examples": 7, "loss": 0.5}), seed=0)


def arrays(content: RecordDict) -> ArrayRecord:
    return content.array_records["update"]


def put(name: str, array: Array) -> Callable[[RecordDict], None]:
    return lambda content: arrays(content).update({name: array})


def head(**fields: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        before = json.loads(str(content.config_records["reply"]["json"]))
        content.config_records["reply"] = ConfigRecord({"json": json.dumps({**before, **fields})})

    return change


def raw(
    dtype: str = "float32", shape: tuple[int, ...] = (4, 8), stype: str = "fedlora.raw.v1", size: int = 128
) -> Array:
    return Array(dtype, shape, stype, b"\0" * size)


BROKEN: dict[str, tuple[Callable[[RecordDict], Any], str, str]] = {
    "npz": (put("m:A", raw(stype="numpy.ndarray")), "unexpected-header", "'numpy.ndarray'"),
    "structured dtype": (put("m:A", raw(dtype="[('a', '<f4')]")), "unexpected-header", "<f4"),
    "complex": (put("m:A", raw(dtype="complex64")), "unexpected-header", "'complex64'"),
    "other float": (put("m:A", raw(dtype="float16", size=64)), "unexpected-header", "'float16'"),
    "4 TB header": (put("m:A", raw(shape=(1_000_000, 1_000_000))), "unexpected-header", "(1000000, 1000000)"),
    "silent broadcast": (put("m:A", raw(shape=(1, 8), size=32)), "unexpected-header", "(1, 8), not (4, 8)"),
    "rank above": (put("m:A", raw(shape=(8, 8), size=256)), "reply-too-large", "360"),
    "short body": (put("m:A", raw(size=100)), "unexpected-header", "100 bytes, not 128"),
    "long body": (put("m:A", raw(size=100_000)), "reply-too-large", "100104"),
    "extra key": (put("../../x", raw()), "unexpected-tensors", "'../../x' was not asked for"),
    "missing key": (lambda content: arrays(content).pop("m:B"), "unexpected-tensors", "'m:B' is missing"),
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
INT8 = TrainRequest(ClientPlan(AdapterState({}, {"w": START})), 1, 0, wire="int8")
GOOD = encode_change(START + 0.1, START, "int8", 0)


def int8(
    data: bytes = GOOD, *, dtype: str = "int8", shape: tuple[int, ...] = (4, 30), stype: str = INT8_STYPE
) -> Array:
    return Array(dtype, shape, stype, data)


BROKEN_INT8: dict[str, tuple[Array, str, str]] = {
    "raw": (change_array(START, START.numpy().tobytes(), "float32"), "reply-too-large", "480 bytes"),
    "bfloat16": (
        *(change_array(START, encode_change(START + 0.1, START, "bfloat16", 0), "bfloat16"), "reply-too-large", "240"),
    ),
    "a raw name": (int8(stype=STYPE), "unexpected-header", STYPE),
    "another name": (int8(stype=BF16_STYPE), "unexpected-header", BF16_STYPE),
    "float32 codes": (int8(dtype="float32"), "unexpected-header", "'float32', not 'int8'"),
    "transposed": (int8(shape=(30, 4)), "unexpected-header", "(30, 4), not (4, 30)"),
    "flat": (int8(shape=(120,)), "unexpected-header", "(120,)"),
    "without steps": (int8(GOOD[16:]), "unexpected-header", "120 bytes, not 136"),
    "a negative step": (int8(b"\0\0\0\xc0" + GOOD[4:]), "invalid-codes", "negative step"),
    "a code of -128": (int8(GOOD[:-1] + b"\x80"), "invalid-codes", "-128"),
}


@pytest.mark.parametrize("case", ["good", *BROKEN_INT8])
def test_an_int8_reply_is_checked_header_first(case: str) -> None:
    content = encode_reply(TrainedReply(INT8, {"w": START + 0.1}, {"num_examples": 1}), seed=0)
    if case == "good":
        assert torch.allclose(check_update(content, INT8)[0]["w"], START + 0.1, atol=1e-3)
        return
    array, code, named = BROKEN_INT8[case]
    put("w", array)(content)
    with raises(ReplyError, code, named):
        check_update(content, INT8)


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
        (reply_with(headed('{"protocol": 2}')), "other-protocol", "protocol"),
    ],
)
def test_an_error_or_an_unreadable_reply_says_so_in_one_line(reply: Message, code: str, named: str) -> None:
    with raises(ReplyError, code, named):
        check_head(reply)
