"""Each hostile or broken reply is refused by the check that it is meant for, and the valid one passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientPlan
from fedlora.errors import ReplyError
from fedlora.flower.messages import Ask, encode_note, encode_update, to_array
from fedlora.flower.update_checks import Limits, check_head, check_update
from fedlora.testing.loopback_grid import task_identity

PLAN = ClientPlan(AdapterState({"m": LoraPair(torch.ones(4, 8), torch.ones(6, 4), 2.0)}, {"head": torch.zeros(2)}))
ASK = Ask(PLAN, 5, 1, "base")
LIMITS = Limits(max_examples=1000, max_norm=100.0)


def good() -> RecordDict:
    return encode_update(PLAN.adapter.tensors(), {"num_examples": 7, "loss": 0.5}, round_number=5, base_digest="base")


def arrays(content: RecordDict) -> ArrayRecord:
    return content.array_records["update"]


def put(name: str, array: Array) -> Callable[[RecordDict], None]:
    return lambda content: arrays(content).update({name: array})


def metric(name: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.metric_records["metrics"].update({name: value})


def head(**fields: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        before = json.loads(str(content.config_records["reply"]["json"]))
        content.config_records["reply"] = ConfigRecord({"json": json.dumps({**before, **fields})})

    return change


def raw(
    dtype: str = "float32", shape: tuple[int, ...] = (4, 8), stype: str = "fedlora.raw.v1", size: int = 128
) -> Array:
    return Array(dtype, shape, stype, b"\0" * size)


BROKEN: dict[str, tuple[Callable[[RecordDict], Any], str]] = {
    "npz": (put("m:A", raw(stype="numpy.ndarray")), "serialised as 'numpy.ndarray'"),
    "structured dtype": (put("m:A", raw(dtype="[('a', '<f4')]")), "is of type"),
    "complex": (put("m:A", raw(dtype="complex64")), "is of type 'complex64'"),
    "other float": (put("m:A", raw(dtype="float16", size=64)), "is of type 'float16'"),
    "4 TB header": (put("m:A", raw(shape=(1_000_000, 1_000_000))), "has shape"),
    "silent broadcast": (put("m:A", raw(shape=(1, 8), size=32)), r"has shape \(1, 8\), not \(4, 8\)"),
    "rank above": (put("m:A", raw(shape=(8, 8), size=256)), "has 472 bytes of tensors|shape|bytes"),
    "short body": (put("m:A", raw(size=100)), "has 100 bytes, not 128"),
    "long body": (put("m:A", raw(size=100_000)), "bytes of tensors"),
    "NaN": (put("m:A", to_array(torch.full((4, 8), float("nan")))), "not finite"),
    "infinite": (put("m:A", to_array(torch.full((4, 8), float("inf")))), "not finite"),
    "large norm": (put("m:A", to_array(torch.full((4, 8), 1e4))), "norm .* is above"),
    "extra key": (put("../../x", raw()), "'../../x' was not asked for"),
    "missing key": (lambda content: arrays(content).pop("m:B"), "'m:B' is missing"),
    "extra record": (lambda content: content.update({"peft_config": ConfigRecord({"x": 1})}), "exactly the records"),
    "no metrics": (lambda content: content.pop("metrics"), "exactly the records"),
    "weight 1e18": (metric("num_examples", 10**18), "is not within 1"),
    "weight negative": (metric("num_examples", -3), "is not within 1"),
    "weight zero": (metric("num_examples", 0), "is not within 1"),
    "weight NaN": (metric("num_examples", float("nan")), "whole number"),
    "weight list": (metric("num_examples", [1, 2]), "whole number"),
    "metric NaN": (metric("loss", float("nan")), "no finite number"),
    "metric unknown": (metric("password", 1.0), "was not asked for"),
    "other round": (head(round=4), "is for round 4, not 5"),
    "stale base": (head(base_digest="old"), "another version of the base"),
}


def test_the_valid_reply_passes_with_its_values() -> None:
    valid = check_update(good(), ASK, LIMITS)
    assert valid.num_examples == 7
    assert valid.metrics["loss"] == 0.5
    assert all(torch.equal(valid.tensors[k], v) for k, v in PLAN.adapter.tensors().items())


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reply_is_refused_by_name(case: str) -> None:
    change, message = BROKEN[case]
    content = good()
    change(content)
    with pytest.raises(ReplyError, match=message):
        check_update(content, ASK, LIMITS)


def reply_to_nothing(content: RecordDict | None, error: Error | None = None) -> Message:
    with task_identity(1):
        question = Message(RecordDict(), 2, "train")
        return Message(content, reply_to=question) if content is not None else Message(error, reply_to=question)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (reply_to_nothing(None, Error(0, "Traceback\n  File\nValueError: boom")), "ValueError: boom"),
        (reply_to_nothing(encode_note("error", error="no\nsuch file")), "such file"),
        (reply_to_nothing(encode_note("bogus")), "unknown kind"),
        (reply_to_nothing(RecordDict()), "no readable head"),
        (reply_to_nothing(RecordDict({"reply": ConfigRecord({"json": "[" * 100_000})})), "no readable head"),
        (reply_to_nothing(RecordDict({"reply": ConfigRecord({"json": "[1]"})})), "protocol"),
        (reply_to_nothing(RecordDict({"reply": ConfigRecord({"json": '{"protocol": 2}'})})), "protocol"),
    ],
)
def test_an_error_or_an_unreadable_reply_says_so_in_one_line(reply: Message, message: str) -> None:
    with pytest.raises(ReplyError, match=message) as caught:
        check_head(reply)
    assert "\n" not in str(caught.value)


def test_metrics_are_read_without_the_record_being_trusted() -> None:
    content = good()
    content["metrics"] = MetricRecord({"num_examples": 7, "loss": [1.0, 2.0]})
    with pytest.raises(ReplyError, match="no finite number"):
        check_update(content, ASK, LIMITS)
