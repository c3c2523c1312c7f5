"""The dtype of the frozen base: what `model.dtype` says, and what "auto" chooses.

On a CUDA device that has it "auto" is bfloat16. A CPU computes in bfloat16 many times as fast as in float32, or many
times as slowly: some products with the model's width are timed once for a machine (`fedlora.probes`).

Shapes: i = width of the model, at most 1,024.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn.functional import linear

from fedlora.assets import Checkpoint
from fedlora.config import RunConfig
from fedlora.model.device import resolve_device
from fedlora.probes import once

NARROW = ("bfloat16", "float16")
SMALL = 256
"""Width of a model below which a CPU's "auto" is float32: its time does not go into products."""
WIDE = 1024
"""Width at which wider models are measured: where a dtype is slow, it is slower still beyond, and takes minutes."""
ROWS = 256
REPEATS = 7
CLEAR_GAIN = 1.3
CLEAR_LOSS = 1.3


def choose_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of a config's base on this machine.

    Raises:
        ConfigError: an unknown device.
    """
    if config.model.dtype != "auto":
        found: torch.dtype = getattr(torch, config.model.dtype)
        return found
    device = resolve_device(config.runtime.device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    width = width_of(Checkpoint.of(config.model)) if device.type == "cpu" else 0
    if width < SMALL:
        return torch.float32
    return torch.bfloat16 if slowdown("bfloat16", width)["most"] < 1 / CLEAR_GAIN else torch.float32


def warning_of(config: RunConfig) -> str | None:
    """What is said of a dtype that a config names and this machine's CPU is slow in."""
    named = config.model.dtype
    if named not in NARROW or resolve_device(config.runtime.device).type != "cpu":
        return None
    width = width_of(Checkpoint.of(config.model))
    if width < SMALL or (found := slowdown(named, width))["least"] < CLEAR_LOSS:
        return None
    times = f"{'at least ' if width > WIDE else ''}{found['times']:.3g}"
    return (
        f"model.dtype = {named!r} takes {times} times as long as 'float32' on this processor (measured "
        f"{found['measured']}): set model.dtype = 'auto'"
    )


def width_of(checkpoint: Checkpoint) -> int:
    """Features of a model's hidden states, by its config; 0 where that does not say."""
    width = checkpoint.config_value("hidden_size", text=True)
    return width if isinstance(width, int) else 0


def slowdown(dtype: str, width: int) -> dict[str, Any]:
    """How many "times" as long as in float32 products [ROWS, i] by [i, i] take, there and back: the median.

    Beside it "least" and "most", the quartiles.
    """
    width = min(width, WIDE)
    return once("dtype", {"dtype": dtype, "width": width}, lambda: _measure(getattr(torch, dtype), width), anew=False)


def _measure(dtype: torch.dtype, width: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)  # a private one: measuring must not move the run's random numbers
    with torch.inference_mode(False), torch.enable_grad():
        weight, gradient = (torch.randn(size, width, generator=generator) for size in (width, ROWS))
        probes = [
            (gradient.to(kind).requires_grad_(), weight.to(kind), gradient.to(kind)) for kind in (torch.float32, dtype)
        ]
        times = [[_seconds(*probe) for probe in probes] for _ in range(1 + REPEATS)][1:]
    ratios = sorted(other / wide for wide, other in times)
    return {"times": ratios[REPEATS // 2], "least": ratios[REPEATS // 4], "most": ratios[-1 - REPEATS // 4]}


def _seconds(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> float:
    begin = time.thread_time()  # of this thread alone: other programs do not count
    torch.autograd.grad(linear(x, weight), x, gradient)
    return time.thread_time() - begin
