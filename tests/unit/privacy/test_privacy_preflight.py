"""Every model on which private training fails, loudly or silently, is refused beforehand; sound ones pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from support.errors import raises

from fedlora.errors import PrivacyError
from fedlora.privacy import preflight as module
from fedlora.training.dropout_masks import RowDropout

Batch = dict[str, torch.Tensor]
Losses = Callable[[torch.nn.Module, Batch], torch.Tensor]


def preflight(model: torch.nn.Module, of: Losses, together: Batch) -> None:
    """The check, with each example cut to its own length and with masks of its own."""

    def masked(model: torch.nn.Module, batch: Batch, rows: Sequence[int]) -> torch.Tensor:
        with RowDropout() as dropout:
            dropout.begin(np.array(rows, dtype=np.uint64))
            return of(model, batch)

    lengths = (
        together["attention_mask"].sum(1).tolist() if "attention_mask" in together else [None] * len(together["labels"])
    )
    alone = [
        {name: v[row : row + 1, :length] if v.dim() == 2 else v[row : row + 1] for name, v in together.items()}
        for row, length in enumerate(lengths)
    ]
    module.preflight(model, masked, together, alone)


def bert(dropout: float = 0.1, targets: tuple[str, ...] = ("query", "value"), **lora: object) -> torch.nn.Module:
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, num_labels=3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    base = transformers.BertForSequenceClassification(config)
    chosen = peft.LoraConfig(r=3, target_modules=list(targets), modules_to_save=["classifier"], **lora)
    return peft.get_peft_model(base, chosen).train()


def batch() -> Batch:
    ids = torch.arange(3, 17).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}


def losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_sound_model_passes_and_is_left_as_it_was(dropout: float) -> None:
    model = bert(dropout, lora_dropout=dropout)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    preflight(model, losses, batch())
    assert torch.equal(torch.rand(2), expected)
    assert [m.training for m in model.modules()] == modes
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name])
        assert p.grad is None
        assert not hasattr(p, "grad_sample")
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_frozen_a_and_reentrant_checkpointing_pass() -> None:
    model = bert(0.0)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    preflight(model, losses, batch())


def test_checkpointing_with_dropout_draws_other_masks_the_second_time() -> None:
    model = bert(0.1)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    refused(model, "checkpointing-with-dropout", "model.dropout = 0")


def test_half_precision_bases_pass() -> None:
    model = bert().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    preflight(model, losses, batch())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "exactly, after a wider copy"


def refused(
    model: torch.nn.Module,
    code: str,
    *named: object,
    of: Callable[..., torch.Tensor] = losses,
    given: Batch | None = None,
) -> None:
    with raises(PrivacyError, code, *named):
        preflight(model, of, given or batch())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_dora() -> None:
    refused(bert(use_dora=True), "dora-unsupported")


def test_lora_on_embeddings() -> None:
    refused(bert(targets=("query", "word_embeddings")), "lora-on-embedding", "word_embeddings")


def test_trained_position_embeddings() -> None:
    model = bert()
    for name, p in model.named_parameters():
        if "position_embeddings" in name:
            p.requires_grad_(True)
    refused(model, "batch-dimension-lost", "position_embeddings.weight'", 1, 2)


def test_checkpointing_that_is_not_reentrant() -> None:
    model = bert()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    refused(model, "checkpointing-not-reentrant", "use_reentrant")


def test_evaluation_mode() -> None:
    refused(bert().eval(), "evaluation-mode", "model.train()")


def test_nothing_to_train() -> None:
    refused(bert().requires_grad_(False), "nothing-to-train")


class Small(torch.nn.Module):
    """A trained line, and something before it."""

    def __init__(self, before: torch.nn.Module | None = None, windows: int = 1) -> None:
        super().__init__()
        self.before = before or torch.nn.Identity()
        self.before.requires_grad_(False)
        self.windows = windows
        self.line = torch.nn.Linear(8 // windows, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.line(x.reshape(len(x) * self.windows, -1)).reshape(len(x), self.windows, 3).mean(1)


def small_batch() -> Batch:
    return {"x": torch.arange(16.0).reshape(2, 8).sin(), "labels": torch.tensor([0, 2])}


def small_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def test_small_models_pass() -> None:
    preflight(Small().train(), small_losses, small_batch())
    preflight(Small(torch.nn.LayerNorm(8)).train(), small_losses, small_batch())


def test_a_module_that_flattens_the_batch() -> None:
    refused(Small(windows=4).train(), "batch-dimension-lost", "line", 8, 2, of=small_losses, given=small_batch())


def test_batch_norm_in_training_mode_and_frozen() -> None:
    model = Small(torch.nn.BatchNorm1d(8)).train()
    refused(model, "batch-statistics", "'before'", of=small_losses, given=small_batch())
    model.before.eval()
    preflight(model, small_losses, small_batch())


def test_any_other_layer_that_mixes_examples() -> None:
    class Mix(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    refused(Small(Mix()).train(), "examples-coupled", of=small_losses, given=small_batch())


def test_a_mean_over_the_batch_and_its_tokens() -> None:
    def mean(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return losses(model, batch).mean()

    def tokens(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return losses(model, batch) * batch["attention_mask"].sum(1) / batch["attention_mask"].sum()

    refused(bert(), "loss-not-per-example", "[]", of=mean)
    refused(bert(), "examples-coupled", of=tokens)


def test_a_weight_used_past_its_module() -> None:
    class Past(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(8, 3)
            self.way = "by name"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            by_name = torch.nn.functional.linear(x, self.line.weight)
            return by_name if self.way == "by name" else by_name + self.line(x)

    model = Past().train()
    refused(model, "gradient-not-seen", "line.weight", of=small_losses, given=small_batch())
    model.way = "both"
    refused(model, "gradient-not-seen", "line.weight", of=small_losses, given=small_batch())


def test_what_a_fresh_adapters_zero_b_would_hide() -> None:
    class Twice(torch.nn.Module):
        """A is used a second time past its hook; while B = 0 both of its gradients are zero."""

        def __init__(self) -> None:
            super().__init__()
            self.A, self.B = torch.nn.Linear(8, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
            torch.nn.init.zeros_(self.B.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.B(self.A(x)) + self.B(torch.nn.functional.linear(x, self.A.weight))

    refused(Twice().train(), "gradient-not-seen", "'A.weight'", of=small_losses, given=small_batch())


def test_one_example_is_too_few() -> None:
    given = {name: value[:1] for name, value in batch().items()}
    refused(bert(), "too-few-examples", given=given)


def test_a_layer_that_has_room_for_a_few_examples() -> None:
    class Room(torch.nn.Module):
        """An expert of limited capacity: what comes late passes by."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            there = torch.arange(len(x)) < 8
            return torch.where(there[:, None], x, x * 0.5)

    refused(Small(Room()).train(), "examples-coupled", of=small_losses, given=small_batch())


def test_what_mixes_in_training_alone() -> None:
    class Mix(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - 0.001 * x.mean(0) if self.training else x

    refused(Small(Mix()).train(), "examples-coupled", of=small_losses, given=small_batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coupling_of_two_in_a_thousand_shows_in_any_dtype(dtype: torch.dtype) -> None:
    class Mix(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - 0.002 * x.mean(0)

    given = {name: v.to(dtype) if v.is_floating_point() else v for name, v in small_batch().items()}
    refused(Small(Mix()).train().to(dtype), "examples-coupled", of=small_losses, given=given)
