"""A base model that is lent to somebody else's training loop, and put back as it was.

The loop may do to the model what Trainers do (wrap its forward, add hooks and a second adapter, switch on
checkpointing, move it): all of it is put back. What it may not do is to change a frozen tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import TrainingError
from fedlora.model import Base

FROZEN_CHANGED = "frozen-tensor-changed"
"""Code of the error that ends a run: the base, which other clients share, is not what it was."""


@contextmanager
def lent(base: Base) -> Iterator[None]:
    """Within, a model is somebody else's to train; afterwards all but its adapter's values is as it was.

    Raises:
        TrainingError: A frozen tensor of the base was changed.
    """
    model, mine = base.peft_model, {id(parameter) for parameter in base.parameters.values()}
    frozen = {name: tensor for name, tensor in _tensors(model) if id(tensor) not in mine}
    before = {name: _checksum(tensor) for name, tensor in frozen.items()}
    configs = [getattr(base.model, name, None) for name in ("config", "generation_config")]
    held = [_Held(thing) for thing in (*model.modules(), *configs, *model.peft_config.values()) if thing is not None]
    try:
        _say_ranks(base, model.peft_config["default"])
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.train = partial(_as_it_is, module)
        yield
    finally:
        for thing in held:
            thing.put_back()
        model.requires_grad_(False)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.grad = None
            if tensor.device != base.device:
                tensor.data = tensor.data.to(base.device)
        bring_home(base)
        for name, tensor in frozen.items():
            if _checksum(tensor) != before[name]:
                raise TrainingError(
                    f"train.loop changed {_plain(name)!r}, a weight of the frozen base: let it train what requires "
                    "gradients alone (no merging, no unfreezing)",
                    code=FROZEN_CHANGED,
                )


def _as_it_is(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:  # noqa: ARG001
    """In the place of `train`, of layers with running statistics, which stay as in evaluation."""
    return module


class _Held:
    """An object's attributes, and what those of them hold that are dicts, lists or sets."""

    def __init__(self, thing: Any) -> None:
        self._space: dict[str, Any] = vars(thing)
        self._values = dict(self._space)
        self._inner = [(value, value.copy()) for value in self._values.values() if isinstance(value, dict | list | set)]

    def put_back(self) -> None:
        self._space.clear()
        self._space.update(self._values)
        for value, before in self._inner:
            value.clear()
            if isinstance(value, list):
                value.extend(before)
            else:
                value.update(before)


def _say_ranks(base: Base, config: Any) -> None:
    """Let PEFT's config have the ranks that the adapter has now, for a Trainer that makes a copy of it."""
    if hasattr(config, "rank_pattern") and base.pair_layers:
        config.rank_pattern = {name: layer.r["default"] for name, layer in base.pair_layers.items()}  # type: ignore
        config.alpha_pattern = {name: layer.lora_alpha["default"] for name, layer in base.pair_layers.items()}  # type: ignore


def bring_home(base: Base) -> None:
    """Bring the adapter's values to the device and dtype in which they are kept."""
    for parameter in base.parameters.values():
        if (parameter.device, parameter.dtype) != (base.device, base.adapter_dtype):
            parameter.data = parameter.data.to(base.device, base.adapter_dtype)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _checksum(tensor: Tensor) -> int:
    """Sum of the bits as whole numbers: another one for any single value that is changed."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().view(bits).sum(dtype=torch.int64))


def _plain(name: str) -> str:
    """A tensor's name in the base model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
