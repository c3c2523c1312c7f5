"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): activations are computed again in the backward pass.

The second forward pass draws the dropout masks of the first: they follow from each row's key and from how many masks
were drawn before the layer. It may be in another thread, as autograd's of a GPU, where nothing of `RowDropout` is
entered; so the masks come from a copy that is entered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedlora.errors import ModelError
from fedlora.training.dropout_masks import RowDropout


@contextmanager
def checkpointed(model: nn.Module, dropout: RowDropout | None) -> Iterator[None]:
    """Inside, a transformers model in training mode keeps the inputs of its layers alone.

    Args:
        model: with PEFT's layers in it.
        dropout: what draws the masks; None where nothing drops out.

    Raises:
        ModelError: the model cannot do it.
    """

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again: AbstractContextManager[Any] = nullcontext() if dropout is None else dropout.again()
        contexts = (nullcontext(), again)
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)

    require_checkpoints(model)
    ours = {"gradient_checkpointing": True, "_gradient_checkpointing_func": call}
    owns = [vars(module) for module in _places(model)]
    before = [(own, {key: own[key] for key in ours if key in own}) for own in owns]
    config: Any = getattr(model, "config", None)
    caching = getattr(config, "use_cache", None)
    try:
        if caching:
            config.use_cache = False  # models that build a cache by default say in training that they do not now
        for own, _ in before:
            own.update(ours)
        yield
    finally:
        if caching:
            config.use_cache = caching
        for own, kept in before:
            for key in ours:
                del own[key]
            own.update(kept)


def require_checkpoints(model: nn.Module) -> None:
    """Raise `ModelError` for a model whose code has no place for checkpoints."""
    if not getattr(model, "supports_gradient_checkpointing", False) or not _places(model):
        raise ModelError(
            f"{type(model).__name__} has no gradient checkpointing: set train.gradient_checkpointing = false, and "
            "lower train.micro_batch_size where memory is short",
            code="checkpointing-not-supported",
        )


def _places(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
