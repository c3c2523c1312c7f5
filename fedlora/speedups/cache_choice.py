"""Whether a run keeps the activations of the layers below its adapters, decided when its base is opened.

The cache is tried out on two examples before it is used: logits through it against logits without it, in evaluation and
in training. A model that fails a check has none, and the reason is written down.

Shapes: b = examples in a batch, t = tokens of the longest, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.memory import total_bytes
from fedlora.model import Base
from fedlora.model.dropout import dropout_in
from fedlora.model.targets import layer_of
from fedlora.speedups.activation_cache import (
    SERVED,
    TOGETHER,
    ActivationCache,
    UnfitError,
    lengths_of,
    reach,
)
from fedlora.speedups.trial import model_inputs
from fedlora.tasks._base import Examples, Task

SHARE = 0.125  # of all memory, not of what is free now: a run that is started again decides alike
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative, of the logits of a padded batch; 0.05 for narrower dtypes."""


@dataclass(frozen=True)
class CacheReport:
    """What `choose_cache` decided.

    Attributes:
        mode: "on" or "off"; as `runtime.prefix_cache` it repeats the choice.
        reason: One line, why.
        nbytes: What the cache may grow to.
    """

    mode: Literal["on", "off"]
    reason: str
    nbytes: int = 0


def choose_cache(
    base: Base,
    task: Task,
    sets: Sequence[Examples],
    mode: Literal["auto", "on", "off"],
    made_for: Hashable = None,
    *,
    secret: Sequence[Examples] = (),
) -> CacheReport:
    """Open, keep or close a base's activation cache.

    Args:
        base: at its pristine version, with its kernels and its attention chosen.
        task: gives batches.
        sets: all examples that the run may look at.
        mode: `runtime.prefix_cache`.
        made_for: what decides the bits that the lower layers compute besides their modules' classes. What an earlier
            run on the same base kept is used again where both are the same.
        secret: further examples that the run will meet. They are kept where there is room, and nothing that is chosen
            or written down depends on them.

    Raises:
        ModelError: "on" was asked for, and the base cannot have a cache.
    """
    try:
        if mode == "off":
            raise UnfitError("switched off")
        return _open(base, task, sets, made_for, secret, forced=mode == "on")
    except UnfitError as unfit:
        if isinstance(base.cache, ActivationCache):
            base.cache.close()
        base.cache = None
        if mode == "on":
            raise ModelError(
                f"runtime.prefix_cache = 'on' is not possible: {unfit}; set it to 'auto' or 'off'",
                code="prefix-cache-not-supported",
            ) from None
        return CacheReport("off", str(unfit))


def _open(
    base: Base, task: Task, sets: Sequence[Examples], made_for: Hashable, secret: Sequence[Examples], *, forced: bool
) -> CacheReport:
    if not task.rows_are_examples:
        raise UnfitError("several examples are packed into a row")
    if base.coupled is not None:
        raise UnfitError(base.coupled)
    examples = next((found for found in sets if len(found)), None)
    if examples is None:
        raise UnfitError("there are no examples")
    made_for = (made_for, _lower_kinds(base))
    shortest, longest = int(np.argmin(examples.lengths)), int(np.argmax(examples.lengths))
    inputs = model_inputs(base, task, task.collate(examples, [shortest, longest]))
    cache, base.cache = base.cache, None
    if not isinstance(cache, ActivationCache) or cache.made_for != made_for:
        if isinstance(cache, ActivationCache):
            cache.close()
        cache = open_cache(base.model, base.targets, base.heads, inputs)
        cache.made_for = made_for
    base.cache = cache
    states = cache.reach(inputs)
    # What counts as a token for a task may be a little more or less for the model: a class token, patches.
    factor = states.shape[1] / float(examples.lengths[longest])
    tokens = int(np.ceil(factor * sum(float(np.sum(found.lengths)) for found in sets)))
    needed, room = tokens * states.shape[-1] * states.element_size(), int(SHARE * total_bytes(base.device))
    more = int(np.ceil(factor * sum(float(np.sum(found.lengths)) for found in secret)))
    least = max(tokens, min(tokens + more, room // (states.shape[-1] * states.element_size())))
    if cache.capacity < least:
        if needed > room and not forced:
            raise UnfitError(
                f"{_size(needed)} are needed for {tokens} tokens, and an eighth of the memory is {_size(room)}"
            )
        cache.clear(least)
    reason = f"{cache.depth} layers below the adapters, {tokens} tokens, at most {_size(needed)}"
    return CacheReport("on", reason, needed)


def open_cache(
    model: nn.Module, targets: tuple[str, ...], heads: tuple[str, ...], inputs: Mapping[str, Tensor]
) -> ActivationCache:
    """A cache for a model that can have one; tried out on a batch. It keeps nothing until `clear` gives it room.

    Args:
        model: in which `requires_grad` may be set or not; its mode is left as it is.
        targets: names of the adapted modules.
        heads: names of the modules trained in full.
        inputs: a batch of two examples of unequal length, if there are such, the shorter first.

    Raises:
        UnfitError: the model cannot have one.
    """
    layers, number, owner = _lowest(model, targets)
    lower, first = layers[:number], layers[number]
    lengths = lengths_of(inputs) if set(inputs) in SERVED else None
    if lengths is None:
        raise UnfitError("the task's batches are more than token ids and masks, or pixels")
    modes = {module: module.training for module in model.modules()}
    cache: ActivationCache | None = None
    try:
        model.eval()
        seen, outputs, states = _traced(model, first, inputs)
        trained = [part for name in (*targets, *heads) for part in model.get_submodule(name).modules()]
        if any(module in seen for module in trained):
            raise UnfitError("a module below the lowest adapted layer is trained too")
        if chance := dropout_in({*seen, *(module for layer in lower for module in layer.modules())}):
            raise UnfitError(f"there is dropout ({chance:g}) below the adapters; model.dropout = 0 turns it off")
        for layer in lower:
            if not isinstance(outputs.get(layer), torch.Size) or outputs[layer] != states.shape:
                raise UnfitError("its layers give more than hidden states to each other")
        model.train()
        for module in modes:
            if getattr(module, "running_mean", None) is not None:
                module.eval()  # as `Base.train_mode` leaves them
        if not torch.equal(reach(model, first, inputs), states):
            raise UnfitError("its lower layers compute something else in training")
        model.eval()
        embeddings = _embeddings(model, owner)
        if embeddings is not None and outputs.get(embeddings) != states.shape:
            embeddings = None
        wanted = _logits(model, inputs)
        alone = _one(inputs, 0, int(lengths[0]))
        wanted_alone = _logits(model, alone)
        cache = ActivationCache(model, targets, lower, first, embeddings)
        if not torch.equal(_logits(model, alone), wanted_alone):
            raise UnfitError("its upper layers use more of the lower ones than their hidden states")
        gap = float((_logits(model, inputs) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not gap <= ROUNDING.get(states.dtype, 0.05):  # a head may be wider than the layers
            raise UnfitError(f"it does not ignore padding (its logits move by {gap:.1g})")
        cache.clear()
        cache.grouped = all(_same_in_groups(cache, _one(inputs, row, int(n))) for row, n in enumerate(lengths))
        return cache
    except Exception as error:
        if cache is not None:
            cache.close()
        if isinstance(error, UnfitError):
            raise
        raise UnfitError(
            f"it was tried and failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _same_in_groups(cache: ActivationCache, one: Mapping[str, Tensor]) -> bool:
    """Whether an example has the same states, bit by bit, wherever it stands among others of its length."""
    alone = cache.reach(one)
    most = max(1, TOGETHER // alone.shape[1])
    return all(
        torch.equal(
            cache.reach({n: v.repeat(k, *[1] * (v.dim() - 1)) for n, v in one.items()}), alone.expand(k, -1, -1)
        )
        for k in {2, 3, 8, 17}
        if k <= most
    )


def _lower_kinds(base: Base) -> frozenset[type]:
    """The classes of the modules in the layers below the adapters, which decide their kernels.

    Raises:
        UnfitError: there are no such layers.
    """
    layers, number = _lowest(base.model, base.targets)[:2]
    return frozenset(type(module) for layer in layers[:number] for module in layer.modules())


def _lowest(model: nn.Module, targets: tuple[str, ...]) -> tuple[list[nn.Module], int, str]:
    """The list of layers with the adapters, the number of the lowest layer that has one, and the list's name."""
    places = [place for name in targets if (place := layer_of(model, name)) is not None]
    if len({owner for owner, _ in places}) != 1:
        raise UnfitError("its adapters are not all in one list of layers")
    owner, number = min(places, key=lambda place: place[1])
    if number == 0:
        raise UnfitError('the first layer has an adapter; adapter.layers = "top:2" adapts the upper ones alone')
    found = model.get_submodule(owner)
    assert isinstance(found, nn.ModuleList)
    return list(found), number, owner


def _one(inputs: Mapping[str, Tensor], row: int, length: int) -> dict[str, Tensor]:
    """One example without padding."""
    return {n: v[row : row + 1] if length < 0 else v[row : row + 1, :length] for n, v in inputs.items()}


def _traced(
    model: nn.Module, first: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[set[nn.Module], dict[nn.Module, torch.Size | None], Tensor]:
    """The modules that are called before the lowest adapted layer, the shapes of what they gave, and its input."""
    seen: set[nn.Module] = set()
    shapes: dict[nn.Module, torch.Size | None] = {}

    def enter(module: nn.Module) -> Callable[..., None]:
        return lambda *_: seen.add(module)

    def leave(module: nn.Module) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            shapes[module] = output.shape if isinstance(output, Tensor) else None

        return note

    handles = [m.register_forward_pre_hook(enter(m)) for m in model.modules()]
    handles += [m.register_forward_hook(leave(m)) for m in model.modules()]
    try:
        states = reach(model, first, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen - {first}, shapes, states


def _embeddings(model: nn.Module, owner: str) -> nn.Module | None:
    """The module that makes the layers' input, where a family has one for it (BERT and its kin, ViT)."""
    while owner:
        owner = owner.rpartition(".")[0]
        found = getattr(model.get_submodule(owner), "embeddings", None)
        if isinstance(found, nn.Module):
            return found
    return None


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a batch; a language model's at padding, which nobody looks at, are zero."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is None or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return logits
    return logits.masked_fill((mask == 0)[..., None], 0.0)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
