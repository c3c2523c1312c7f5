"""Fed-SB and RAVAN in whole runs: wherever the clients are, after a kill, in private, and as a plain LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command_line import succeeds
from support.federations import deploy, require_same, simulate
from support.interrupted import killed_and_resumed
from support.kept import newest
from support.tiny_federations import MakeConfig

ALIKE = ("train.lr=0.05", "runtime.cohort=1", "runtime.prefix_cache=off")
CORED = {"fedsb": "strategy.name=fedsb", "ravan": "strategy={name='ravan', heads=2}"}
cored = pytest.mark.parametrize("rule", CORED.values(), ids=CORED)


@pytest.mark.slow
@pytest.mark.verified
@cored
def test_on_a_grid_it_is_the_same_and_what_it_exports_is_plain_lora(tiny_config: MakeConfig, rule: str) -> None:
    here = simulate(tiny_config(rule, *ALIKE, "rounds=2", name="here"))
    require_same(here, deploy(tiny_config(rule, *ALIKE, "rounds=2", name="grid")))
    assert here.records[-1]["aggregation_error"] < 1e-6
    sent = [record["bytes_up"] for record in here.records[1:]]
    plain = simulate(tiny_config(*ALIKE, "rounds=2", name="plain"))
    assert sent[0] < 0.5 * plain.records[1]["bytes_up"]
    assert here.records[2]["bytes_down"] < 0.5 * here.records[1]["bytes_down"]
    exported = load_file(here.rundir.adapter_dir / "adapter_model.safetensors")
    for name, pair in here.state.adapter.pairs.items():
        assert pair.core is not None
        assert pair.core.any()
        assert torch.equal(exported[f"base_model.model.{name}.lora_A.weight"], pair.A)
        core = pair.core if pair.core.ndim == 2 else torch.block_diag(*pair.core)
        torch.testing.assert_close(exported[f"base_model.model.{name}.lora_B.weight"], pair.B @ core)


@pytest.mark.slow
@cored
def test_killed_and_resumed_it_comes_to_the_same(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    keys = (rule, *ALIKE, "rounds=4", "server.fraction=0.5")
    straight = simulate(tiny_config(*keys, name="straight"))
    again = killed_and_resumed(tiny_config(*keys, name="killed"), 3, monkeypatch)
    require_same(straight, again, "bytes_down")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "key"),
    [
        *product(CORED.values(), ["wire.up=int8", "wire={up='topk', fraction=0.3}", "train.keep_optimizer=true"]),
        pytest.param(CORED["ravan"], "runtime.processes=2", marks=pytest.mark.nightly),
    ],
)
def test_it_goes_with_what_other_rules_go_with(tiny_config: MakeConfig, rule: str, key: str) -> None:
    found = simulate(tiny_config(rule, ALIKE[0], key, "rounds=2"))
    assert all(bool(value.any()) for value in found.state.adapter.tensors(("R",)).values())


@pytest.mark.slow
@cored
def test_private_clients_train_cores_and_clients_can_keep_a_head_or_a_model(
    tiny_config: MakeConfig, same_secrets: Callable[[], None], tmp_path: Path, rule: str
) -> None:
    privacy = "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}"
    same_secrets()
    keys = (rule, *ALIKE, privacy, "server.weighting=uniform", "server.aggregation_error=false", "rounds=2")
    private: Any = simulate(tiny_config(*keys, name="private"))
    assert all(bool(value.any()) for value in private.state.adapter.tensors(("R",)).values())
    own = ("evaluation.on=clients", "evaluation.min_examples=2", "rounds=2")
    inner = "{name='fedsb'}" if rule == CORED["fedsb"] else rule.removeprefix("strategy=")
    kept = simulate(tiny_config(f"strategy={{name='fedper', inner={inner}}}", *ALIKE, *own, name="kept"))
    assert kept.records[-1]["federated"]["clients"] != kept.records[-1]["federated"]["shared"]["clients"]
    ditto = simulate(tiny_config(rule, *ALIKE, "train.personal=0.5", *own, name="ditto"))
    assert ditto.records[-1]["federated"]["clients"] != ditto.records[-1]["federated"]["shared"]["clients"]
    succeeds("export", ditto.rundir.path, tmp_path / "out", "--client", "1")
    mine = newest(ditto.rundir.clients_dir, 1)
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, core in ((name, value) for name, value in mine.items() if name.endswith(":R")):
        module, whole = name.removesuffix(":R"), core if core.ndim == 2 else torch.block_diag(*core)
        wanted = mine[f"{module}:B"] @ whole
        assert wanted.any()
        torch.testing.assert_close(exported[f"base_model.model.{module}.lora_B.weight"], wanted)
