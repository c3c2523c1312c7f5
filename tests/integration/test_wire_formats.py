"""Wire formats: what a format may lose, what it must not change, and that a run's bytes are those that it announces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.errors import raises
from support.interrupted import cut_and_resumed

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientPlan, load_aggregator
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import ReplyError
from fedlora.evaluation.traffic import measure_traffic
from fedlora.federation.protocol import TrainRequest
from fedlora.federation.run import RunOutcome
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training.workspace import open_workspace
from fedlora.wire_formats import (
    BF16_STYPE,
    INT8_STYPE,
    STYPE,
    WIRES,
    as_received,
    decode_change,
    encode_change,
    from_raw,
    header_of,
    raw_bytes,
    raw_header,
)

MakeConfig = Callable[..., RunConfig]
G = torch.Generator().manual_seed(0)
LOSSY = ("bfloat16", "int8")


def run(config: RunConfig) -> RunOutcome:
    return run_simulation(config, RunDir.create(config, overwrite=True), Callback())


def same(left: AdapterState, right: AdapterState) -> bool:
    one, other = left.tensors(), right.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


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
    data, header = encode_change(trained, start, wire, seed=1), header_of(wire, dtype, shape)
    assert (len(data), header.shape) == (header.nbytes, shape)
    back = decode_change(header, data, start)
    assert torch.equal(as_received(trained, start, wire, seed=1), back)
    assert (back.dtype, back.shape) == (dtype, trained.shape)
    change = trained.double() - start.double()
    largest = float(change.abs().max()) if change.numel() else 0.0
    bound = {STYPE: 0.0, BF16_STYPE: 2**-8, INT8_STYPE: 1 / 127}[header.stype]
    rounding = torch.finfo(dtype).eps * float(start.abs().max()) if start.numel() and bound else 0.0
    assert bool(((back.double() - trained.double()).abs() <= bound * largest * 1.001 + rounding).all())
    assert torch.equal(trained, kept[0])
    assert torch.equal(start, kept[1])


def test_sizes_are_half_and_a_quarter_and_never_more_than_raw() -> None:
    sizes = [header_of(wire, torch.float32, (16, 4096)).nbytes for wire in WIRES]
    assert sizes == [16 * 4096 * 4, 16 * 4096 * 2, 16 * 4096 + 16 * 4]
    assert header_of("int8", torch.float32, (4096, 16)).nbytes == sizes[2]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for shape in ((), (1,), (2,), (1, 1), (7, 1), (0,), (3, 3)):
            raw, *lossy = [header_of(wire, dtype, shape) for wire in WIRES]
            assert all(header == raw or header.nbytes < raw.nbytes for header in lossy)
    assert header_of("bfloat16", torch.float16, (9, 9)).stype == STYPE


@pytest.mark.parametrize("wire", LOSSY)
def test_a_small_change_beside_a_large_value_is_not_lost(wire: str) -> None:
    start = torch.full((2, 200), 1.0)
    trained = start + 1e-5
    lost = trained.bfloat16().float() - start
    assert float(lost.abs().max()) == 0.0
    assert torch.allclose(as_received(trained, start, wire, 0) - start, trained - start, rtol=0.01)


@pytest.mark.parametrize("wire", WIRES)
def test_what_was_not_trained_comes_back_exactly(wire: str) -> None:
    start = torch.randn(8, 50, generator=G)
    assert torch.equal(as_received(start, start, wire, 0), start)


def test_int8_codes_that_no_client_makes_are_refused() -> None:
    start, header = torch.zeros(2, 8), header_of("int8", torch.float32, (2, 8))
    good = encode_change(torch.randn(2, 8, generator=G), start, "int8", 0)
    for at, byte in ((3, 0xBF), (8, 0x80)):  # the sign of a step; a code of -128
        data = bytearray(good)
        data[at] = byte
        with raises(ReplyError, "invalid-codes"):
            decode_change(header, bytes(data), start)


def test_the_raw_format_is_the_tensor_itself() -> None:
    value = torch.randn(3, 4, generator=G)
    assert encode_change(value, torch.zeros(3, 4), "float32", 0) == raw_bytes(value) == value.numpy().tobytes()
    header = raw_header(value)
    assert torch.equal(from_raw(value.numpy().tobytes(), header.dtype, header.shape), value)


def test_what_is_decoded_owns_its_memory() -> None:
    data = bytes(16)
    from_raw(data, "float32", (4,)).add_(1.0)
    assert data == bytes(16)


def test_each_tensor_client_and_round_is_rounded_by_its_own_draw() -> None:
    start = AdapterState({}, {name: torch.zeros(1, 400) for name in ("a", "b")})
    trained = {name: torch.linspace(0.1, 1.0, 400)[None] for name in ("a", "b")}

    def sent(round_number: int, client_id: int, seed: int = 0) -> dict[str, bytes]:
        return TrainRequest(ClientPlan(start), round_number, client_id, wire="int8").encode(trained, seed)

    assert sent(1, 0) == sent(1, 0)
    bodies = [*sent(1, 0).values(), sent(2, 0)["a"], sent(1, 1)["a"], sent(1, 0, seed=1)["a"]]
    assert len(set(bodies)) == 5


@pytest.mark.parametrize("wire", WIRES)
def test_a_simulation_uses_what_a_server_would_decode(wire: str) -> None:
    start = AdapterState({}, {name: torch.randn(3, 40, generator=G) for name in ("a", "b")})
    request = TrainRequest(ClientPlan(start), 2, 1, wire=wire)
    trained = {name: value + 0.1 for name, value in request.starts.items()}
    bodies, received = request.encode(trained, 7), request.as_received(trained, 7)
    assert bodies.keys() == received.keys() == trained.keys()
    for name, data in bodies.items():
        assert torch.equal(decode_change(request.headers[name], data, request.starts[name]), received[name])


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    ("rule", "wire"), [*((rule, "int8") for rule in ("fedavg", "ffa", "flora", "fair")), ("fedavg", "bfloat16")]
)
def test_every_rule_learns_as_well_and_sends_what_was_announced(tiny_config: MakeConfig, rule: str, wire: str) -> None:
    settings = (f"strategy.name={rule}", "server.evaluate_every=3")
    exact, config = run(tiny_config(*settings, name="exact")), tiny_config(*settings, f"wire.up={wire}")
    rounded = run(config)
    workspace = open_workspace(config)
    layouts = [workspace.base.layout()] * 4
    sizes = [
        measure_traffic(load_aggregator(rule), workspace.base.initial_adapter(0), layouts, name).up
        for name in ("float32", wire)
    ]
    assert sizes[1] < {"bfloat16": 0.51, "int8": 0.36}[wire] * sizes[0]
    saved = exact.records[2]["bytes_up"] - rounded.records[2]["bytes_up"]
    assert saved == pytest.approx(4 * (sizes[0] - sizes[1]), abs=64)  # the seconds' digits differ
    assert exact.records[1]["bytes_down"] == pytest.approx(rounded.records[1]["bytes_down"], abs=64)
    assert not same(exact.adapter, rounded.adapter)
    assert rounded.records[-1]["loss"] == pytest.approx(exact.records[-1]["loss"], abs=0.01)
    assert (max(record["aggregation_error"] for record in rounded.records[1:]) < 1e-6) == (rule in ("ffa", "flora"))
    if rule == "ffa":
        initial = workspace.base.initial_adapter(0)
        state = rounded.state.adapter
        assert all(torch.equal(state.pairs[name].A, initial.pairs[name].A) for name in state.pairs)


@pytest.mark.parametrize("rule", ["fedavg", "flora"])
def test_a_rounded_run_that_was_cut_ends_as_one_that_was_not(tiny_config: MakeConfig, rule: str) -> None:
    settings = (f"strategy.name={rule}", "wire.up=int8", "server.fraction=0.5", "server.evaluate_every=3")
    whole = run(tiny_config(*settings, name="whole"))
    config = tiny_config(*settings, name="cut")
    resumed = cut_and_resumed(config, 2)
    assert same(resumed.adapter, whole.adapter)


def test_a_private_run_is_rounded_after_the_noise_and_claims_the_same(tiny_config: MakeConfig) -> None:
    settings = (
        *("server.weighting=uniform", "train.steps=2", "train.batch_size=10", "server.evaluate_every=2", "rounds=2"),
        *("privacy.public_examples=40", "privacy.delta=1e-3", "privacy.max_grad_norm=0.5", "privacy.accountant=rdp"),
        "privacy.noise_multiplier=1.5",
    )
    exact, rounded = run(tiny_config(*settings)), run(tiny_config(*settings, "wire.up=int8", name="rounded"))
    claims = [outcome.rundir.read_json("result.json")["privacy"]["epsilon"] for outcome in (exact, rounded)]
    assert claims[0] == claims[1]
    assert rounded.records[1]["answered"] == [0, 1, 2, 3]
    assert rounded.records[1]["bytes_up"] < 0.5 * exact.records[1]["bytes_up"]
