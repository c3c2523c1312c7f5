"""Per-sample gradients by Opacus's hooks, put on an unwrapped model and taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import PrivacyError


def attach(model: torch.nn.Module) -> Any:
    """Opacus's hooks for per-sample gradients, on the model itself (no wrapper: state-dict keys stay as they are).

    Raises:
        PrivacyError: if Opacus refuses a module, or hooks are attached already.
    """
    from opacus.grad_sample import GradSampleHooks

    try:
        return GradSampleHooks(model, loss_reduction="sum", strict=True)
    except (NotImplementedError, ValueError) as error:
        raise PrivacyError(
            f"per-sample gradients cannot be computed for this model: {_line(error)}", code="no-per-sample-gradients"
        ) from error


def detach(model: torch.nn.Module, hooks: Any) -> None:
    """Take `attach`'s hooks off, and what they left on modules (an interrupted step leaves activations)."""
    hooks.cleanup()
    for module in model.modules():
        for name in ("activations", "max_batch_len"):
            if name in module.__dict__:
                delattr(module, name)


def backward(losses: Tensor) -> None:
    """The backward pass of a sum of losses [b], without torch's remark on hooks of the first trained layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        losses.sum().backward()  # type: ignore[no-untyped-call]


def per_sample_gradients(params: Mapping[str, torch.nn.Parameter], b: int) -> dict[str, Tensor]:
    """The gradients [b, *shape] that the hooks have left on each parameter; zeros where the loss does not reach it.

    Raises:
        PrivacyError: if a gradient is not one for each of `b` examples.
    """
    out: dict[str, Tensor] = {}
    for name, p in params.items():
        gradient = getattr(p, "grad_sample", None)
        if gradient is None:
            if p.grad is not None:
                raise PrivacyError(
                    f"{name!r} has a gradient and no per-sample one, because its module is used in a way that hooks "
                    "do not see (checkpointing without use_reentrant=True, a weight used by name): change that, or "
                    "freeze it",
                    code="gradient-not-seen",
                )
            gradient = p.grad_sample = p.new_zeros(b, *p.shape)  # type: ignore[attr-defined]
        if isinstance(gradient, list) or gradient.shape[0] != b:
            found = "several" if isinstance(gradient, list) else str(gradient.shape[0])
            raise PrivacyError(
                f"{name!r} gave {found} gradients for {b} examples: its module flattens or shares the batch (windows, "
                "experts, position ids of the whole batch), so clipping would not be per example: freeze it, or leave "
                "it out of adapter.targets",
                code="batch-dimension-lost",
            )
        out[name] = gradient
    return out


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
