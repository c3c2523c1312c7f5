"""Layers of 4 bits (bitsandbytes) in the dtype of their input, float64 included, where their own kernels have 32 bits.

Shapes: b = rows, i = inputs, o = outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def computed_exactly(model: torch.nn.Module) -> Iterator[None]:
    """Inside, each layer of 4 bits multiplies its input by its decoded weights; afterwards by its own kernel.

    Weights are decoded for one layer at a time, and once more on the way back, so that memory does not grow by them.
    """
    layers: list[Any] = [module for module in model.modules() if _state(module) is not None]
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _Exact(layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _state(module: torch.nn.Module) -> Any:
    # A wrapper's `weight` (PEFT's) may be its inner layer's: only the owner's counts.
    return getattr(module._parameters.get("weight"), "quant_state", None)


class _Exact:
    """The forward pass of one layer: x [..., i] -> x W^T + bias [..., o]."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = _Product.apply(x, self._layer.weight.data, _state(self._layer))  # type: ignore[no-untyped-call]
        bias = self._layer.bias
        return found if bias is None else found + bias.to(found.dtype)


class _Product(torch.autograd.Function):
    """x W^T, with W decoded on the way there and on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any) -> Tensor:
        ctx.weight, ctx.state = weight, state
        return x @ _decoded(weight, state, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ _decoded(ctx.weight, ctx.state, gradient.dtype), None, None


def _decoded(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """W [o, i]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.view(-1, 1), state).to(dtype)
