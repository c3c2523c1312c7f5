"""The law of what is left out: logits and gradients are those of the whole model, and it can be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_classifiers import check_same, classifier, everything, inputs_of
from torch import Tensor, nn

from fedlora.speedups.attention import Mode, choose_attention
from fedlora.speedups.last_layer import PLACES, restore_unread, skip_unread

ALL_TOKENS = {
    "Bert": {"attention.self.key", "attention.self.value"},
    "Roberta": {"attention.self.key", "attention.self.value"},
    "DistilBert": {"attention.k_lin", "attention.v_lin"},
    "ViT": {"layernorm_before", "attention.k_proj", "attention.v_proj"},
}
"""What nothing can be left out of: what keys and values are made by."""
QUERY = {
    "Bert": "attention.self.query",
    "Roberta": "attention.self.query",
    "DistilBert": "attention.q_lin",
    "ViT": "attention.q_proj",
}
PROJECTIONS = ["query", "key", "value", "q_lin", "k_lin", "v_lin", "q_proj", "k_proj", "v_proj"]


def last_layer(model: nn.Module) -> nn.Module:
    layers: Any = model.get_submodule(PLACES[type(model).__name__].layers)
    found: nn.Module = layers[-1]
    return found


def inject(model: nn.Module, **more: Any) -> None:
    """LoRA on queries, keys and values, with factors away from zero."""
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=2, target_modules=PROJECTIONS, **more))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)


def seeing_all(model: nn.Module, inputs: dict[str, Tensor]) -> set[str]:
    """The modules of the last layer with parameters that are given as many tokens as the model."""
    rows: dict[str, int] = {}
    handles = []
    for name, module in last_layer(model).named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):

            def note(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor, name: str = name) -> None:
                rows[name] = args[0].shape[1]

            handles.append(module.register_forward_hook(note))
    model(**inputs)
    for handle in handles:
        handle.remove()
    assert set(rows.values()) <= {1, max(rows.values())}
    return {name for name, count in rows.items() if count > 1}


@pytest.mark.parametrize("kind", list(ALL_TOKENS))
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_logits_and_gradients_are_those_of_the_whole_model(kind: str, padding: str, attention: Mode) -> None:
    model, inputs = classifier(kind), inputs_of(kind, padding)
    choose_attention(model, attention)
    whole, all_modules = everything(model, inputs), seeing_all(model, inputs)
    assert all_modules > ALL_TOKENS[kind] | {QUERY[kind]}
    assert skip_unread(model)
    assert skip_unread(model)
    check_same(everything(model, inputs), whole)
    queries = set() if attention == "auto" else {QUERY[kind]}
    assert seeing_all(model, inputs) == ALL_TOKENS[kind] | queries
    restore_unread(model)
    assert seeing_all(model, inputs) == all_modules
    assert all(torch.equal(value, whole[name]) for name, value in everything(model, inputs).items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", list(ALL_TOKENS))
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("injected", ["before", "after", "and taken out"])
def test_adapters_on_the_last_layer_see_what_they_should(kind: str, dora: bool, injected: str) -> None:
    model, inputs = classifier(kind), inputs_of(kind, "right")
    choose_attention(model)
    if injected == "after":
        skip_unread(model)
    inject(model, use_dora=dora)
    if injected == "after":
        found = everything(model, inputs)
        restore_unread(model)
        check_same(found, everything(model, inputs))
        return
    whole = everything(model, inputs)
    skip_unread(model)
    check_same(everything(model, inputs), whole)
    assert not any("_A" in name for name in seeing_all(model, inputs) if QUERY[kind] in name)
    if injected == "and taken out":
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if hasattr(child, "base_layer"):
                    setattr(parent, name, child.base_layer)
        model.requires_grad_(True)
        found = everything(model, inputs)
        restore_unread(model)
        check_same(found, everything(model, inputs))


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "ViT"])
@pytest.mark.parametrize("limit", [0, 3, 256])
def test_in_bfloat16_too_by_both_ways_to_attend(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.speedups.attention.SHORT", {("cpu", torch.bfloat16): limit})
    model, inputs = classifier(kind).bfloat16(), inputs_of(kind, "right")
    inputs = {name: v.bfloat16() if v.is_floating_point() else v for name, v in inputs.items()}
    choose_attention(model)
    whole = model(**inputs).logits.detach()
    skip_unread(model)
    found = model(**inputs).logits.detach()
    assert float((found - whole).norm() / whole.norm()) < 0.02


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
@pytest.mark.parametrize("limit", [0, 256])
def test_a_mask_with_a_row_for_each_query(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.speedups.attention.SHORT", {("cpu", torch.float64): limit})
    model, inputs = classifier(kind), inputs_of(kind)
    choose_attention(model)
    rows, tokens = inputs["input_ids"].shape
    mask = torch.rand(rows, 1, tokens, tokens, generator=torch.Generator().manual_seed(2)) < 0.6
    inputs["attention_mask"] = mask | torch.eye(tokens, dtype=torch.bool)
    whole = everything(model, inputs)
    skip_unread(model)
    check_same(everything(model, inputs), whole)
    assert QUERY[kind] not in seeing_all(model, inputs)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_a_sequence_of_one_token(kind: str) -> None:
    model, inputs = classifier(kind), inputs_of(kind, tokens=1)
    choose_attention(model)
    whole = everything(model, inputs)
    skip_unread(model)
    check_same(everything(model, inputs), whole)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_decoders_first_query_sees_no_later_key(kind: str) -> None:
    model, inputs = classifier(kind, is_decoder=True, use_cache=False), inputs_of(kind)
    choose_attention(model)
    whole = everything(model, inputs)
    skip_unread(model)
    check_same(everything(model, inputs), whole)
    assert QUERY[kind] in seeing_all(model, inputs)


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Qwen2"])
def test_other_models_are_left_alone(kind: str) -> None:
    model = classifier(kind)
    assert not skip_unread(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_cuts_sequences_into_chunks_is_left_alone() -> None:
    assert not skip_unread(classifier("DistilBert", chunk_size_feed_forward=2))
