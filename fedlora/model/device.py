"""Which device to compute on, and random draws on it that name their seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedlora.errors import ConfigError, nearest

NAMES = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str) -> torch.device:
    """The device that `runtime.device` names.

    Args:
        name: "auto" takes the first that is there of CUDA, Apple's MPS and the CPU; or "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ConfigError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in NAMES[1:] or (index and not index.isdecimal()):
        raise ConfigError(f"unknown runtime.device {name!r}; {nearest(kind, NAMES)}", code="unknown-name")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise ConfigError(
                f"runtime.device is {name!r} and this machine has {count} CUDA devices: use 'auto' or 'cpu'",
                code="no-such-device",
            )
        return torch.device("cuda", int(index) if index else torch.cuda.current_device())
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            "runtime.device is 'mps' and this machine has no Apple GPU: use 'auto' or 'cpu'", code="no-such-device"
        )
    if index and int(index) > 0:
        raise ConfigError(f"runtime.device {name!r}: there is one {kind} device; use {kind!r}", code="no-such-device")
    return torch.device(kind)


@contextmanager
def seeded(seed: int, *devices: torch.device) -> Iterator[None]:
    """Torch's default generators, of the CPU and of `devices`, start from `seed` inside and are as before afterwards.

    Unlike `torch.manual_seed` it leaves other devices alone, and costs microseconds where CUDA was never started.
    """
    before = [(place, generator_state(place)) for place in (torch.device("cpu"), *devices)]
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        for place, state in before:
            _put_back(place, state)


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of torch's default generator of a device."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else torch.default_generator.get_state()


def _put_back(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.default_generator.set_state(state)
