"""With the lower layers' states kept, a model computes what it computes without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.tiny_classifiers import TEXT, classifier, inputs_of
from torch import Tensor, nn

from fedlora.speedups.activation_cache import ActivationCache, UnfitError
from fedlora.speedups.cache_choice import ROUNDING, open_cache

TARGETS = {
    "Bert": ("query", "value"),
    "Roberta": ("query", "value"),
    "DistilBert": ("q_lin", "v_lin"),
    "GPT2": ("c_attn",),
    "Llama": ("q_proj", "v_proj"),
    "Qwen2": ("q_proj", "v_proj"),
    "ViT": ("q_proj", "v_proj"),
}


def adapted(
    kind: str, dtype: torch.dtype = torch.float64, above: int = 2, **more: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    """A three-layer model with filled adapters from layer `above` on, and their names."""
    model = classifier(kind, layers=3, **more).to(dtype)
    model.requires_grad_(False)
    names = [n for n, m in model.named_modules() if n.endswith(TARGETS[kind])]
    targets = tuple(n for n in names if int(next(p for p in n.split(".") if p.isdecimal())) >= above)
    assert targets
    inject_adapter_in_model(LoraConfig(r=2, target_modules="|".join(targets).replace(".", r"\.")), model)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
    return model, targets


def opened(
    model: nn.Module, targets: tuple[str, ...], inputs: dict[str, Tensor], capacity: int = 1000
) -> ActivationCache:
    prefix = open_cache(model, targets, (), {n: v[[1, 0]] for n, v in inputs.items()})
    prefix.clear(capacity)
    return prefix


def outcome(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits and the gradients of all adapters, in training mode."""
    model.train()
    model.zero_grad()
    logits = model(**inputs).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
    (logits.double() * weights).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(found) == len(wanted) > 2
    return max(float((a - b).norm() / max(1.0, b.norm())) for a, b in zip(found, wanted, strict=True))


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*TEXT, "ViT"])
def test_one_example_alone_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    model, targets = adapted(kind, dtype)
    inputs = cast(inputs_of(kind, "right"), dtype)
    first = {n: v[:1] for n, v in inputs.items()}  # the whole row
    wanted = outcome(model, first)
    prefix = opened(model, targets, inputs)
    for time in range(3):
        for a, b in zip(outcome(model, first), wanted, strict=True):
            assert torch.equal(a, b)
        assert (prefix.fills, prefix.hits) == (1, time)


def test_rounding_is_judged_by_what_the_layers_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head in float32 above layers in bfloat16 makes no finer model of it."""
    model, targets = adapted("Bert", torch.bfloat16)
    inputs = inputs_of("Bert", "right")
    head = model.get_submodule("classifier").float()
    head.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    wanted = outcome(model, inputs)[0]
    assert wanted.dtype == torch.float32
    monkeypatch.setitem(ROUNDING, torch.float32, -1.0)  # nothing is that good
    opened(model, targets, inputs)
    assert float((outcome(model, inputs)[0] - wanted).abs().max() / wanted.abs().max()) < 0.05


@pytest.mark.parametrize("above", [1, 2])
@pytest.mark.parametrize("kind", [*TEXT, "ViT"])
def test_a_batch_gives_the_same_logits_and_gradients(kind: str, above: int) -> None:
    model, targets = adapted(kind, above=above)
    inputs = inputs_of(kind, "right")
    wanted = outcome(model, inputs)
    prefix = opened(model, targets, inputs)
    assert gap(outcome(model, inputs), wanted) < 1e-12
    assert (prefix.fills, prefix.hits) == (3, 0)
    turned = {n: v[[2, 0, 1, 2]] for n, v in inputs.items()}
    found = outcome(model, turned)[0]
    assert float((found - wanted[0][[2, 0, 1, 2]]).abs().max()) < 1e-12
    assert (prefix.fills, prefix.hits) == (3, 4)
    prefix.close()
    for a, b in zip(outcome(model, inputs), wanted, strict=True):
        assert torch.equal(a, b)


def test_pictures_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, targets = adapted("ViT")
    inputs, rows, real = inputs_of("ViT", "right"), [], ActivationCache.reach

    def noted(self: ActivationCache, given: dict[str, Tensor]) -> Tensor:
        rows.append(len(given["pixel_values"]))
        return real(self, given)

    prefix = opened(model, targets, inputs)
    prefix.grouped = True
    monkeypatch.setattr(ActivationCache, "reach", noted)
    outcome(model, inputs)
    assert rows == [3]


def test_lower_layers_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, targets = adapted("Bert")
    inputs = inputs_of("Bert", "right")
    prefix = opened(model, targets, inputs)
    outcome(model, inputs)
    wanted = outcome(model, inputs)
    bert: Any = model.get_submodule("bert")
    for module in (bert.embeddings.word_embeddings, bert.encoder.layer[1].attention.self.query):
        module.weight.fill_(float("nan"))
    for a, b in zip(outcome(model, inputs), wanted, strict=True):
        assert torch.equal(a, b)
    prefix.clear(1000)
    assert not outcome(model, inputs)[0].isfinite().all()


def test_states_depend_on_the_example_alone() -> None:
    """Not on the batch in which it came first: what is kept after a kill and a resume is the same."""
    model, targets = adapted("Bert", torch.float32)
    inputs = inputs_of("Bert", "right")
    prefix = opened(model, targets, inputs)
    together = outcome(model, inputs)
    prefix.clear(1000)
    for row in (2, 0, 1):
        outcome(model, {n: v[row : row + 1] for n, v in inputs.items()})
    for a, b in zip(outcome(model, inputs), together, strict=True):
        assert torch.equal(a, b)
    assert prefix.fills == 3
    prefix.clear(8)  # room for the first example alone: the others are computed again, to the same bits
    for _ in range(2):
        for a, b in zip(outcome(model, inputs), together, strict=True):
            assert torch.equal(a, b)
    assert prefix.fills == 3 + 2
    assert prefix.size <= 9 * 16 * 4


@pytest.mark.parametrize("kind", [*TEXT, "ViT"])
def test_company_shows_in_no_bit_or_is_not_kept(kind: str) -> None:
    model, targets = adapted(kind, torch.float32)
    inputs = cast(inputs_of(kind, rows=9), torch.float32)
    prefix = opened(model, targets, inputs)
    prefix.prepare(inputs)
    assert prefix.fills == 9
    together = outcome(model, inputs)
    prefix.clear(1000)
    prefix.grouped = False
    for a, b in zip(outcome(model, inputs), together, strict=True):
        assert torch.equal(a, b)


def test_company_that_shows_is_avoided() -> None:
    model, targets = adapted("Bert", torch.float32)
    lower: Any = model.get_submodule("bert.encoder.layer.0.output.dense")
    handle = lower.register_forward_hook(lambda _m, _a, out: out + 1e-4 * len(out))
    assert not opened(model, targets, inputs_of("Bert", "right")).grouped
    handle.remove()


def test_evaluation_and_training_share_what_is_kept() -> None:
    model, targets = adapted("Llama")
    inputs = inputs_of("Llama", "right")
    wanted = outcome(model, inputs)
    prefix = opened(model, targets, inputs)
    model.eval()
    with torch.inference_mode():
        model(**inputs)
    assert gap(outcome(model, inputs), wanted) < 1e-12
    assert (prefix.fills, prefix.hits) == (3, 3)


def test_other_calls_go_through_all_layers() -> None:
    model, targets = adapted("Llama")
    inputs = inputs_of("Llama", "right")
    prefix = opened(model, targets, inputs)
    positions = torch.arange(7).expand(3, 7) + 2
    left = inputs_of("Llama", "left")
    calls: list[dict[str, Tensor]] = [{**inputs, "position_ids": positions}, left]
    found = [outcome(model, call) for call in calls]
    assert prefix.fills == prefix.hits == 0
    prefix.close()
    for call, one in zip(calls, found, strict=True):
        for a, b in zip(outcome(model, call), one, strict=True):
            assert torch.equal(a, b)


def test_a_failing_call_leaves_the_model_whole() -> None:
    model, targets = adapted("Bert")
    inputs = inputs_of("Bert", "right")
    prefix = opened(model, targets, inputs)
    handle = model.get_submodule(targets[0]).register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="no luck"):
        outcome(model, inputs)
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    assert prefix.fills == 3
    outcome(model, inputs)


def _fail(*_: Any) -> None:
    raise RuntimeError("no luck")


def test_what_cannot_be_kept_says_why() -> None:
    inputs = inputs_of("Bert", "right")
    model, targets = adapted("Bert", above=0)
    with pytest.raises(UnfitError, match="first layer"):
        opened(model, targets, inputs)
    for where in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        model, targets = adapted("Bert", **{where: 0.1})
        with pytest.raises(UnfitError, match=r"dropout \(0\.1\) below"):
            opened(model, targets, inputs)
    model, targets = adapted("Bert")
    with pytest.raises(UnfitError, match="trained too"):
        open_cache(model, targets, ("bert.embeddings",), inputs)
    with pytest.raises(UnfitError, match="more than token ids"):
        open_cache(model, targets, (), {**inputs, "position_ids": inputs["input_ids"]})
    noisy: Any = model.get_submodule("bert.encoder.layer.0.output.LayerNorm")
    noisy.register_forward_hook(lambda module, _args, out: out + 1e-3 * torch.randn(()) if module.training else out)
    with pytest.raises(UnfitError, match="something else in training"):
        opened(model, targets, inputs)
    model, targets = adapted("Bert")
    pooler: Any = model.get_submodule("bert.pooler")
    pooler.register_forward_pre_hook(lambda _module, args: (args[0].mean(1, keepdim=True),))
    with pytest.raises(UnfitError, match="padding"):
        opened(model, targets, inputs)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_upper_layers_that_look_below_are_found() -> None:
    model, targets = adapted("Bert")
    seen: list[Tensor] = []
    bert: Any = model.get_submodule("bert")
    bert.encoder.layer[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    bert.pooler.register_forward_pre_hook(lambda _m, args: (args[0] + seen[-1],))
    with pytest.raises(UnfitError, match="more of the lower ones"):
        opened(model, targets, inputs_of("Bert", "right"))
