"""Computes an encoder's layers on tokens alone: from the first layer to the last, nothing is done for padding.

A batch of n tokens, [b, t, d] with its padding, enters the first layer as [n, 1, d], each token a row, and the last
layer as [b, t, d] again, where `fedlora.speedups.last_layer` leaves out more. In between, products, norms, activations
and dropout see one token as they see another; attention alone is given rows of texts, by
`fedlora.speedups.attention.attend`. This is known as unpadding (Zeng et al. 2022, arXiv 2208.08124). Without that
paper's kernels for a GPU, as here, it pays on a CPU only.

The logits and their gradients are the same function as before; the products have other shapes, which shows in rounding.

Shapes: b = rows, t = tokens of the longest, n = tokens of all, *f = any features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedlora.speedups import attention

LAYERS = {
    "BertForSequenceClassification": ("bert", "encoder.layer"),
    "BertForTokenClassification": ("bert", "encoder.layer"),
    "RobertaForSequenceClassification": ("roberta", "encoder.layer"),
    "RobertaForTokenClassification": ("roberta", "encoder.layer"),
    "DistilBertForSequenceClassification": ("distilbert", "transformer.layer"),
    "DistilBertForTokenClassification": ("distilbert", "transformer.layer"),
}
"""Models whose heads read no padding -> where the encoder is, and in it its layers, which hand keyword arguments on to
the attention."""


@final
class Tokens:
    """Where the tokens of a batch are.

    Args:
        mask: 1 for a token, 0 for padding; each row begins with a token.

    Attributes:
        rows: of the batch.
        row: of each token.
        place: of each token in its row.
    """

    def __init__(self, mask: Int[np.ndarray, "b t"]) -> None:
        self.rows, self._length = mask.shape
        self.row, self.place = mask.nonzero()
        places = self.row * self._length + self.place
        # Padding reads as its own row's first token: what a client computes, be it infinite, reaches no other's rows.
        token = np.repeat(np.flatnonzero(self.place == 0), self._length)
        token[places] = np.arange(len(places))
        self._places, self._token = torch.from_numpy(places), torch.from_numpy(token)

    def __len__(self) -> int:
        return len(self.row)

    def padded(self, states: Float[Tensor, "n 1 *f"]) -> Float[Tensor, "b t *f"]:
        """Rows with their padding, whose entries are some token's of the row, and mean nothing."""
        out: Tensor = _Padded.apply(states.flatten(0, 1), self._token, self._places)  # type: ignore[no-untyped-call]
        return out.view(self.rows, self._length, *out.shape[1:])

    def unpadded(self, states: Float[Tensor, "b t *f"]) -> Float[Tensor, "n 1 *f"]:
        """The tokens' entries."""
        out: Tensor = _Unpadded.apply(states.flatten(0, 1), self._places)  # type: ignore[no-untyped-call]
        return out.unsqueeze(1)


class Unpadding:
    """What a model's layers compute at present.

    Attributes:
        tokens: Of the batch that is, or was last, in the model; None where its padding is computed.
    """

    def __init__(self) -> None:
        self.tokens: Tokens | None = None

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Inside, a model that `unpads` leaves padding out."""
        name, inner = LAYERS[type(model).__name__]
        encoder = model.get_submodule(name)
        layers: Any = encoder.get_submodule(inner)
        hooks = [encoder.register_forward_pre_hook(self._find_tokens, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(self._pass_tokens, with_kwargs=True) for layer in layers[:-1]]
        hooks += [layers[0].register_forward_pre_hook(self._unpad), layers[-1].register_forward_pre_hook(self._pad)]
        try:
            yield
        finally:
            self.tokens = None
            for hook in hooks:
                hook.remove()

    def _find_tokens(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens = None
        mask = kwargs.get("attention_mask")
        if (
            mask is None
            or mask.dim() != 2
            or any(kwargs.get(f"output_{what}") for what in ("hidden_states", "attentions"))
        ):
            return
        real = mask.numpy() != 0
        if real[:, 0].all() and real.sum() not in (mask.numel(), mask.shape[0]):
            self.tokens = Tokens(real)

    def _pass_tokens(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return None if self.tokens is None else (args, {**kwargs, attention.TOKENS: self.tokens})

    def _unpad(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self.tokens is None else (self.tokens.unpadded(args[0]), *args[1:])

    def _pad(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return None if self.tokens is None else (self.tokens.padded(args[0]), *args[1:])


def unpads(model: nn.Module) -> bool:
    """Whether padding can be left out of a model: an encoder of few kinds, on a CPU, which attends by `attend`.

    That it computes the same so is for `fedlora.speedups.trial` to see.
    """
    config: Any = getattr(model, "config", None)
    return (
        type(model).__name__ in LAYERS
        and getattr(config, "_attn_implementation", None) == attention.NAME
        and not getattr(config, "chunk_size_feed_forward", 0)
        and not getattr(config, "is_decoder", False)
        and not any(getattr(config, f"output_{what}", False) for what in ("hidden_states", "attentions"))
        and next(model.parameters()).device.type == "cpu"
    )


class _Padded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, token: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return states.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.places), None, None


class _Unpadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.shape = places, states.shape
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].new_zeros(ctx.shape).index_copy_(0, ctx.places, grads[0]), None
