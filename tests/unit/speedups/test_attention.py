"""Attention by length computes what transformers' own attention does, for every family, and goes by the rule alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.errors import raises
from support.tiny_classifiers import TEXT, classifier, config_of, inputs_of
from torch import Tensor, nn
from torch.nn import functional

from fedlora.errors import ModelError
from fedlora.speedups import attention
from fedlora.speedups.attention import choose_attention, short_limit, two_products


def outcome(model: nn.Module, mode: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits and the gradients of all parameters."""
    choose_attention(model, mode)  # type: ignore[arg-type]
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, torch.dtype], int]:
    """Everything in float64 is short."""
    rule = {("cpu", torch.float64): 64}
    monkeypatch.setattr(attention, "SHORT", rule)
    return rule


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries for which two products were taken."""
    seen: list[tuple[int, ...]] = []

    def spy(query: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return two_products(query, *rest, **more)

    monkeypatch.setattr(attention, "two_products", spy)
    return seen


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", TEXT)
def test_two_products_are_the_models_own_attention(kind: str, padding: str, short: dict, calls: list) -> None:
    model, inputs = classifier(kind), inputs_of(kind, padding)
    ours = outcome(model, "auto", inputs)
    assert len(calls) == 2  # once a layer
    assert_same(ours, outcome(model, "sdpa", inputs))
    if kind not in ("Llama", "Qwen2"):  # whose plain code takes its softmax in float32, whatever the model's dtype
        assert_same(ours, outcome(model, "eager", inputs))
    assert len(calls) == 2


def test_two_products_serve_pictures(short: dict, calls: list) -> None:
    model, inputs = classifier("ViT"), inputs_of("ViT")
    ours = outcome(model, "auto", inputs)
    assert len(calls) == 2
    assert_same(ours, outcome(model, "sdpa", inputs))


def test_length_decides(short: dict, calls: list) -> None:
    model, inputs = classifier("Llama"), inputs_of("Llama", "right")
    ours = outcome(model, "auto", inputs)
    short[("cpu", torch.float64)] = 6  # the batch has 7 tokens
    calls.clear()
    fused = outcome(model, "auto", inputs)
    assert calls == []
    assert_same(fused, ours)
    x = torch.randn(1, 2, 7, 4, dtype=torch.float64)
    attention.attend(nn.Identity(), x, x, x, None, dropout=0.1)
    assert len(calls) == 1  # with dropout torch has no fused kernel either
    attention.attend(nn.Identity(), x[:, :, :1], x, x, None)
    assert len(calls) == 2  # and one query has few scores
    attention.attend(nn.Identity(), x[:, :, :2], x, x, None, is_causal=False)
    assert len(calls) == 2
    short.clear()
    for a, b in zip(outcome(model, "auto", inputs), outcome(model, "sdpa", inputs), strict=True):
        assert torch.equal(a, b)  # the very same function and masks


def test_the_rule_names_what_was_measured() -> None:
    cpu = torch.device("cpu")
    assert short_limit(cpu, torch.bfloat16) == 256
    assert short_limit(cpu, torch.float32) == short_limit(cpu, torch.float64) == 0
    assert short_limit(torch.device("cuda", 0), torch.bfloat16) == 0


def test_any_mask_and_any_group_of_heads() -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=draw)
    key, value = (torch.randn(2, 3, 8, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    wide = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    seen = torch.rand(2, 1, 5, 8, generator=draw) < 0.6
    seen[..., 0] = True
    numbers = torch.randn(2, 6, 5, 8, dtype=torch.float64, generator=draw)
    for mask in (None, seen, numbers):
        found = two_products(query, key, value, mask, 0.3)
        wanted = functional.scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3)
        assert float((found - wanted).abs().max()) < 1e-12
    found = two_products(query, key[:, :, :5], value[:, :, :5], None, 0.3, causal=True)
    wanted = functional.scaled_dot_product_attention(query, *(x[:, :, :5] for x in wide), is_causal=True, scale=0.3)
    assert float((found - wanted).abs().max()) < 1e-12


def test_bfloat16_stays_within_its_rounding() -> None:
    draw = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 3, 40, 16, generator=draw) for _ in range(3)]
    coarse = two_products(*(x.bfloat16() for x in exact), None, 0.25)
    wanted = two_products(*exact, None, 0.25)
    assert coarse.dtype == torch.bfloat16
    assert float((coarse.float() - wanted).norm() / wanted.norm()) < 0.01


def test_generation_with_a_cache_agrees(short: dict) -> None:
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config_of("Llama", eos_token_id=None)).double().eval()
    said = []
    for mode in ("auto", "sdpa"):
        choose_attention(model, mode)  # type: ignore[arg-type]
        said.append(model.generate(inputs_of("Llama")["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(*said)


def test_dropout_keeps_its_share(short: dict) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(4, 2, 64, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    ones = torch.ones_like(key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = two_products(query, key, ones, None, 0.3, dropout=0.25)
    assert abs(float(found.mean()) - 1) < 0.02
    assert float(found.std()) > 0.02


def test_models_that_cannot_are_left_alone() -> None:
    report = choose_attention(nn.Linear(2, 2))
    assert report.mode == "eager"
    assert "Linear" in report.reason
    with raises(ModelError, "attention-not-supported", "Linear", "runtime.attention = 'auto'"):
        choose_attention(nn.Linear(2, 2), "sdpa")
    with raises(ModelError, "unknown-name", "'sdpa'"):
        choose_attention(classifier("Bert"), "spda")  # type: ignore[arg-type]


def test_what_changes_the_scores_is_not_ours(short: dict, calls: list) -> None:
    """Gemma 2 caps its scores; the kernel cannot, and neither may we do as if."""
    model = classifier("Gemma2")
    report = choose_attention(model)
    assert report.mode == "eager"
    assert "Gemma2" in report.reason
    with raises(ModelError, "attention-not-supported", "Gemma2", "sdpa"):
        choose_attention(model, "sdpa")
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="softcap"):
        attention.attend(nn.Identity(), x, x, x, None, softcap=50.0)
    assert calls == []


def test_the_report_says_which() -> None:
    model = classifier("Bert")
    report = choose_attention(model)
    assert report.mode == "auto"
    assert "float64" in report.reason
    assert "256 tokens" in choose_attention(model.bfloat16()).reason
    for mode in ("sdpa", "eager"):
        assert choose_attention(model, mode).mode == mode  # type: ignore[arg-type]


def test_an_exported_config_does_not_name_it(tmp_path) -> None:
    model = classifier("Bert")
    choose_attention(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert attention.NAME not in (tmp_path / "config.json").read_text()
