"""The law of padding that is left out: what heads read, and every gradient, are those of the whole model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers
from support.tiny_classifiers import check_same, classifier, config_of, everything, inputs_of
from torch import Tensor, nn

from fedlora.speedups.attention import choose_attention
from fedlora.speedups.last_layer import skip_unread
from fedlora.speedups.unpadding import LAYERS, Unpadding, unpads
from fedlora.training.dropout_masks import RowDropout, row_keys

KINDS = ["Bert", "Roberta", "DistilBert"]


def shapes(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Rows and tokens that each layer's norms are given."""
    name, inner = LAYERS[type(model).__name__]
    layers: Any = model.get_submodule(name).get_submodule(inner)
    found: list[tuple[int, ...]] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(tuple(args[0].shape[:2]))

    norms = [[m for m in layer.modules() if isinstance(m, nn.LayerNorm)][-1] for layer in layers]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def model_of(kind: str, what: str, dropout: float = 0.0) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "classifier_dropout": 0.0}
    if kind == "DistilBert":
        rates = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": 0.0}
    if what == "Sequence":
        model = classifier(kind, 3, **rates)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForTokenClassification")(config_of(kind, 3, **rates)).double().eval()
            for module in model.modules():  # a token classifier's own dropout, outside of the layers
                if dropout == 0.0 and isinstance(module, nn.Dropout):
                    module.p = 0.0
    choose_attention(model)
    return model.train(dropout > 0)


@pytest.mark.parametrize("what", ["Sequence", "Token"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_whole_model(kind: str, what: str) -> None:
    model, inputs, unpadding = model_of(kind, what), inputs_of(kind, "right"), Unpadding()
    whole = everything(model, inputs)
    assert shapes(model, inputs) == [(3, 7)] * 3
    skipped = skip_unread(model)
    assert skipped == (what == "Sequence")
    assert unpads(model)
    real = int(inputs["attention_mask"].sum())
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with unpadding.of(model):
        check_same(everything(model, inputs), whole)
        assert shapes(model, inputs) == [(real, 1), (real, 1), (3, 1) if skipped else (3, 7)]
    assert unpadding.tokens is None
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    check_same(everything(model, inputs), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_overflows_reaches_no_other_row(kind: str) -> None:
    model, inputs = model_of(kind, "Sequence"), inputs_of(kind, "right")
    inputs["input_ids"][0, 0] = 11
    assert (inputs["input_ids"] == 11).sum() == 1
    with torch.no_grad(), Unpadding().of(model):
        whole = model(**inputs).logits
        model.get_input_embeddings().weight[11] = torch.inf  # type: ignore[operator]
        found = model(**inputs).logits
    assert not found[0].isfinite().any()
    assert torch.equal(found[1:], whole[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_the_dropout_mask_of_its_place_in_its_row(kind: str) -> None:
    model, inputs, unpadding = model_of(kind, "Sequence", 0.3), inputs_of(kind, "right"), Unpadding()
    found = []
    for unpad in (False, True):
        dropout = RowDropout(unpadding=unpadding)
        with ExitStack() as stack:
            stack.enter_context(dropout)
            if unpad:
                stack.enter_context(unpadding.of(model))
            dropout.begin(row_keys(1, 0, torch.arange(3).numpy()))
            found.append(everything(model, inputs))
    check_same(found[1], found[0])
    model.eval()
    assert not torch.allclose(everything(model, inputs)[""], found[0][""], rtol=1e-3), "something dropped out"


@pytest.mark.parametrize(
    ("case", "inputs"),
    [
        ("no mask", {"input_ids": torch.full((2, 5), 7)}),
        ("no padding", {"input_ids": torch.full((2, 5), 7), "attention_mask": torch.ones(2, 5, dtype=torch.long)}),
        (
            "a row without tokens",
            {"input_ids": torch.full((2, 5), 7), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [0] * 5])},
        ),
        ("a head that reads padding", inputs_of("Bert", "left")),
        (
            "as many tokens as rows",
            {"input_ids": torch.full((2, 5), 7), "attention_mask": torch.tensor([[1, 0, 0, 0, 0]] * 2)},
        ),
        ("states asked for", {**inputs_of("Bert", "right"), "output_hidden_states": True}),
    ],
)
def test_a_batch_is_whole_where_nothing_can_be_left_out(case: str, inputs: dict[str, Any]) -> None:
    model, unpadding = model_of("Bert", "Sequence"), Unpadding()
    with torch.no_grad(), unpadding.of(model):
        model(**inputs)
        assert unpadding.tokens is None, case


def test_other_models_and_attentions_keep_their_padding() -> None:
    assert not unpads(classifier("Llama"))
    assert not unpads(classifier("Bert")), "transformers' own attention knows nothing of it"
    chunked = classifier("Bert", chunk_size_feed_forward=2)
    choose_attention(chunked)
    assert not unpads(chunked)
