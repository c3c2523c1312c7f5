"""Wire formats: what a format may lose, what it must not change, and that a run's bytes are those that it announces."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from copy import deepcopy
from typing import Any

import pytest
import torch
from support.errors import raises
from support.interrupted import cut_and_resumed
from support.states import same_adapter
from support.tiny_federations import MakeConfig

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientPlan, load_aggregator
from fedlora.callbacks import Callback
from fedlora.config import RunConfig, WireConfig
from fedlora.errors import ReplyError
from fedlora.evaluation.traffic import measure_traffic
from fedlora.federation.protocol import TrainRequest
from fedlora.federation.run import RunOutcome
from fedlora.hashing import tensors_digest
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training.workspace import open_workspace
from fedlora.wire_formats import (
    BF16,
    DTYPES,
    INT8,
    RAW,
    TOPK,
    WIRES,
    as_received,
    as_sent,
    decode_change,
    decode_value,
    encode_change,
    encode_value,
    from_raw,
    header_of,
    header_of_value,
    joined,
    layout_digest,
    layout_json,
    raw_bytes,
    read_layout,
    sliced,
)

G = torch.Generator().manual_seed(0)
LOSSY = ("bfloat16", "int8")


def run(config: RunConfig) -> RunOutcome:
    return run_simulation(config, RunDir.create(config, overwrite=True), Callback())


# ------------------------------------------------------------------------------------------------ one tensor


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (2, 3, 4), (5,), (1,), (), (0, 4)])
def test_every_tensor_survives_every_format_with_its_header(
    wire: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    start = torch.randn(shape, generator=G).to(dtype)
    trained = (start + 0.01 * torch.randn(shape, generator=G).to(dtype)).to(dtype)
    kept = trained.clone(), start.clone()
    header = header_of(wire, dtype, shape, fraction=0.4)
    data = encode_change(header, trained, start, seed=1)
    assert (len(data), header.shape) == (header.nbytes, shape)
    back = decode_change(header, data, start)
    assert torch.equal(as_received(header, trained, start, seed=1), back)
    assert (back.dtype, back.shape) == (dtype, trained.shape)
    change = trained.double() - start.double()
    largest = float(change.abs().max()) if change.numel() else 0.0
    bound = {RAW: 0.0, BF16: 2**-8, INT8: 1 / 127, TOPK: 1.0}[header.form]
    rounding = torch.finfo(dtype).eps * float(start.abs().max()) if start.numel() and bound else 0.0
    assert bool(((back.double() - trained.double()).abs() <= bound * largest * 1.001 + rounding).all())
    assert torch.equal(trained, kept[0])
    assert torch.equal(start, kept[1])


@pytest.mark.parametrize("wire", ["float32", *LOSSY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (2, 3, 4), (5,), (1,), (), (0, 4)])
def test_a_start_is_rounded_once_to_the_nearest(wire: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=G).to(dtype)
    header = header_of_value(wire, dtype, shape)
    data = encode_value(header, value)
    back = decode_value(header, data)
    assert (len(data), back.dtype, back.shape) == (header.nbytes, dtype, value.shape)
    assert torch.equal(as_sent(wire, value), back)
    assert encode_value(header, back) == data, "or a server that keeps what it sends would send something else"
    largest = float(value.abs().max()) if value.numel() else 0.0
    bound = {RAW: 0.0, BF16: 2**-8, INT8: 1.01 / 254}[header.form]
    assert bool(((back.double() - value.double()).abs() <= bound * largest).all())
    whole = dtype != torch.float32 or wire == "float32" or (wire == "int8" and len(shape) < 2)
    assert (header.form == RAW) >= whole


def test_sizes_are_half_and_a_quarter_and_never_more_than_raw() -> None:
    sizes = [header_of(wire, torch.float32, (16, 4096)).nbytes for wire in WIRES]
    assert sizes[:3] == [16 * 4096 * 4, 16 * 4096 * 2, 16 * 4096 + 16 * 4]
    assert header_of("topk", torch.float32, (16, 4096), 0.1).nbytes == 8 * 6554
    assert header_of("topk", torch.float32, (3, 10), 0.1).nbytes == 8 * 3  # 0.1 * 30 is above 3 in binary
    assert header_of("topk", torch.float32, (4, 4096), 0.5).form == RAW
    assert header_of("int8", torch.float32, (4096, 16)).nbytes == sizes[2]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for shape in ((), (1,), (2,), (1, 1), (7, 1), (0,), (3, 3)):
            raw, *lossy = [header_of(wire, dtype, shape, 0.1) for wire in WIRES]
            assert all(header == raw or header.nbytes < raw.nbytes for header in lossy)
    assert header_of("bfloat16", torch.float16, (9, 9)).form == RAW


@pytest.mark.parametrize("wire", LOSSY)
def test_a_small_change_beside_a_large_value_is_not_lost(wire: str) -> None:
    start = torch.full((2, 200), 1.0)
    trained = start + 1e-5
    lost = trained.bfloat16().float() - start
    assert float(lost.abs().max()) == 0.0
    header = header_of(wire, torch.float32, (2, 200))
    assert torch.allclose(as_received(header, trained, start, 0) - start, trained - start, rtol=0.01)


@pytest.mark.parametrize("wire", WIRES)
def test_what_was_not_trained_comes_back_exactly(wire: str) -> None:
    start = torch.randn(8, 50, generator=G)
    assert torch.equal(as_received(header_of(wire, torch.float32, (8, 50), 0.1), start, start, 0), start)


def test_int8_codes_that_no_client_makes_are_refused() -> None:
    start, header = torch.zeros(2, 8), header_of("int8", torch.float32, (2, 8))
    good = encode_change(header, torch.randn(2, 8, generator=G), start, 0)
    for at, byte in ((3, 0xBF), (8, 0x80)):  # the sign of a step; a code of -128
        data = bytearray(good)
        data[at] = byte
        with raises(ReplyError, "invalid-codes"):
            decode_change(header, bytes(data), start)


def test_topk_sends_the_largest_changes_as_they_are_and_of_equal_ones_the_first() -> None:
    start, header = torch.zeros(2, 5), header_of("topk", torch.float32, (2, 5), 0.4)
    trained = torch.tensor([[0.0, -3.0, 1.0, 1.0, 0.5], [1.0, 0.25, 2.0, -1.0, 0.0]])
    received = torch.tensor([[0.0, -3.0, 1.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]])
    assert torch.equal(as_received(header, trained, start, 0), received)
    trained[1, 4], trained[0, 0] = float("nan"), -math.inf
    read = as_received(header, trained, start, 0)
    assert read.isnan().sum() == 1, "what is not finite is sent, and so refused"
    assert read.isinf().sum() == 1
    assert [read[0, 1], read[1, 2]] == [-3.0, 2.0]


def test_places_that_no_client_sends_are_refused() -> None:
    start, header = torch.zeros(3, 4), header_of("topk", torch.float32, (3, 4), 0.25)
    good = encode_change(header, torch.arange(12.0).reshape(3, 4), start, 0)
    assert torch.equal(decode_change(header, good, start).flatten()[9:], torch.arange(9.0, 12.0))
    for places in ([9, 9, 11], [10, 9, 11], [-1, 10, 11], [9, 10, 12], [2**31 - 1, 10, 11]):
        data = torch.tensor(places, dtype=torch.int32).numpy().tobytes() + bytes(good[12:])
        with raises(ReplyError, "invalid-codes", "places"):
            decode_change(header, data, start)


def test_the_raw_format_is_the_tensor_itself() -> None:
    value = torch.randn(3, 4, generator=G)
    header = header_of("float32", torch.float32, (3, 4))
    assert encode_change(header, value, torch.zeros(3, 4), 0) == raw_bytes(value) == value.numpy().tobytes()
    assert torch.equal(from_raw(value.numpy().tobytes(), "float32", (3, 4)), value)


def test_what_is_decoded_owns_its_memory() -> None:
    data = bytes(16)
    from_raw(data, "float32", (4,)).add_(1.0)
    assert data == bytes(16)


def test_each_tensor_client_and_round_is_rounded_by_its_own_draw() -> None:
    start = AdapterState({}, {name: torch.zeros(1, 400) for name in ("a", "b")})
    trained = {name: torch.linspace(0.1, 1.0, 400)[None] for name in ("a", "b")}

    def sent(round_number: int, client_id: int, seed: int = 0) -> dict[str, memoryview]:
        request = TrainRequest(ClientPlan(start), round_number, client_id, wire="int8")
        return sliced(request.headers, request.encode(trained, seed))

    assert sent(1, 0) == sent(1, 0)
    bodies = [*sent(1, 0).values(), sent(2, 0)["a"], sent(1, 1)["a"], sent(1, 0, seed=1)["a"]]
    assert len({bytes(body) for body in bodies}) == 5


@pytest.mark.parametrize("wire", WIRES)
def test_a_simulation_uses_what_a_server_would_decode(wire: str) -> None:
    shapes = {"b": (3, 40), "odd": (5, 3), "a": (40, 3), "half": (7,), "one": (), "none": (0, 4)}
    dtypes = {"half": torch.bfloat16, "one": torch.float64}
    start = {name: torch.randn(shape, generator=G).to(dtypes.get(name)) for name, shape in shapes.items()}
    request = TrainRequest(ClientPlan(AdapterState({}, start)), 2, 1, wire=wire, fraction=0.3)
    trained = {name: value + 0.1 for name, value in reversed(request.starts.items())}
    buffer, received = request.encode(trained, 7), request.as_received(trained, 7)
    assert len(buffer) == request.reply_nbytes
    got = request.decode(buffer)
    assert list(got) == list(start)  # the server's own order, in which it adds
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in start.items()}
    assert all(torch.equal(got[name], received[name]) for name in start)
    other = AdapterState({}, dict(reversed(start.items())))
    assert TrainRequest(ClientPlan(other), 2, 1, wire=wire, fraction=0.3).encode(trained, 7) == buffer


# ------------------------------------------------------------------------------------------------ many tensors


def named(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of odd sizes, of which one is transposed and one is a slice."""
    whole = torch.randn(6, 7, generator=G).to(dtype)
    return {"z": whole.T, "a": whole[1:4, 2:5], "half": torch.ones(3).half(), "one": whole[0, 0], "none": whole[:0]}


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_tensors_survive_as_a_layout_and_one_buffer(dtype: torch.dtype) -> None:
    tensors = named(dtype)
    buffer = joined(map(raw_bytes, tensors.values()))
    layout = read_layout(json.loads(json.dumps(layout_json(tensors))), len(buffer))
    parts = sliced(layout, buffer)
    back = {name: from_raw(parts[name], header.dtype, header.shape) for name, header in layout.items()}
    assert list(back) == list(tensors)
    assert tensors_digest(back) == tensors_digest(tensors)


@pytest.mark.parametrize("wire", LOSSY)
def test_rounded_tensors_survive_as_a_layout_and_one_buffer(wire: str) -> None:
    tensors = named() | {"wide": torch.randn(3, 40, generator=G)}
    headers = {name: header_of_value(wire, value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    buffer = joined(encode_value(headers[name], value) for name, value in tensors.items())
    assert len(buffer) < sum(value.nbytes for value in tensors.values())
    layout = read_layout(json.loads(json.dumps(layout_json(tensors, wire))), len(buffer))
    assert layout == headers
    parts = sliced(layout, buffer)
    for name, value in tensors.items():
        assert torch.equal(decode_value(layout[name], parts[name]), as_sent(wire, value))


def test_a_buffer_is_as_long_as_its_tensors_and_sliced_without_a_copy() -> None:
    tensors = {name: torch.ones(1 << 20) for name in "abc"}
    tracemalloc.start()
    try:
        buffer = joined(map(raw_bytes, tensors.values()))
        layout = read_layout(layout_json(tensors), len(buffer))
        parts = sliced(layout, buffer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(map(len, parts.values())) == len(buffer) == 12 << 20
    assert peak < 1.2 * len(buffer)


GOOD = [["a", "float32", [2, 3]], ["b", "bfloat16", [4]]]  # 32 bytes


def changed(place: int, field: int, value: object) -> list[Any]:
    said = json.loads(json.dumps(GOOD))
    said[place][field] = value
    return said


NO_LAYOUTS: dict[str, Any] = {
    "nothing": None,
    "an object": {"a": ["float32", [2, 3]]},
    "text": "ab",
    "too many": [[f"{n}", "float32", [0]] for n in range((1 << 16) + 1)],
    "a tensor of two fields": [GOOD[0], GOOD[1][:2]],
    "a tensor of four fields": [GOOD[0], [*GOOD[1], 24]],
    "a format that no start has": [GOOD[0], [*GOOD[1], "topk"]],
    "two formats": [GOOD[0], [*GOOD[1], "int8", "int8"]],
    "a format of fewer bytes": [[*GOOD[0], "bfloat16"], GOOD[1]],
    "a tensor as text": ["abc", GOOD[1]],
    "a name twice": changed(1, 0, "a"),
    "a name twice, and the second is all": [GOOD[0], ["a", "float32", [8]]],
    "no name": changed(0, 0, ""),
    "a number as a name": changed(0, 0, 7),
    "a long name": changed(0, 0, "x" * 1025),
    "another type": changed(0, 1, "int8"),
    "an object type": changed(0, 1, "object"),
    "a type of a list": changed(0, 1, ["float32"]),
    "a wider type": changed(0, 1, "float64"),
    "a narrower type": changed(0, 1, "float16"),
    "a shape as a number": changed(0, 2, 6),
    "a negative side": changed(0, 2, [-2, -3]),
    "a real side": changed(0, 2, [2.0, 3]),
    "a side that is no number": changed(0, 2, [True, 6]),
    "nested sides": changed(0, 2, [[2, 3]]),
    "nine sides": changed(0, 2, [2, 3, 1, 1, 1, 1, 1, 1, 1]),
    "more than the buffer": changed(0, 2, [2, 4]),
    "less than the buffer": changed(0, 2, [2, 2]),
    "a tensor too few": GOOD[:1],
    "terabytes": changed(0, 2, [1 << 20, 1 << 20]),
    "nothing of terabytes": [*GOOD, ["c", "float32", [0, 1 << 62, 1 << 62]]],
    "a number of 400 digits": changed(0, 2, [10**400]),
}


@pytest.mark.parametrize("case", NO_LAYOUTS)
def test_what_is_no_layout_of_the_buffer_is_refused(case: str) -> None:
    with raises(ReplyError, "invalid-layout", "install the same fedlora") as caught:
        read_layout(NO_LAYOUTS[case], 32)
    assert len(str(caught.value)) < 300


def test_thousands_of_mutated_layouts_are_refused_or_describe_the_whole_buffer() -> None:
    values = [*(None, True, -1, 0, 1, 2, 3, 4, 6, 2**63, 0.5, "", "a", "b", "float32", "float16", "bfloat16", "int8")]
    values += [*([], [2, 3], [3, 2], [6], [4], [2, 2], [1, 4], [0], [True], [[2]], {}, GOOD[0], GOOD[1])]
    kept, refused = 0, set[tuple[str, bool]]()
    for seed in range(4000):
        draw = random.Random(seed)
        said = json.loads(json.dumps(GOOD))
        for _ in range(draw.randint(1, 3)):
            where = draw.choice([said, *(entry for entry in said if isinstance(entry, list) and entry)])
            what = draw.randrange(3)
            if what == 0 and where:
                where[draw.randrange(len(where))] = deepcopy(draw.choice(values))
            elif what == 1 and where:
                where.pop(draw.randrange(len(where)))
            else:
                where.insert(draw.randrange(len(where) + 1), deepcopy(draw.choice(values)))
        try:
            layout = read_layout(said, 32)
        except ReplyError as error:
            refused.add((error.code, str(error).isprintable()))
            continue
        kept += 1
        parts = sliced(layout, bytes(range(32)))
        assert b"".join(parts.values()) == bytes(range(32))
        for name, header in layout.items():
            assert decode_value(header, parts[name]).shape == header.shape
    assert refused == {("invalid-layout", True)}
    assert 20 < kept < 2000


def test_a_digest_names_names_order_shapes_types_and_formats() -> None:
    f32, shape = torch.float32, (16, 64)
    layouts: list[dict[str, Any]] = [
        {"a": header_of("float32", f32, shape), "b": header_of("float32", f32, shape)},
        {"b": header_of("float32", f32, shape), "a": header_of("float32", f32, shape)},
        {"a": header_of("float32", f32, shape)},
        {"a": header_of("float32", f32, shape[::-1])},
        {"a": header_of("float32", torch.float64, shape)},
        {"a": header_of("bfloat16", f32, shape)},
        {"a": header_of("float32", torch.bfloat16, shape)},
        {"a": header_of("int8", f32, shape)},
        {},
    ]
    assert len({layout_digest(layout) for layout in layouts}) == len(layouts)
    assert layout_digest(layouts[0]) == layout_digest(dict(layouts[0]))


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "wire"),
    [
        ("flora", "int8"),
        ("fedavg", "bfloat16"),
        *(pytest.param(rule, "int8", marks=pytest.mark.slow) for rule in ("fedavg", "ffa", "fair")),
    ],
)
def test_every_rule_learns_as_well_and_sends_what_was_announced(tiny_config: MakeConfig, rule: str, wire: str) -> None:
    settings = (f"strategy.name={rule}", "evaluation.every=3")
    exact, config = run(tiny_config(*settings, name="exact")), tiny_config(*settings, f"wire.up={wire}")
    rounded = run(config)
    workspace = open_workspace(config)
    layouts = [workspace.base.layout()] * 4
    sizes = [
        measure_traffic(load_aggregator(rule), workspace.base.initial_adapter(0), layouts, WireConfig(up=name)).up
        for name in ("float32", wire)
    ]
    assert sizes[1] < {"bfloat16": 0.51, "int8": 0.36}[wire] * sizes[0]
    saved = exact.records[2]["bytes_up"] - rounded.records[2]["bytes_up"]
    assert saved == pytest.approx(4 * (sizes[0] - sizes[1]), abs=64)  # the seconds' digits differ
    assert exact.records[1]["bytes_down"] == pytest.approx(rounded.records[1]["bytes_down"], abs=64)
    assert not same_adapter(exact.adapter, rounded.adapter)
    assert rounded.records[-1]["loss"] == pytest.approx(exact.records[-1]["loss"], abs=0.01)
    assert (max(record["aggregation_error"] for record in rounded.records[1:]) < 1e-6) == (rule in ("ffa", "flora"))
    if rule == "ffa":
        initial = workspace.base.initial_adapter(0)
        state = rounded.state.adapter
        assert all(torch.equal(state.pairs[name].A, initial.pairs[name].A) for name in state.pairs)


@pytest.mark.parametrize("rule", [pytest.param("fedavg", marks=pytest.mark.slow), "flora"])
def test_a_rounded_run_that_was_cut_ends_as_one_that_was_not(tiny_config: MakeConfig, rule: str) -> None:
    settings = (f"strategy.name={rule}", "wire.up=int8", "server.fraction=0.5", "evaluation.every=3")
    whole = run(tiny_config(*settings, name="whole"))
    config = tiny_config(*settings, name="cut")
    resumed = cut_and_resumed(config, 2)
    assert same_adapter(resumed.adapter, whole.adapter)


@pytest.mark.slow
def test_a_private_run_is_rounded_after_the_noise_and_claims_the_same(tiny_config: MakeConfig) -> None:
    settings = (
        *("server.weighting=uniform", "train.steps=2", "train.batch_size=10", "evaluation.every=2", "rounds=2"),
        *("privacy.public_examples=40", "privacy.delta=1e-3", "privacy.max_grad_norm=0.5", "privacy.accountant=rdp"),
        "privacy.noise_multiplier=1.5",
    )
    exact, rounded = run(tiny_config(*settings)), run(tiny_config(*settings, "wire.up=int8", name="rounded"))
    claims = [outcome.rundir.read_json("result.json")["privacy"]["epsilon"] for outcome in (exact, rounded)]
    assert claims[0] == claims[1]
    assert rounded.records[1]["answered"] == [0, 1, 2, 3]
    assert rounded.records[1]["bytes_up"] < 0.5 * exact.records[1]["bytes_up"]
