"""Leaves out what no head reads: the last layer's work on all tokens but the first.

An encoder with a classifier reads one row of its last layer, the first token's. The other rows are looked at by that
layer's attention alone, as keys and values; their products after it, forward and backward, are three quarters of the
layer's, and nothing comes of them. `skip_unread` hands the products the first token only; the residual sums spread what
comes out over all tokens, so that the shapes stay, and only the first row of the last hidden states means anything.

The logits and their gradients are the same function as before; the products have other shapes, which shows in rounding.

Shapes: b = examples, t = tokens, d = features.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

AFTER_ATTENTION: dict[str, tuple[str, tuple[str, str]]] = {
    "BertForSequenceClassification": ("bert.encoder.layer", ("attention.output.dense", "intermediate.dense")),
    "RobertaForSequenceClassification": ("roberta.encoder.layer", ("attention.output.dense", "intermediate.dense")),
    "DistilBertForSequenceClassification": ("distilbert.transformer.layer", ("attention.out_lin", "ffn.lin1")),
    "ViTForImageClassification": ("vit.layers", ("attention.o_proj", "mlp.fc1")),
}
"""Model -> its list of layers, and what in a layer is first given the attention's result, and then the sum after it."""


def skip_unread(model: nn.Module) -> int:
    """Put hooks on a model's last layer, before or after adapters are injected; twice is once.

    Args:
        model: with or without PEFT's layers in it; one of another kind is left alone.

    Returns:
        How many modules are given the first token only.
    """
    restore_unread(model)
    found = _modules(model)
    for module in found:
        module.register_forward_pre_hook(_first_token)
    return len(found)


def restore_unread(model: nn.Module) -> None:
    """Take the hooks off, so that the last hidden states are whole again."""
    for module in _modules(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _first_token:
                del module._forward_pre_hooks[key]


def _modules(model: nn.Module) -> list[nn.Module]:
    place, config = AFTER_ATTENTION.get(type(model).__name__), getattr(model, "config", None)
    if place is None or getattr(config, "chunk_size_feed_forward", False):  # each chunk would have a first token
        return []
    layers: Any = model.get_submodule(place[0])
    return [layers[-1].get_submodule(name) for name in place[1]]


def _first_token(_module: nn.Module, args: tuple[Float[Tensor, "b t d"], ...]) -> tuple[Tensor, ...]:
    # Contiguous: torch takes a strided batch for many small products rather than for one.
    return (args[0][:, :1].contiguous(), *args[1:])
