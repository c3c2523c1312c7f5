"""The law of what is left out: logits and gradients are those of the whole model, and it can be undone."""

from __future__ import annotations

import pytest
import torch
from families import classifier, inputs_of
from torch import Tensor, nn

from fedlora.model.unread import restore_unread, skip_unread


def everything(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits.pow(2).sum().backward()
    return [logits.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "ViT"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_logits_and_gradients_are_those_of_the_whole_model(kind: str, padding: str) -> None:
    model, inputs = classifier(kind), inputs_of(kind, padding)
    rows: list[int] = []
    last = [m for n, m in model.named_modules() if n.endswith((".1.output.dense", ".1.ffn.lin2", ".1.mlp.fc2"))]
    last[0].register_forward_pre_hook(lambda _module, args: rows.append(args[0].shape[1]))
    whole = everything(model, inputs)
    assert skip_unread(model) == skip_unread(model) == 2
    found = everything(model, inputs)
    assert rows == [inputs["input_ids"].shape[1] if "input_ids" in inputs else 5, 1]
    assert len(found) == len(whole)
    for value, reference in zip(found, whole, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    restore_unread(model)
    for value, reference in zip(everything(model, inputs), whole, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Qwen2"])
def test_other_models_are_left_alone(kind: str) -> None:
    assert skip_unread(classifier(kind)) == 0


def test_a_model_that_cuts_sequences_into_chunks_is_left_alone() -> None:
    assert skip_unread(classifier("DistilBert", chunk_size_feed_forward=2)) == 0
