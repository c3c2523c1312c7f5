"""Where the weights of a base lie: on one device, or layer by layer on all CUDA devices of the machine.

What lies on several is moved by accelerate's hooks: each layer's inputs go to where its weights are, and what the model
gives comes back to where its inputs were. Adapters stay on the first of the devices, and are sent along in each pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedlora.assets import Checkpoint
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, ModelError
from fedlora.model.quantize import is_quantised


def placement(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which weights go straight to where they stay; none where they are in memory.

    Quantised ones stay where they are loaded, which without these is the first GPU.

    Args:
        config: of the run.
        device: that `runtime.device` names.

    Raises:
        ConfigError: `runtime.device_map` without CUDA, or beside a device with a number.
    """
    if config.runtime.device_map is None:
        straight = device.type == "cuda" or config.model.quantize is not None
        straight = straight or is_quantised(Checkpoint.of(config.model))
        return {"device_map": {"": str(device)}} if straight else {}
    if device.type != "cuda" or ":" in config.runtime.device:
        raise ConfigError(
            f"runtime.device_map = 'auto' spreads a base over all CUDA devices, and runtime.device = "
            f"{config.runtime.device!r} is {str(device)!r} here: remove one of them",
            code="devices-differ",
        )
    return {"device_map": "auto"}


def first_device(config: RunConfig, model: nn.Module, device: torch.device) -> tuple[torch.device, bool]:
    """Where a model that was loaded by `placement` wants its inputs, and whether it lies on several devices.

    Raises:
        ModelError: the GPUs do not hold it, and a part lies in memory or in files.
    """
    places = {value.device for value in model.parameters()}
    if config.runtime.device_map is None or places == {device}:
        return device, False
    if any(place.type != "cuda" for place in places):
        raise ModelError(
            "the CUDA devices of this machine do not hold the base: set model.quantize = 'nf4', or take a smaller one",
            code="gpu-too-small",
        )
    return next(model.parameters()).device, True
