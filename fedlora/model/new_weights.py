"""Weights of a model that its checkpoint does not hold: which of them are no fault, and where they go.

transformers draws them at random when it loads the model, another draw each time and on each kind of device; here they
are drawn again, on the CPU and by name. Those of the head are trained and are part of the adapter. Others that a new
task brings along (the pooler between an encoder and its classifier) stay frozen; an export carries them, so that the
adapter is the same model wherever it is loaded. What should be in the checkpoint and is not is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from fedlora.errors import ModelError
from fedlora.model.device import seeded
from fedlora.model.targets import in_any
from fedlora.rng import derive

MISSING = "is missing"
"""What is the matter with a tensor that is not in the checkpoint at all."""
POOLER = "pooler"
"""What transformers calls the part of an encoder that is there only if asked for (`add_pooling_layer`)."""


def require_whole(model: nn.Module, absent: Mapping[str, str], heads: Sequence[str], new_task: bool, name: str) -> None:
    """Refuse a checkpoint that lacks weights which a new head does not account for.

    Args:
        model: as loaded.
        absent: name of a tensor -> what is wrong: "is missing", "has shape [2, 3] there and [4, 3] in the model".
        heads: modules that are trained in full.
        new_task: whether the task may put a head of its own on the base.
        name: of the model, for the message.

    Raises:
        ModelError: a tensor is missing or of another shape that belongs to the base itself.
    """
    wrong = sorted(
        tensor
        for tensor, matter in absent.items()
        if not in_any(tensor, heads) and not (new_task and _comes_with_a_task(model, tensor, matter))
    )
    if not wrong:
        return
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    saved = ", ".join(getattr(getattr(model, "config", None), "architectures", None) or ()) or "an unknown architecture"
    raise ModelError(
        f"the checkpoint of {name!r} does not fit {type(model).__name__}: {wrong[0]} {absent[wrong[0]]}{more}; it "
        f"was saved as {saved}, and is damaged, incomplete or of another architecture: use a complete checkpoint, or "
        "set model.ignore_mismatched_sizes = true to continue with random weights there",
        code="checkpoint-mismatch",
    )


def frozen_modules(model: nn.Module, absent: Collection[str], heads: Sequence[str]) -> tuple[str, ...]:
    """The modules outside the heads with weights that the checkpoint does not hold, in the model's order."""
    owners = {tensor.rpartition(".")[0] for tensor in absent if not in_any(tensor, heads)}
    outer = {owner for owner in owners if not any(in_any(owner, [other]) for other in owners - {owner})}
    return tuple(name for name, _ in model.named_modules() if name in outer)


def require_apart(modules: Sequence[str], inside: Sequence[str]) -> None:
    """Raise `ModelError` if a frozen random module contains one that is trained: no export could carry it."""
    for module in modules:
        held = [name for name in inside if not module or in_any(name, [module])]
        if held:
            raise ModelError(
                f"the checkpoint lacks weights of {module or 'the model itself'!r}, which contains {held[0]!r}: use "
                "a complete checkpoint, or leave that module out of adapter.targets and adapter.modules_to_save",
                code="weights-missing",
            )


def _comes_with_a_task(model: nn.Module, tensor: str, matter: str) -> bool:
    """Whether a tensor is of what a task's class adds to the pre-trained base: all outside of it, and its pooler."""
    trunk = str(getattr(model, "base_model_prefix", ""))
    if not trunk or not hasattr(model, trunk):
        return False
    return not in_any(tensor, [trunk]) or (matter == MISSING and POOLER in tensor.split("."))


@torch.no_grad()
def draw_absent(model: nn.Module, absent: Collection[str]) -> None:
    """Draw the parameters of some names, the same wherever they lie: on a GPU transformers drew them there, unseeded.

    Args:
        model: as loaded, with what is no parameter of a quantised layer any more (`fedlora.model.quantize.keep_whole`).
        absent: names of the tensors that are not the checkpoint's.
    """
    for owner in sorted({name.rpartition(".")[0] for name in absent}):
        module = model.get_submodule(owner)
        drawn = copy.deepcopy(module).to("cpu")
        draw_anew(drawn, derive(0, "base", owner), getattr(model, "_init_weights", None))
        for inner, value in drawn.named_parameters(recurse=False):
            if f"{owner}.{inner}".removeprefix(".") in absent:
                module.get_parameter(inner).copy_(value)


def draw_anew(module: nn.Module, seed: int, class_init: Callable[[nn.Module], None] | None) -> None:
    """Draw a module's weights as its layers do, and then as the model class does, where that has a way of its own."""
    with seeded(seed, torch.device("cpu")), torch.no_grad():
        for part in module.modules():
            if (reset := getattr(part, "reset_parameters", None)) is not None:
                reset()
            if class_init is not None:
                class_init(part)
