"""The loss in chunks of tokens is that of all at once, in value and gradient, and no logits are ever there whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cohorts import SMALL, client, random_base, random_examples, together
from support.states import gap
from torch import Tensor

from fedlora.config import OpenTable
from fedlora.model import Base
from fedlora.privacy.calibrate import Schedule
from fedlora.tasks import Task, _token_loss, load_task
from fedlora.training import TrainResult
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dp_settings import PrivateSettings

LIMIT = 5


def causal(**options: Any) -> Task:
    return load_task(OpenTable(name="causal-lm", **options))  # type: ignore[arg-type]


@pytest.fixture
def widest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of `LIMIT` tokens; the number of tokens in each call of an output layer is noted."""
    seen: list[int] = []
    real = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: Tensor) -> Tensor:
        if self.out_features == 40:
            seen.append(x.shape[:-1].numel())
        return real(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    monkeypatch.setattr(_token_loss, "CHUNK", LIMIT)
    return seen


def trained(base: Base, task: Task, how: str) -> list[TrainResult]:
    examples, clients = random_examples(causal=True, vit=False), [client(base, k, rank=(4, 2)[k]) for k in range(2)]
    if how == "private":
        settings = [PrivateSettings(Schedule(0.3, 2, 1, 8.0), 0.5, 0.05)] * 2
        samples = [iter([np.arange(9), np.arange(3, 7)]) for _ in range(2)]
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        found = PrivateTrainingLoop(
            base, task, examples, clients, settings, samples=samples, generators=generators,
            masks=lambda rows: rows.astype(np.uint64),
        ).run()  # fmt: skip
    else:
        found = together(base, task, examples, clients)
    assert all(isinstance(outcome, TrainResult) for outcome in found), found
    return found


@pytest.mark.parametrize("how", ["plain", "smoothed", "packed", "checkpointed", "private"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.slow
def test_training_is_what_it_is_with_whole_logits(
    name: str, how: str, tmp_path: Path, widest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"smoothed": {"label_smoothing": 0.2}, "packed": {"packing": True, "max_length": 40}}.get(how, {})
    base, task = random_base(name, tmp_path, causal=True, dropout=0.1), causal(**options)
    found = trained(base, task, how)
    assert max(widest) == LIMIT
    monkeypatch.setattr(_token_loss, "CHUNK", 10**6)
    for one, other in zip(trained(base, task, how), found, strict=True):
        assert gap(one.adapter, other.adapter) < 1e-10
        assert one.loss == pytest.approx(other.loss, rel=1e-12, nan_ok=True)
    assert max(widest) > 10 * LIMIT


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Phi", {}),
        ("GPTNeoX", {}),
        ("Opt", {"ffn_dim": 24, "word_embed_proj_dim": 8}),
    ],
)
def test_scaled_and_capped_logits_are_what_they_are(
    kind: str, options: dict[str, Any], widest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    kind = {"Opt": "OPT"}.get(kind, kind)
    special = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **special, num_key_value_heads=2, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval().requires_grad_(False)
    weight = next(p for p in model.base_model.parameters() if p.ndim == 2 and 40 not in p.shape)
    weight.requires_grad_(True)
    task, examples = causal(), random_examples(causal=True, vit=False)
    batch = task.collate(examples, range(6))

    def losses_and_gradient() -> tuple[Tensor, Tensor]:
        each = task.losses(model, batch)
        (gradient,) = torch.autograd.grad(each, weight, torch.arange(1.0, 7.0, dtype=torch.float64))
        return each.detach(), gradient

    parts = losses_and_gradient()
    assert max(widest) == LIMIT
    with torch.no_grad():
        assert torch.equal(task.measure(model, batch)["loss"], parts[0])
    assert max(widest) == LIMIT, "nor in evaluation"
    monkeypatch.setattr(_token_loss, "CHUNK", 10**6)
    for part, whole in zip(parts, losses_and_gradient(), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-14)
    assert float(parts[1].abs().max()) > 1e-6


@pytest.mark.parametrize("trained", ["lm_head", "between"])
def test_what_is_trained_behind_the_body_gets_its_gradient(trained: str, tmp_path: Path, widest: list[int]) -> None:
    model = random_base("llama", tmp_path, causal=True).model
    task, batch = causal(), causal().collate(random_examples(causal=True, vit=False), range(6))
    model.between = torch.nn.Linear(1, 1)
    for module in (model.lm_head, model.between):
        module.requires_grad_(module is getattr(model, trained))
    losses = task.losses(model, batch)
    assert max(widest) > LIMIT
    if trained == "lm_head":
        assert torch.autograd.grad(losses.sum(), model.lm_head.weight)[0].any()
