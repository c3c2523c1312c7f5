"""Fed-SB in whole runs: wherever the clients are, after a kill, in private, and as a plain LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.federations import deploy, forget, require_same, simulate
from support.interrupted import killed_before_checkpoint

from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation

MakeConfig = Callable[..., RunConfig]
FEDSB = ("strategy.name=fedsb", "train.lr=0.05", "runtime.cohort=1", "runtime.prefix_cache=off")


@pytest.mark.slow
def test_on_a_grid_it_is_the_same_and_what_it_exports_is_plain_lora(tiny_config: MakeConfig) -> None:
    here = simulate(tiny_config(*FEDSB, "rounds=2", name="here"))
    require_same(here, deploy(tiny_config(*FEDSB, "rounds=2", name="grid")))
    assert here.records[-1]["aggregation_error"] < 1e-6
    sent = [record["bytes_up"] for record in here.records[1:]]
    plain = simulate(tiny_config(*FEDSB[1:], "rounds=2", name="plain"))
    assert sent[0] < 0.5 * plain.records[1]["bytes_up"]
    assert here.records[2]["bytes_down"] < 0.5 * here.records[1]["bytes_down"]
    exported = load_file(here.rundir.adapter_dir / "adapter_model.safetensors")
    for name, pair in here.state.adapter.pairs.items():
        assert pair.core is not None
        assert pair.core.any()
        assert torch.equal(exported[f"base_model.model.{name}.lora_A.weight"], pair.A)
        assert torch.equal(exported[f"base_model.model.{name}.lora_B.weight"], pair.B @ pair.core)


@pytest.mark.slow
def test_killed_and_resumed_it_comes_to_the_same(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*FEDSB, "rounds=4", "server.fraction=0.5")
    straight = simulate(tiny_config(*keys, name="straight"))
    config = tiny_config(*keys, name="killed")
    rundir = RunDir.create(config)
    with killed_before_checkpoint(3, monkeypatch):
        run_simulation(config, rundir, Callback())
    forget(config)
    require_same(straight, run_simulation(config, RunDir.open(rundir.path), Callback(), resume=True), "bytes_down")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("wire.up=int8",), ("train.keep_optimizer=true",), ("runtime.processes=2",)], ids=str)
def test_it_goes_with_what_other_rules_go_with(tiny_config: MakeConfig, keys: tuple[str, ...]) -> None:
    found = simulate(tiny_config(*FEDSB[:2], *keys, "rounds=2"))
    assert all(bool(value.any()) for value in found.state.adapter.tensors(("R",)).values())


@pytest.mark.slow
def test_private_clients_train_cores_and_clients_can_keep_a_head_or_a_model(
    tiny_config: MakeConfig, same_secrets: Callable[[], None]
) -> None:
    privacy = "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}"
    same_secrets()
    keys = (*FEDSB, privacy, "server.weighting=uniform", "server.aggregation_error=false", "rounds=2")
    private: Any = simulate(tiny_config(*keys, name="private"))
    assert all(bool(value.any()) for value in private.state.adapter.tensors(("R",)).values())
    own = ("evaluation.on=clients", "evaluation.min_examples=2", "rounds=2")
    kept = simulate(tiny_config(*FEDSB[1:], "strategy={name='fedper',inner={name='fedsb'}}", *own, name="kept"))
    assert kept.records[-1]["federated"]["clients"] != kept.records[-1]["federated"]["shared"]["clients"]
    ditto = simulate(tiny_config(*FEDSB, "train.personal=0.5", *own, name="ditto"))
    assert ditto.records[-1]["federated"]["clients"] != ditto.records[-1]["federated"]["shared"]["clients"]
