"""Leaves out what no head reads: the last layer's work on all tokens but the first.

An encoder with a classifier reads one row of its last layer, the first token's. The other rows are looked at by that
layer's attention alone, as keys and values. `skip_unread` takes the first token's row where the attention's result goes
on, so that all that follows has one row for each example, the last hidden states too.

With it the queries of the other tokens, and the attention to them, are left out where the model attends by
`fedlora.speedups.attention.attend`: the attention module is given the first token's states, and its key and value
projections get all tokens' back. transformers' code, which shapes everything by the states that it was given, then
hands on the keys with their tokens among the heads; `attend` knows them by that and sets them right. Where another
function attends, or where a projection has been replaced since, all queries are computed, and what follows is left out
all the same.

The logits and their gradients are the same function as before; the products have other shapes, which shows in rounding.

Shapes: b = examples, t = tokens, d = features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from fedlora.speedups import attention


@dataclass(frozen=True)
class Places:
    """Where an architecture keeps what is given less; names in a layer, but for the first and the last.

    Args:
        layers: the list of layers.
        attention: what projects the states and attends.
        keys: in it, the projections that need all tokens.
        after: what is first given the attention's result, and what is first given a sum of it and all tokens' states.
        final: what is given the last layer's result, if that has all rows again.
    """

    layers: str
    attention: str
    keys: tuple[str, str]
    after: tuple[str, ...]
    final: str | None = None


PLACES: dict[str, Places] = {
    "BertForSequenceClassification": Places(
        "bert.encoder.layer", "attention.self", ("key", "value"), ("attention.output",)
    ),
    "RobertaForSequenceClassification": Places(
        "roberta.encoder.layer", "attention.self", ("key", "value"), ("attention.output",)
    ),
    "DistilBertForSequenceClassification": Places(
        "distilbert.transformer.layer", "attention", ("k_lin", "v_lin"), ("attention.out_lin", "sa_layer_norm")
    ),
    "ViTForImageClassification": Places(
        "vit.layers", "attention", ("k_proj", "v_proj"), ("attention.o_proj", "layernorm_after"), "vit.layernorm"
    ),
}
ALL_TOKENS = "fedlora_all_tokens"
"""The attribute of the first token's states under which those of all tokens are found."""


def skip_unread(model: nn.Module) -> bool:
    """Put hooks on a model's last layer; twice is once.

    Args:
        model: with PEFT's layers in it, or without; where they are injected later, all queries are computed.

    Returns:
        Whether it is a model of which something is left out; another one is left alone.
    """
    restore_unread(model)
    places, config = PLACES.get(type(model).__name__), getattr(model, "config", None)
    if places is None or getattr(config, "chunk_size_feed_forward", False):  # one row makes no chunks
        return False
    layers: Any = model.get_submodule(places.layers)
    last: nn.Module = layers[-1]
    cut = [last.get_submodule(name) for name in places.after]
    cut += [model.get_submodule(places.final)] if places.final else []
    for module in cut:
        module.register_forward_pre_hook(_first_token)
    attending = last.get_submodule(places.attention)
    if not getattr(attending, "is_causal", False):  # a first query alone would be taken for the last one
        attending.register_forward_pre_hook(_first_query)
        for name in places.keys:
            attending.get_submodule(name).register_forward_pre_hook(_all_tokens)
    return True


def restore_unread(model: nn.Module) -> None:
    """Take the hooks off, so that the last hidden states are whole again."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in HOOKS:
                del module._forward_pre_hooks[key]


def _first_token(_module: nn.Module, args: tuple[Float[Tensor, "b t d"], ...]) -> tuple[Tensor, ...]:
    return tuple(_first(states) for states in args)


def _first_query(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The first token's states for the attention, if its keys will get all tokens'."""
    ours = getattr(module.config, "_attn_implementation", None) == attention.NAME
    if not ours or sum(_all_tokens in child._forward_pre_hooks.values() for child in module.children()) != 2:
        return None
    states: Float[Tensor, "b t d"] = args[0]
    first = _first(states)
    if first is not states:
        setattr(first, ALL_TOKENS, states)
    return (first, *args[1:])


def _all_tokens(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (getattr(args[0], ALL_TOKENS, args[0]), *args[1:])


def _first(states: Float[Tensor, "b t d"]) -> Float[Tensor, "b 1 d"]:
    # Contiguous: torch takes a strided batch for many small products rather than for one.
    return states if states.shape[1] == 1 else states[:, :1].contiguous()


HOOKS: tuple[Callable[..., Any], ...] = (_first_token, _first_query, _all_tokens)
