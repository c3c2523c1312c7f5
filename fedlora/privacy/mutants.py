"""Ways in which private code goes wrong in practice: an audit that does not catch them proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from fedlora.privacy.dpsgd import PrivateStep

MakePrivateStep = Callable[[torch.nn.Module, torch.optim.Optimizer], PrivateStep]


def no_noise(private: PrivateStep) -> None:
    """Noise that was forgotten."""
    private.optimizer.noise_multiplier = 1e-9


def no_clip(private: PrivateStep) -> None:
    """Gradients that are added up as they are."""
    dp = private.optimizer

    def accumulate() -> None:
        for p in dp.params:
            gradient = p.grad_sample.sum(0)
            p.summed_grad = gradient if p.summed_grad is None else p.summed_grad + gradient
            p.grad_sample._processed = True

    dp.clip_and_accumulate = accumulate


def quarter_of_the_noise(private: PrivateStep) -> None:
    """Noise for a quarter of the sensitivity."""
    private.optimizer.noise_multiplier /= 4


def noise_divided_by_the_batch(private: PrivateStep) -> None:
    """Noise on the mean with the deviation that the sum's noise has after the division, divided again."""
    private.optimizer.noise_multiplier /= private.optimizer.expected_batch_size


MUTANTS: Mapping[str, Callable[[PrivateStep], None]] = {
    "no noise": no_noise,
    "no clipping": no_clip,
    "noise / 4": quarter_of_the_noise,
    "noise / n": noise_divided_by_the_batch,
}


def broken(
    make_step: MakePrivateStep, mutant: Callable[[PrivateStep], None]
) -> Callable[..., AbstractContextManager[Any]]:
    """The same step, with what a mutant does to it."""

    def make(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> PrivateStep:
        private = make_step(model, optimizer)
        mutant(private)
        return private

    return make
