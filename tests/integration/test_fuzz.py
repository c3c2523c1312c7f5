"""Thousands of mutated replies in each wire format: each is refused by `ReplyError`, or could have been an honest one.

What an honest client could have sent is said here once more, from the message's parts alone and by NumPy.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import raises
from support.nothing_lost import Witness
from support.on_a_grid import grid_of, serve_on

from fedlora import __version__
from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientPlan
from fedlora.config import RunConfig, parse_config
from fedlora.errors import ReplyError
from fedlora.federation.client_pool import ClientReply
from fedlora.federation.plausibility import Expectations
from fedlora.federation.protocol import PROTOCOL, TrainedReply, TrainRequest
from fedlora.federation.screen import LARGEST_FIGURES, Screen
from fedlora.flower.messages import encode_note, encode_reply
from fedlora.flower.task_identity import task_identity
from fedlora.flower.update_checks import check_head, check_hello, check_update
from fedlora.runs.rundir import RunDir
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.workspace import Workspace

G = torch.Generator().manual_seed(0)
PAIR = LoraPair(torch.randn(2, 3, generator=G), torch.randn(4, 2, generator=G), 2.0)
PLAN = ClientPlan(AdapterState({"m": PAIR}, {"head": torch.randn(2, generator=G).bfloat16()}))
TRAINED = PLAN.adapter.with_tensors(
    {name: (t + torch.randn(t.shape, generator=G)).to(t.dtype) for name, t in PLAN.adapter.tensors().items()}
)
WIRES = ("float32", "bfloat16", "int8", "topk")
SCREEN = Screen(
    parse_config("", ["server.max_examples=1000", "server.max_norm=50.0", "server.max_norm_ratio=off"]),
    cast("Workspace", SimpleNamespace(data=SimpleNamespace(clients=[range(2000)] * 2))),
)
SHAPES = {"head": (2,), "m:A": (2, 3), "m:B": (4, 2)}  # in the order of their bytes
METRICS = {"loss", "steps", "seconds", "compute_seconds", "examples_seen"}
HEAD = {"protocol": PROTOCOL, "kind": "update", "round": 5, "base_digest": "base", "layout": ""}
ODD: list[Any] = [
    *(None, True, False, 0, 1, 5, -1, 2**63, 10**400, 0.5, 1e308, math.nan, math.inf, "", "5", "update", "need"),
    *("\ud800", "x" * 100_000, [], [1], ["update"], {}, {"a": 1}, b"", b"\x00"),
]
with task_identity(1):
    QUESTION = Message(RecordDict(), 2, "train")


def as_reply(content: RecordDict) -> Message:
    with task_identity(1):
        return Message(content, reply_to=QUESTION)


def asked(wire: str) -> TrainRequest:
    return TrainRequest(PLAN, 5, 1, "base", wire=wire, fraction=0.25)


def good(wire: str) -> RecordDict:
    figures = {"num_examples": 7, "loss": 0.5, "steps": 4.0, "seconds": 0.1, "compute_seconds": 0.1}
    return encode_reply(TrainedReply(asked(wire), TRAINED.tensors(), figures), seed=0)


def values_of(arrays: ArrayRecord, wire: str) -> dict[str, np.ndarray] | None:
    """The float32 values of a reply's tensors by NumPy, or None if they are not in the wire format.

    The head is in bfloat16, and two bytes a number are no more than it would take in any format.
    """
    if list(arrays) != ["buffer"]:
        return None
    array, at, found = arrays["buffer"], 0, dict[str, np.ndarray]()
    for name, shape in SHAPES.items():
        size, kind = math.prod(shape), "head" if name == "head" else wire
        # both matrices have two rows along the longer side
        topk = 8 * math.ceil(size / 4)
        length = {"head": 2 * size, "float32": 4 * size, "bfloat16": 2 * size, "int8": 4 * 2 + size, "topk": topk}[kind]
        values = one_of(name, kind, array.data[at : at + length]) if at + length <= len(array.data) else None
        if values is None:
            return None
        found[name] = values
        at += length
    described = (array.stype, array.dtype, array.shape) == ("fedlora.buffer.v1", "uint8", (at,))
    return found if described and at == len(array.data) else None


def one_of(name: str, kind: str, data: bytes) -> np.ndarray | None:
    """The float32 values of one tensor."""
    shape = SHAPES[name]
    if kind == "float32":
        return np.frombuffer(data, "<f4").reshape(shape)
    if kind == "topk":
        places, kept = np.frombuffer(data[: len(data) // 2], "<i4"), np.frombuffer(data[len(data) // 2 :], "<f4")
        if places[0] < 0 or places[-1] >= math.prod(shape) or (np.diff(places.astype("<i8")) <= 0).any():
            return None
        values = np.zeros(math.prod(shape), "<f4")
        values[places] = kept
        values = values.reshape(shape)
    elif kind in ("head", "bfloat16"):
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    else:
        steps, codes = np.frombuffer(data[:8], "<f4"), np.frombuffer(data[8:], "i1")
        if (steps < 0).any() or (codes == -128).any():
            return None
        values = codes.reshape(2, -1).astype("<f4") * steps[:, None]
        values = values if shape[0] < shape[1] else values.T
    return values if kind == "head" else PLAN.adapter.tensors()[name].numpy() + values


@np.errstate(invalid="ignore", over="ignore")  # signalling NaNs, and changes beyond float32
def honest(content: RecordDict, wire: str) -> bool:
    """Whether a client that does as it was asked could have sent this."""
    kinds = {key: type(record) for key, record in content.items()}
    if kinds != {"reply": ConfigRecord, "update": ArrayRecord, "metrics": MetricRecord}:
        return False
    record = dict(content.config_records["reply"])
    text = str(record.pop("json", ""))
    try:
        head = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if record or len(text) > 2**14 or not isinstance(head, dict):
        return False
    arrays, metrics = content.array_records["update"], dict(content.metric_records["metrics"])
    if {key: head.get(key) for key in HEAD} != head_of(wire) or (found := values_of(arrays, wire)) is None:
        return False
    square = sum(float((values.astype(float) ** 2).sum()) for values in found.values())
    weight = metrics.pop("num_examples", None)
    numbers = all(isinstance(v, int | float) and abs(v) <= sys.float_info.max for v in metrics.values())
    numbers = numbers and all(0 <= metrics.get(name, 0) <= most for name, most in LARGEST_FIGURES.items())
    fair = type(weight) is int and 1 <= weight <= 1000 and set(metrics) <= METRICS and numbers
    return fair and math.isfinite(square) and math.sqrt(square) <= 50.0


def head_of(wire: str) -> dict[str, Any]:
    return {**HEAD, "layout": asked(wire).layout_digest}


def change_array(content: RecordDict, draw: random.Random) -> None:
    arrays = content.array_records["update"]
    name = draw.choice(list(arrays))
    old = arrays[name]
    data = bytearray(old.data)
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] = draw.choice([0, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    dtypes = [
        "int8",
        "uint8",
        "float64",
        "float16",
        "bfloat16",
        "float32",
        "int64",
        "complex64",
        "object",
        "",
        "[('a', '<f4')]",
        ">f4",
    ]
    shapes = [(), (0,), old.shape[::-1], (1, *old.shape), (2**40, 2**40), (-2, -3), (6,), (2, 0), (True, 3)]
    stypes = ["", "numpy.ndarray", "pickle", "torch", "fedlora.buffer.v1"]
    bodies = [b"", old.data[:-1], old.data + b"\0", old.data * 2, b"\x93NUMPY" + old.data, bytes(10_000)]
    bodies += [old.data[1:] + old.data[:1], old.data[::-1], bytes(len(old.data))]
    makes: list[Callable[[], Array]] = [
        lambda: Array(old.dtype, old.shape, old.stype, bytes(data)),
        lambda: Array(draw.choice(dtypes), old.shape, old.stype, old.data),
        lambda: Array(old.dtype, draw.choice(shapes), old.stype, old.data),
        lambda: Array(old.dtype, old.shape, draw.choice(stypes), old.data),
        lambda: Array(old.dtype, old.shape, old.stype, draw.choice(bodies)),
        lambda: draw.choice(list(good(draw.choice(WIRES)).array_records["update"].values())),
    ]
    arrays[name] = draw.choice(makes)()


def change_keys(content: RecordDict, draw: random.Random) -> None:
    arrays = content.array_records["update"]
    name = draw.choice(list(arrays))
    array = arrays[name] if draw.random() < 0.5 else arrays.pop(name)
    if draw.random() < 0.7:
        arrays[draw.choice(["../../x", "", "m:A", "buffer", "Buffer", "a\0b", "x" * 9999])] = array


def change_metric(content: RecordDict, draw: random.Random) -> None:
    metrics = content.metric_records["metrics"]
    name = draw.choice([*metrics, "num_examples", "num_examples", "x", "", "loss\n"])
    values = [0, 1, -1, 1000, 1001, 10**18, 2**63, 10**400, 0.5, 7.0, -0.0, 1e308, math.nan, math.inf, -math.inf]
    lists: list[Any] = [[], [1], [0.5, math.nan]]
    if draw.random() < 0.15:
        metrics.pop(name, None)
    else:
        metrics[name] = draw.choice([*values, *lists])


def change_head(content: RecordDict, draw: random.Random) -> None:
    layouts = [asked(wire).layout_digest for wire in WIRES]
    before = str(content.config_records["reply"].get("json", ""))
    head: Any = {**HEAD, "layout": next((digest for digest in layouts if digest in before), "")}
    head[draw.choice([*HEAD, "extra", ""])] = draw.choice([v for v in [*ODD, *layouts] if not isinstance(v, bytes)])
    text = json.dumps(head)
    texts = [
        "[" * 70_000,
        "[" * 60_000,
        "1" * 5000,
        '{"protocol": ' + "1" * 5000 + "}",
        "null",
        '"x"',
        "[]",
        "\ud800",
        "",
    ]
    cut = text[: draw.randrange(len(text))]
    record: dict[str, Any] = {"json": draw.choice([text, text, text, cut, draw.choice(texts)])}
    if draw.random() < 0.2:
        record = {draw.choice(["json", "Json", "x"]): draw.choice([0, 1.5, True, b"{}", [1], text])}
    if draw.random() < 0.1:
        record["junk"] = "x" * 1000
    content.pop("reply")
    content["reply"] = ConfigRecord(record)


def change_records(content: RecordDict, draw: random.Random) -> None:
    name = draw.choice(["reply", "update", "metrics", "extra", ""])
    others: list[Callable[[], Any]] = [
        lambda: ConfigRecord({"json": "{}"}),
        ConfigRecord,
        ArrayRecord,
        lambda: MetricRecord({"num_examples": 7}),
    ]
    swapped = content.pop(draw.choice(list(content))) if draw.random() < 0.5 else draw.choice(others)()
    if draw.random() < 0.8:
        content.pop(name, None)
        content[name] = swapped


CHANGES: list[Callable[[RecordDict, random.Random], None]] = [
    *(change_array, change_keys, change_metric, change_head, change_records)
]


def verdict(content: RecordDict, wire: str) -> ClientReply | str:
    """What the server does with a reply: what it accepts, or why it refuses. Anything else ends the test."""
    try:
        head = check_head(as_reply(content))
        assert head["kind"] in ("update", "need")
        if head["kind"] == "need":
            return "need"
        return SCREEN.admit(ClientReply(1), asked(wire), *check_update(content, asked(wire)), Expectations())
    except ReplyError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRES)
def test_a_mutated_reply_is_refused_or_is_one_that_could_have_been_honest(wire: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(4000):
        draw = random.Random(seed)
        content = good(wire)
        change = CHANGES[seed % len(CHANGES)]
        change(content, draw)
        if draw.random() < 0.2 and set(content) == {"reply", "update", "metrics"} and change is not change_records:
            draw.choice([change_metric, change_head])(content, draw)
        got = verdict(content, wire)
        if isinstance(got, str):
            assert got == "need" or not honest(content, wire), f"seed {seed}: refused a good reply: {got}"
            assert len(got) < 600
            assert "\n" not in got
            seen["refused"] += 1
            continue
        assert honest(content, wire), f"seed {seed} ({change.__name__}) was accepted"
        seen["accepted"] += 1
        values = values_of(content.array_records["update"], wire)
        assert values is not None
        assert got.update is not None
        for name, tensor in got.update.adapter.tensors().items():
            assert tensor.float().numpy().tobytes() == values[name].tobytes()
        assert got.update.num_examples == content.metric_records["metrics"]["num_examples"]
    assert seen["refused"] > 2000
    assert seen["accepted"] > 100  # the mutations are near enough to the edge to fall on both sides


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
keys = st.sampled_from(["kind", "fedlora", "fingerprint", "client_id", "num_examples", "rank"])


@pytest.mark.slow
@given(st.dictionaries(keys, json_values), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_mutated_hello_is_refused_or_names_a_client_that_there_is(fields: dict[str, Any], with_ids: bool) -> None:
    whole = {"kind": "hello", "fedlora": __version__, "fingerprint": "f", "client_id": 2, "num_examples": 7}
    try:
        hello = check_hello(as_reply(encode_note(**{**whole, **fields})), "f", 4, 64, 1000)
    except ReplyError:
        assert {**whole, **fields} != whole
    else:
        assert type(hello.client_id) is int
        assert hello.client_id in range(4)
        assert hello.rank is None or hello.rank in range(1, 65)
        assert hello.num_examples is None or hello.num_examples in range(1001)


@pytest.mark.parametrize("client_id", [None, True, -1, 4, 1.0, "1", [1], {"a": 1}])
def test_a_client_number_is_a_number_of_a_client(client_id: Any) -> None:
    reply = as_reply(encode_note("hello", fedlora=__version__, fingerprint="f", client_id=client_id))
    with raises(ReplyError, "no-such-client"):
        check_hello(reply, "f", 4, 64, 1000)


def test_errors_of_any_text_are_refused_in_one_line() -> None:
    for reason in ("", "\n\n", "x" * 100_000, "a\nb", "\0"):
        with task_identity(1):
            reply = Message(Error(0, reason), reply_to=QUESTION)
        with pytest.raises(ReplyError) as caught:
            check_head(reply)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.slow
def test_a_hostile_client_changes_nothing_and_is_named_in_each_round(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, hostile = LoopbackGrid._answer, 4
    changes: list[Callable[[RecordDict], object]] = [
        lambda content: content.pop("metrics"),
        lambda content: content.array_records["update"].popitem(),
        lambda content: content.metric_records["metrics"].update(num_examples=10**18),
        lambda content: content.config_records["reply"].update(json="["),
    ]
    settings = ("rounds=4", "wire.up=int8", "evaluation.every=4", "runtime.cohort=1")
    configs = [tiny_config(*settings, name=name) for name in "ab"]

    def answer(self: LoopbackGrid, message: Message) -> Message:
        reply = real(self, message)
        if message.metadata.dst_node_id == hostile and message.metadata.message_type == "train":
            if mode == "away":
                with task_identity(1, hostile):
                    return Message(Error(0, "not there"), reply_to=message)
            changes[int(message.metadata.group_id) - 1](reply.content)
        return reply

    monkeypatch.setattr(LoopbackGrid, "_answer", answer)
    mode = "hostile"
    witness = Witness(RunDir.create(configs[0]))
    outcomes = [serve_on(grid_of(configs[0]), configs[0], witness, rundir=witness.rundir)]
    mode = "away"
    outcomes += [serve_on(grid_of(configs[1]), configs[1])]
    assert [list(record["refused"]) for record in outcomes[0].records[1:]] == [["2"]] * 4
    assert [*witness.left_out] == [(number, 2) for number in (1, 2, 3, 4)]
    one, other = (outcome.adapter.tensors() for outcome in outcomes)
    assert all(torch.equal(one[name], other[name]) for name in one)
