"""Faster ways to compute the same, installed on a base from outside and tried against the plain way first.

linear_kernels: oneDNN's matrix products where they are faster; attention: by the length of the sequence; last_layer:
without what no head reads; unpadding: without padding; activation_cache: the layers below the adapters once for each
example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedlora.config import RuntimeConfig
from fedlora.speedups.attention import AttentionReport, choose_attention
from fedlora.speedups.cache_choice import CacheReport, choose_cache
from fedlora.speedups.linear_kernels import KernelReport, accelerate
from fedlora.speedups.trial import Trial
from fedlora.tasks._base import Examples


@dataclass(frozen=True)
class Speedups:
    """What was installed on a base.

    Args:
        kernels: which kernels the frozen layers use, and why.
        attention: how the model attends, and why.
        cache: whether the layers below the adapters are computed once for each example, and why.
    """

    kernels: KernelReport
    attention: AttentionReport
    cache: CacheReport

    @property
    def settled(self) -> dict[str, str]:
        """What each "auto" of `[runtime]` chose, as a config says it."""
        return {"kernels": self.kernels.mode, "attention": self.attention.mode, "prefix_cache": self.cache.mode}

    @property
    def choices(self) -> dict[str, Any]:
        """What each "auto" of `[runtime]` chose, and why: facts for the run directory."""
        timings = [asdict(timing) for timing in self.kernels.timings]
        return {
            **self.settled,
            **({"kernels_measured": self.kernels.measured, "kernels_timings": timings} if timings else {}),
            "kernels_why": self.kernels.reason,
            "attention_why": self.attention.reason,
            "prefix_cache_why": self.cache.reason,
        }


def install(
    trial: Trial, runtime: RuntimeConfig, sets: Sequence[Examples], secret: Sequence[Examples] = ()
) -> Speedups:
    """Make a base compute faster where that leaves what it computes as it is; also finds whether it is `coupled`.

    Args:
        trial: on the base, whose adapter is overwritten.
        runtime: the config's `kernels`, `attention` and `prefix_cache`.
        sets: examples that the base will see and that may be looked at.
        secret: examples that it will see, on which nothing that is chosen or written down may depend.

    Raises:
        ModelError: the config asks for what this base cannot have, or the base cannot do its task.
    """
    base, task = trial.base, trial.task
    kernels = accelerate(base.model, runtime.kernels)
    attention = choose_attention(base.model, runtime.attention)
    kernels, attention = trial.keep_equal(kernels, attention)
    base.coupled, base.needs_padding = trial.coupled(), trial.needs_padding()
    task.check(base.model, trial.sets)
    made_for = (attention.mode, torch.get_num_threads())
    cache = choose_cache(base, task, sets, runtime.prefix_cache, made_for, secret=secret)
    return Speedups(kernels, attention, cache)
