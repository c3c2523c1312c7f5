"""Top-k uploads: what a client did not send it keeps, through absence, kills and lost replies to the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.errors import raises
from support.federations import deploy, simulate, weights
from support.interrupted import killed_and_resumed
from support.kept import files
from support.tiny_federations import MakeConfig

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientPlan
from fedlora.errors import ConfigError, ReplyError
from fedlora.federation.client_store import RESIDUAL, ClientStore, divided, named
from fedlora.federation.client_training import sent_and_residual
from fedlora.federation.load_rule import load_rule
from fedlora.federation.protocol import TrainRequest
from fedlora.state_io import unpack

TOPK = ("wire={up='topk', fraction=0.2}", "runtime.cohort=1", "runtime.prefix_cache=off", "train.steps=2")


def request(number: int, start: dict[str, torch.Tensor], before: int, sends: str = "dense") -> TrainRequest:
    plan = ClientPlan(AdapterState({}, start), sends=frozenset({sends}))
    return TrainRequest(plan, number, 0, wire="topk", fraction=0.25, kept_round=before)


def test_nothing_is_lost_of_what_a_client_changed(tmp_path: Path) -> None:
    """Algorithm 1 of Stich et al.: what was sent so far and what is kept are all changes so far, in every round."""
    draw, store = torch.Generator().manual_seed(0), ClientStore(tmp_path)
    changed, sent = torch.zeros(2, 6), torch.zeros(2, 6)
    for number in range(1, 8):
        start = {"w": torch.randn(2, 6, generator=draw)}
        step = 0.1 * torch.randn(2, 6, generator=draw)
        asked = request(number, start, number - 1)
        out, residual = sent_and_residual(asked, {"w": start["w"] + step}, store, 0)
        store.save(0, number, named(RESIDUAL, residual), number - 1)
        received = asked.decode(asked.encode(out, 0))["w"]
        assert int((received != start["w"]).sum()) <= 3, "a quarter of twelve"
        changed, sent = changed + step, sent + received - start["w"]
        torch.testing.assert_close(sent + residual["w"], changed, rtol=0, atol=1e-6)
    assert float(residual["w"].abs().max()) > 0.05, "or nothing was left out"


def test_a_tensor_that_is_not_asked_for_keeps_what_it_has_to_send(tmp_path: Path) -> None:
    store, start = ClientStore(tmp_path), {"a": torch.zeros(8), "b": torch.zeros(8)}
    steps = {name: torch.arange(8.0) for name in "ab"}
    _, first = sent_and_residual(request(1, start, 0), steps, store, 0)
    store.save(0, 1, named(RESIDUAL, first), 0)
    _, second = sent_and_residual(request(2, start, 1, "a"), {"a": steps["a"]}, store, 0)
    assert torch.equal(second["b"], first["b"])
    assert torch.equal(second["a"], torch.tensor([0.0, 2, 4, 6, 0, 0, 6, 7])), "4 + 4 and 5 + 5 go first"


def test_half_precision_keeps_its_residual_in_single(tmp_path: Path) -> None:
    start = {"w": torch.ones(40).bfloat16()}
    asked = replace(request(1, start, 0), fraction=0.1)
    sent, residual = sent_and_residual(asked, {"w": start["w"] + 0.125}, ClientStore(tmp_path), 0)
    received = asked.decode(asked.encode(sent, 0))["w"]
    assert received.dtype == torch.bfloat16
    assert received.tolist() == [1.125] * 4 + [1.0] * 36
    assert residual["w"].dtype == torch.float32
    assert residual["w"].tolist() == [0.0] * 4 + [0.125] * 36


def test_a_residual_of_another_shape_is_refused(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.save(0, 1, named(RESIDUAL, {"w": torch.ones(3)}), 0)
    with raises(ReplyError, "kept-part-differs", "'w' (3,)"):
        sent_and_residual(request(2, {"w": torch.ones(8)}, 1), {"w": torch.ones(8)}, store, 0)


@pytest.mark.parametrize(
    ("strategy", "other"),
    [
        ("{name='flexlora'}", "{name='fedavg'}"),
        ("{name='flora'}", "{name='ffa'}"),
        ("{name='fslora'}", "{name='rolora'}"),
        ("{name='krum', inner={name='fslora'}}", "{name='krum', inner={name='hetlora'}}"),
    ],
)
def test_a_rule_whose_units_change_takes_no_residual(tiny_config: MakeConfig, strategy: str, other: str) -> None:
    with raises(ConfigError, "residual-of-other-units", "wire.error_feedback = false"):
        load_rule(tiny_config(*TOPK, f"strategy={strategy}"))
    load_rule(tiny_config(*TOPK, f"strategy={other}"))
    load_rule(tiny_config(*TOPK, f"strategy={strategy}", "wire.error_feedback=false"))


@pytest.mark.parametrize("key", ["fraction=0.5", "error_feedback=false"])
def test_keys_of_topk_need_it(tiny_config: MakeConfig, key: str) -> None:
    with raises(ConfigError, "key-without-effect", "wire.up = 'topk'"):
        tiny_config(f"wire.{key}")


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the clients are away in each round."""
    keys = (*TOPK, "server.fraction=0.5", "rounds=4", "evaluation.every=4")
    straight = simulate(tiny_config(*keys, name="straight"))
    resumed = killed_and_resumed(tiny_config(*keys, name="killed"), 3, monkeypatch)
    assert weights(straight) == weights(resumed)
    kept = files(straight.rundir.clients_dir)
    assert kept == files(resumed.rundir.clients_dir)
    residual = [divided(unpack(one)[0])[2] for one in kept.values()]
    assert all(value.any() for one in residual for name, value in one.items() if name.endswith(":B"))
    without = simulate(tiny_config(*keys, "wire.error_feedback=false", name="without"))
    assert weights(without) != weights(straight)
    assert not without.rundir.clients_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "rolora", "fedsa"])
def test_a_deployment_sends_and_keeps_the_same(tiny_config: MakeConfig, tmp_path: Path, strategy: str) -> None:
    at_clients = ("evaluation.on=clients", "evaluation.min_examples=2") if strategy == "fedsa" else ()
    keys = (*TOPK, f"strategy.name={strategy}", "rounds=3", *at_clients)
    grid = deploy(tiny_config(*keys, name="grid"), ledgers=tmp_path)
    here = simulate(tiny_config(*keys, name="here"))
    assert weights(grid) == weights(here)
    assert files(here.rundir.clients_dir) == files(tmp_path / "kept" / grid.rundir.run_id)
    assert [line["bytes_up"] for line in grid.records[1:]] == [line["bytes_up"] for line in here.records[1:]]


@pytest.mark.nightly
@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_private_run_sends_the_same_number_and_claims_the_same(
    tiny_config: MakeConfig, same_secrets: Callable[[], None], tmp_path: Path, unit: str
) -> None:
    privacy = {
        "example": "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}",
        "client": "privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}",
    }[unit]
    keys = (privacy, "server.weighting=uniform", "server.aggregation_error=false", "rounds=2")
    same_secrets()
    here = simulate(tiny_config(*TOPK, *keys, name="here"))
    same_secrets()
    grid = deploy(tiny_config(*TOPK, *keys, name="grid"), ledgers=tmp_path)
    assert weights(here) == weights(grid)
    same_secrets()
    whole = simulate(tiny_config(*TOPK, *keys, "wire={up='float32'}", name="whole"))
    claims = [outcome.rundir.read_json("result.json")["privacy"]["epsilon"] for outcome in (here, whole)]
    assert math.isfinite(claims[0])
    assert claims[0] == claims[1]
