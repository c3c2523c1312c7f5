"""Whole federations with methods beyond LoRA: they learn, travel, resume, and leave an adapter that PEFT loads."""

from __future__ import annotations

import pytest
import torch
from support.errors import raises
from support.federations import deploy
from support.federations import simulate as run
from support.interrupted import cut_and_resumed
from support.tiny_federations import MakeConfig

from fedlora.errors import PrivacyError, RuleError
from fedlora.evaluation.baselines import centralised
from fedlora.model.peft_methods import METHODS
from fedlora.simulation.run import refuse_early
from fedlora.training.workspace import open_workspace

SMALL = {
    "fourierft": ["adapter.options={n_frequency=50}"],
    "boft": ["adapter.options={boft_block_size=4}"],
    "oft": ["adapter.options={oft_block_size=4}"],
    "vblora": ["adapter.rank=4", "adapter.options={num_vectors=8, vector_length=4}"],
    "c3a": ["adapter.options={block_size=4}"],
    "road": ["adapter.options={group_size=8}"],
}

RATES = dict.fromkeys(("ia3", "vera", "vblora", "c3a", "road", "hira"), 0.05)
"""Of methods that train few values; 0.01 for the others."""


def keys(method: str, *more: str) -> list[str]:
    ours = ["adapter.rank=8", "adapter.alpha=16.0"]  # what the method has no use for is refused, unless it is unset
    return [*ours, f"adapter.method={method}", *SMALL.get(method, []), *more]


FAST = ("pissa", "vera")


@pytest.mark.slow
@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.nightly) for m in METHODS])
def test_a_federation_learns_with_every_method(tiny_config: MakeConfig, method: str) -> None:
    outcome = run(tiny_config(*keys(method, "rounds=8", f"train.lr={RATES.get(method, 0.01)}")))
    first, *rounds = outcome.records
    assert rounds[-1]["accuracy"] > first["accuracy"] + 0.2
    assert ("aggregation_error" in rounds[0]) == METHODS[method].bilinear
    assert (outcome.rundir.adapter_dir / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("ffa", "fair"))])
def test_what_the_base_gave_up_is_sent_once_and_survives_a_resume(tiny_config: MakeConfig, rule: str) -> None:
    table = keys("pissa", f"strategy.name={rule}", "rounds=4")
    whole = run(tiny_config(*table, name="whole"))
    assert len(whole.state.base_updates) == 1
    downs = [record["bytes_down"] for record in whole.records[1:]]
    assert downs[0] > downs[1] == downs[2] == downs[3]
    deployed = deploy(tiny_config(*table, "runtime.cohort=1", name="deployed"))
    assert [record["bytes_down"] for record in deployed.records[1:]] == downs
    config = tiny_config(*table, name="cut")
    resumed = cut_and_resumed(config, 3)
    tensors = whole.adapter.tensors()
    assert all(torch.equal(value, tensors[name]) for name, value in resumed.adapter.tensors().items())


@pytest.mark.slow
def test_the_aggregation_error_is_that_of_the_change_of_the_pristine_base(tiny_config: MakeConfig) -> None:
    """What the base gave up is far larger than what is learnt: counted in, it would hide any error."""
    errors = {
        method: [record["aggregation_error"] for record in run(tiny_config(*keys(method), name=method)).records[1:]]
        for method in ("pissa", "lora")
    }
    assert min(errors["pissa"]) > 1e-3
    exact = run(tiny_config(*keys("pissa", "strategy.name=ffa"), name="exact")).records[1:]
    assert max(record["aggregation_error"] for record in exact) < 1e-4


def test_baselines_start_from_the_same_base(tiny_config: MakeConfig) -> None:
    workspace = open_workspace(tiny_config(*keys("pissa", "rounds=6")))
    assert centralised(workspace)["accuracy"] > 0.7


@pytest.mark.parametrize(("rule", "method"), [("flora", "pissa"), ("flora", "dora"), ("ffa", "vera"), ("fair", "ia3")])
def test_what_does_not_go_together_is_said_before_anything_is_written(
    tiny_config: MakeConfig, rule: str, method: str
) -> None:
    config = tiny_config(*keys(method, f"strategy.name={rule}"))
    with raises(RuleError, "rule-method-mismatch", method):
        refuse_early(config, open_workspace(config))


@pytest.mark.parametrize("method", ["dora", "vera", "ia3", "pissa"])
def test_private_training_refuses_what_it_cannot_clip(tiny_config: MakeConfig, method: str) -> None:
    config = tiny_config(
        *keys(method, "privacy={noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, public_examples=20}"),
        "server.weighting=uniform",
    )
    workspace = open_workspace(config)
    if method == "pissa":
        refuse_early(config, workspace)
        return
    with raises(PrivacyError, "no-per-sample-gradients", method, "adapter.method"):
        refuse_early(config, workspace)
