"""PEFT's methods beyond LoRA: each starts as the base, trains, comes back the same, and loads with PEFT alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.errors import raises
from torch import Tensor, nn

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientSpec, equivalent_adapter, load_aggregator
from fedlora.config import AdapterConfig, ModelConfig, RunConfig, RuntimeConfig
from fedlora.errors import ConfigError, FedloraError, ModelError, RuleError
from fedlora.federation.initial_state import first_state
from fedlora.federation.planner import plan_for
from fedlora.model import Base, load_base, save_adapter, save_merged
from fedlora.model.adapter_files import read_adapter
from fedlora.model.lora_init import residual
from fedlora.model.peft_methods import METHODS, REFUSED, find_method

IDS = torch.tensor([[2, 9, 30, 41, 3, 0], [2, 50, 51, 52, 53, 3]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
SMALL: dict[str, dict[str, Any]] = {
    "fourierft": {"n_frequency": 50},
    "boft": {"boft_block_size": 4},
    "oft": {"oft_block_size": 4},
    "vblora": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "c3a": {"block_size": 4},
    "road": {"group_size": 8},
}
"""Options for layers of 32 units, where PEFT's own are for larger ones."""
NEAR = ("vblora", "c3a")
"""Whose change is small at the start, by their papers' own choice, and not zero."""


def load(path: Path, method: str, dtype: str = "float32", seed: int = 0, **adapter: Any) -> Base:
    table = {"rank": 4, "targets": ("query", "value"), "options": SMALL.get(method, {}), **adapter}
    config = RunConfig(
        seed=seed,
        model=ModelConfig(name=str(path), dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(
            method=method, **({"rank": 8} if "rank" not in _keys(method) else {}) | _only(method, table)
        ),
        runtime=RuntimeConfig(device="cpu"),
    )
    kwargs = {"num_labels": 3, "pad_token_id": 0}
    return load_base(config, "AutoModelForSequenceClassification", ("classifier",), kwargs, "SEQ_CLS")


def _keys(method: str) -> tuple[str, ...]:
    found = METHODS[method]
    return ("rank",) if found.pairs else tuple(found.keys)


def _only(method: str, table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "rank" or "rank" in _keys(method)}


def logits(module: nn.Module) -> Tensor:
    module.eval()
    with torch.no_grad():
        found: Tensor = module(**BATCH).logits
    return found


def start(base: Base, seed: int = 0) -> AdapterState:
    """The initial adapter, written to a base of the version that it needs."""
    state = base.initial_adapter(seed)
    base_updates = base.initial_base_updates(state)
    base.rebase(len(base_updates), base_updates)
    base.write(state)
    return state


def trained(base: Base, state: AdapterState) -> AdapterState:
    """After two steps: a factor of zero hides the other's gradient in the first."""
    for _ in range(2):
        parameters = base.write(state)
        loss = nn.functional.cross_entropy(base.model(**BATCH).logits.float(), torch.tensor([0, 2]))
        loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 0.02 * parameter.grad / (parameter.grad.norm() + 1e-9)
        state = base.read()
    return state


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_the_base_alone(tiny_bert: Path, method: str) -> None:
    base = load(tiny_bert, method)
    state = start(base)
    found = logits(base.model)
    with base.peft_model.disable_adapter():
        base.rebase(0, ())
        head = base.model.get_submodule("classifier")
        head.original_module.load_state_dict(head.modules_to_save["default"].state_dict())
        wanted = logits(base.model)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) == (method not in NEAR)
    assert torch.allclose(found, wanted, atol=0.1)
    assert bool(state.pairs) == METHODS[method].pairs


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_comes_back_and_loads_with_peft(tiny_bert: Path, tmp_path: Path, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = load(tiny_bert, method)
    first = start(base)
    state = trained(base, first)
    moved = [name for name, value in state.tensors().items() if not torch.equal(value, first.tensors()[name])]
    assert any("classifier" not in name for name in moved)
    base.write(state)
    wanted = logits(base.model)
    assert not torch.allclose(wanted, logits_of(base, first), atol=1e-4)
    base.write(state)
    assert torch.equal(logits(base.model), wanted)

    global_state = first_state(load_aggregator("fedavg", {}), base, 0)
    exported, _ = equivalent_adapter(_with(global_state, state), 1 << 30)
    base.rebase(0, ())
    save_adapter(base, exported, tmp_path / "adapter", {})
    read = read_adapter(base, tmp_path / "adapter")
    assert read.tensors().keys() == exported.tensors().keys()
    assert all(torch.equal(read.tensors()[name], value) for name, value in exported.tensors().items())
    assert [pair.scale for pair in read.pairs.values()] == [pair.scale for pair in exported.pairs.values()]
    torch.manual_seed(99)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    torch.manual_seed(98)
    assert torch.allclose(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), wanted, rtol=1e-4, atol=1e-4)

    save_merged(base, state, global_state.base_updates, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), wanted, rtol=1e-3, atol=1e-3)


def logits_of(base: Base, state: AdapterState) -> Tensor:
    base.write(state)
    return logits(base.model)


def _with(state: Any, adapter: AdapterState) -> Any:
    from dataclasses import replace

    return replace(state, adapter=adapter)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_another_process_draws_the_same_adapter_from_the_same_seed(tiny_bert: Path, method: str) -> None:
    base = load(tiny_bert, method, seed=3)
    first, fingerprint = base.initial_adapter(3), base.fingerprint
    torch.manual_seed(1234)
    again = load(tiny_bert, method, seed=3)
    assert again.fingerprint == fingerprint
    found = again.initial_adapter(3).tensors()
    assert all(torch.equal(value, found[name]) for name, value in first.tensors().items())


def test_frozen_projections_are_part_of_the_fingerprint(tiny_bert: Path) -> None:
    one = load(tiny_bert, "vera").fingerprint
    assert load(tiny_bert, "vera", options={"projection_prng_key": 1}).fingerprint != one
    one = load(tiny_bert, "fourierft").fingerprint
    assert load(tiny_bert, "fourierft", options={"n_frequency": 50, "random_loc_seed": 1}).fingerprint != one
    one = load(tiny_bert, "shira").fingerprint
    assert load(tiny_bert, "shira", options={"random_seed": 1}).fingerprint != one


def test_a_tuner_is_drawn_for_one_seed(tiny_bert: Path) -> None:
    with raises(ModelError, "seed-mismatch", "seed 0", "seed 1"):
        load(tiny_bert, "lokr").initial_adapter(1)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_start_and_the_base_are_pefts_own(tiny_bert: Path, method: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = load(tiny_bert, method, alpha=6.0)
    state = start(base)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=method)  # type: ignore[arg-type]
    theirs = get_peft_model(plain, config).base_model.model
    for name, pair in state.pairs.items():
        layer = theirs.get_submodule(name)
        assert torch.allclose(pair.delta().float(), layer.get_delta_weight("default"), atol=1e-5)
        assert torch.allclose(
            base.model.get_submodule(name).get_base_layer().weight, layer.base_layer.weight, atol=1e-5
        )


def test_a_product_of_zero_costs_no_merge(tiny_bert: Path) -> None:
    for method in ("lora", "gaussian", "orthogonal"):
        assert residual(load(tiny_bert, method).initial_adapter(0)) == ()
    assert residual(load(tiny_bert, "pissa").initial_adapter(0))[0].version == 1


def test_a_base_of_a_later_version_starts_the_same(tiny_bert: Path) -> None:
    base = load(tiny_bert, "pissa")
    first = start(base)
    assert base.base_version == 1
    again = base.initial_adapter(0)
    assert all(torch.equal(pair.A, again.pairs[name].A) for name, pair in first.pairs.items())


def test_a_plan_brings_what_the_base_gave_up(tiny_bert: Path) -> None:
    base, rule = load(tiny_bert, "pissa"), load_aggregator("fedavg", {})
    state = first_state(rule, base, 0)
    plan = plan_for(rule, state, ClientSpec(0, base.layout()))
    assert (plan.base_version, len(plan.base_updates)) == (1, 1)
    assert plan_for(rule, state, ClientSpec(0, base.layout(), base_version=1)).base_updates == ()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_other_precisions_train_too(tiny_bert: Path, method: str, dtype: str) -> None:
    base = load(tiny_bert, method, dtype)
    state = trained(base, start(base))
    assert all(torch.isfinite(value).all() for value in state.tensors().values())
    assert {value.dtype for value in state.tensors().values()} == {base.adapter_dtype}


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("table", "code", "named"),
    [
        ({"method": "veera"}, "unknown-name", ["'vera'"]),
        ({"method": "DoRA"}, "unknown-name", ["'dora'"]),
        ({"method": "prompt_tuning"}, "method-not-federable", ["'prompt_tuning'", REFUSED["prompt_tuning"]]),
        ({"method": "lora_ga"}, "method-not-federable", ["'lora_ga'", REFUSED["lora_ga"]]),
        ({"method": "beft"}, "method-not-supported", ["'beft'"]),
        ({"method": "vera", "alpha": 4.0}, "key-without-effect", ["adapter.alpha", "'vera'", "rank, dropout"]),
        ({"method": "ia3", "rank": 4}, "key-without-effect", ["adapter.rank", "'ia3'"]),
        ({"method": "lora", "options": {"use_dora": True}}, "key-without-effect", ["'use_dora'"]),
    ],
)
def test_a_method_that_cannot_be_is_refused(table: dict[str, Any], code: str, named: list[str]) -> None:
    with raises(ConfigError, code, *named):
        find_method(AdapterConfig(**table))


@pytest.mark.parametrize(
    ("method", "options", "code", "named"),
    [
        ("vera", {"d_inital": 1.0}, "unknown-key", ["'d_initial'"]),
        ("vera", {"r": 4}, "option-has-a-key", ["adapter.options.r", "adapter.rank"]),
        ("vera", {"target_modules": ["x"]}, "unknown-key", ["adapter.options.target_modules"]),
        ("road", {"group_size": 64}, "modules-refused-by-peft", ["'road'"]),
    ],
)
def test_wrong_options_are_refused(
    tiny_bert: Path, method: str, options: dict[str, Any], code: str, named: list[str]
) -> None:
    with raises(FedloraError, code, *named):
        load(tiny_bert, method, options=options)


@pytest.mark.parametrize(
    ("rule", "method", "words"),
    [
        ("flora", "pissa", "draws its clients' A and B anew"),
        ("flora", "dora", "merges into the base"),
        ("fair", "vera", "or 'fedavg' or"),
        ("ffa", "ia3", "or 'fedavg' or"),
    ],
)
def test_a_rule_that_cannot_average_a_method_says_what_can(tiny_bert: Path, rule: str, method: str, words: str) -> None:
    with pytest.raises(RuleError) as caught:
        first_state(load_aggregator(rule, {}), load(tiny_bert, method), 0)
    assert words in str(caught.value)


@pytest.mark.parametrize("method", ["pissa", "orthogonal", "vera"])
def test_a_part_of_a_whole_adapter_is_refused(tiny_bert: Path, method: str) -> None:
    base = load(tiny_bert, method)
    with raises(ModelError, "mixed-ranks", repr(method), "rank 2", "clients.ranks"):
        base.layout(2)


def test_every_method_of_peft_has_an_answer() -> None:
    from peft import PeftType

    assert not METHODS.keys() & REFUSED.keys()
    for name in {kind.value.lower() for kind in PeftType} - METHODS.keys():
        with raises(ConfigError, "method-not-federable" if name in REFUSED else "method-not-supported", repr(name)):
            find_method(AdapterConfig(method=name))
