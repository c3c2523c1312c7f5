"""Example-level private SGD on one client (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1).

Per-sample gradients come from Opacus's hooks on the unwrapped model; clipping, noise and the division by the expected
batch size are Opacus's `DPOptimizer`. Ours are the sampling, the empty batch, virtual batches and the guards.

C = max_grad_norm, sigma = noise_multiplier, q = sample rate, b = examples in a physical batch. One step:
g = (sum_i clip(g_i, C) + N(0, sigma^2 C^2 I)) / expected_batch_size, summed over a Poisson sample, then any optimiser.

Two things are secret besides the data, and never come from the run's seed: the noise, and which examples are in which
batch (amplification by sampling holds only against somebody who does not know it).
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.errors import PrivacyError
from fedlora.privacy.hooks import attach, backward, detach, per_sample_gradients
from fedlora.privacy.preflight import require_trained
from fedlora.sanitize import clean_text

logger = logging.getLogger(__name__)

Losses = Callable[[np.ndarray], Tensor]
"""Indices of examples [b] -> the loss of each on its own [b], with a graph."""

ROUNDING: Mapping[torch.dtype, float] = {
    torch.float64: 0.0,
    torch.float32: 2e-3,
    torch.float16: 0.02,
    torch.bfloat16: 0.1,
}
"""How far one example's clipped gradient may move, in units of C, when its batch gets another shape: kernels change
with the shape, and round differently. The largest seen on CPUs is 7e-4, 0.006 and 0.095, in tiny random models."""


def clipping_norm(max_grad_norm: float, dtype: torch.dtype, expected_batch_size: float) -> float:
    """To what norm gradients are clipped so that one example moves their sum by no more than C, rounding included.

    An example that joins b others adds at most the clipping norm, and may re-round each of the others by r of it, in
    directions of their own: sqrt(1 + b r^2) in all, where b is taken as twice the expected batch size. Noise is sigma C
    whatever the dtype, so that sigma means in the ledger what it says: the noise's standard deviation in units of the
    sensitivity.

    Args:
        max_grad_norm: C.
        dtype: that the model computes in.
        expected_batch_size: of a Poisson sample.
    """
    r = ROUNDING.get(dtype, max(ROUNDING.values()))
    return max_grad_norm / math.sqrt(1 + 2 * expected_batch_size * r * r)


def secret_rng() -> np.random.Generator:
    """A generator for Poisson samples, seeded with 256 bits from the operating system."""
    return np.random.default_rng(int.from_bytes(os.urandom(32), "big"))


def secret_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for noise, seeded from the operating system.

    `manual_seed` would not do on the CPU: torch uses the low 32 bits of the seed alone there, few enough to try them
    all against a published update. So the whole state of the Mersenne twister (624 words) is drawn. A GPU's generator
    (Philox) has no more state than a key of 64 bits, all of which are drawn.
    """
    device = torch.device(device)
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "big"))
    if device.type != "cpu":
        return generator
    state = generator.get_state()
    words = state[24 : 24 + 624 * 8]  # after the seed and three counters; one 32-bit word in each 8 bytes
    fresh = torch.frombuffer(bytearray(os.urandom(624 * 8)), dtype=torch.uint8).clone()
    fresh.view(624, 8)[:, 4:] = 0
    if len(state) != 5056 or int(words.view(624, 8)[:, 4:].sum()):
        raise PrivacyError(
            f"torch {torch.__version__} keeps the state of its generator in an unknown form, so that the noise "
            "cannot be seeded safely: use a version of torch that this project was tested with",
            code="unknown-generator-state",
        )
    words.copy_(fresh)
    generator.set_state(state)
    return generator


def poisson_batches(
    n: int, sample_rate: float, steps: int, generator: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """`steps` Poisson samples of `range(n)`: each index is in each sample with `sample_rate`, independently.

    Args:
        n: number of examples that the client truly has (may be 0).
        sample_rate: q.
        steps: number of samples; an empty sample is one of them.
        generator: `secret_rng()` if not given; a test may bring its own.

    Yields:
        Sorted indices [b], b = 0 included.
    """
    if not 0 < sample_rate <= 1:
        raise PrivacyError(f"a sample rate must lie in (0, 1], not {sample_rate!r}", code="out-of-range")
    rng = generator if generator is not None else secret_rng()
    for _ in range(steps):
        yield np.flatnonzero(rng.random(n) < sample_rate)


def noise(std: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise in a tensor's shape, as Opacus draws it in its secure mode (see `PrivateStep`)."""
    from opacus.optimizers.optimizer import _generate_noise

    drawn: Tensor = _generate_noise(std, like, generator, secure_mode=True)
    return drawn


class PrivateStep:
    """Turns Poisson samples into private optimiser steps; a context manager, because its hooks must come off again.

    Example:
        >>> with PrivateStep(model, optimizer, max_grad_norm=1.0, noise_multiplier=1.1,
        ...                  expected_batch_size=16) as private:                             # doctest: +SKIP
        ...     for indices in poisson_batches(len(examples), q, steps):
        ...         private.step(indices, lambda part: task.losses(model, collate(part)))

    Args:
        model: in training mode, with `requires_grad` set on what is trained; `preflight` should have passed.
        optimizer: over exactly the model's trainable parameters.
        max_grad_norm: C, > 0.
        noise_multiplier: sigma, > 0.
        expected_batch_size: q times the declared number of examples, > 0; never the size of a sample.
        physical_batch_size: most examples at once in memory; None: the whole sample.
        after_noise: called between the noise and the optimiser's step, when each `p.grad` is private already: for a
            term of the gradient that does not depend on the data (FedProx), or a learning rate.
        generator: of the noise, on the parameters' device; `secret_generator()` if not given; a test may bring its own.

    Raises:
        PrivacyError: a number out of range, or an optimiser that holds other tensors than the model trains.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        physical_batch_size: int | None = None,
        after_noise: Callable[[], None] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        numbers = {
            "max_grad_norm": max_grad_norm,
            "noise_multiplier": noise_multiplier,
            "expected_batch_size": expected_batch_size,
            "physical_batch_size": 1 if physical_batch_size is None else physical_batch_size,
        }
        for name, value in numbers.items():
            if not 0 < value < float("inf"):
                raise PrivacyError(
                    f"{name} must be positive and finite for a private step, not {value!r}", code="out-of-range"
                )
        require_trained(model, optimizer)
        self._model = model
        self._params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._physical = physical_batch_size
        self._before: dict[str, Tensor] | None = {name: p.detach().clone() for name, p in self._params.items()}
        self._inner = optimizer
        self._hooks: Any = attach(model)
        device = next(iter(self._params.values())).device

        from opacus.optimizers import DPOptimizer

        # secure_mode adds up four draws, so that the gaps between floats do not give the noise away (Holohan and
        # Braghin 2021, arXiv 2107.10138); with a generator given it needs no other package.
        self.optimizer: Any = DPOptimizer(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            generator=generator if generator is not None else secret_generator(device),
            secure_mode=True,
        )
        if after_noise is not None:
            self.optimizer.attach_step_hook(lambda _: after_noise())

    def step(self, indices: np.ndarray, losses: Losses) -> None:
        """One private step; an empty sample takes one too, of noise alone.

        An example that cannot be computed adds nothing to the sum, and its neighbours are computed without it: a step
        that failed as a whole would let one example move all others'.

        Args:
            indices: the Poisson sample [b].
            losses: called on parts of `indices`, at most `physical_batch_size` at a time.

        Raises:
            PrivacyError: if a loss or a gradient is not one for each example.
        """
        if self._hooks is None:
            raise PrivacyError("this private step was closed: make a new one", code="step-closed")
        size = self._physical or max(1, len(indices))
        parts = [indices[start : start + size] for start in range(0, len(indices), size)] or [indices]
        self.optimizer.zero_grad(set_to_none=True)
        todo = deque(parts)
        while todo:
            part = todo.popleft()
            if len(part) and not self._computed(part, losses):
                if len(part) > 1:
                    todo.extendleft(reversed(np.array_split(part, 2)))
                    continue
                part = part[:0]
            if not len(part):
                for p in self._params.values():
                    p.grad_sample = p.new_zeros(0, *p.shape)  # type: ignore[attr-defined]
            self.optimizer.signal_skip_step(bool(todo))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._require_moved()

    def cleanup(self) -> None:
        """Take the hooks off; the model is as it was, but for the trained values."""
        if self._hooks is not None:
            detach(self._model, self._hooks)
            self._hooks = None
            for p in self._params.values():
                p.grad = None
                if hasattr(p, "summed_grad"):
                    del p.summed_grad

    def __enter__(self) -> PrivateStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    def _computed(self, part: np.ndarray, losses: Losses) -> bool:
        """Whether some examples' gradients could be computed; what an interrupted pass has left is removed."""
        try:
            self._gradients(part, losses)
        except PrivacyError:
            raise
        except Exception as error:
            if len(part) == 1:
                logger.warning(
                    "an example is left out of a private step: %s: %s", type(error).__name__, clean_text(error)
                )
            detach(self._model, self._hooks)
            self._hooks = attach(self._model)
            self.optimizer.zero_grad(set_to_none=True)
            return False
        return True

    def _gradients(self, part: np.ndarray, losses: Losses) -> None:
        values = losses(part)
        if values.shape != (len(part),):
            raise PrivacyError(
                f"a private step needs the loss of each example, [{len(part)}], and got {list(values.shape)}: give "
                "per-sample losses, never a mean over the batch or its tokens",
                code="loss-not-per-example",
            )
        backward(values)
        samples = per_sample_gradients(self._params, len(part))
        # One example's infinite or undefined gradient would make the whole sum so, whatever the noise.
        flags = [g.flatten(1).isfinite().all(1) for g in samples.values()]
        finite = torch.stack(flags).all(0)
        if not bool(finite.all()):
            for gradient in samples.values():
                gradient[~finite] = 0

    def _require_moved(self) -> None:
        if self._before is None or all(group["lr"] == 0 for group in self._inner.param_groups):
            return
        for name, before in self._before.items():
            if before.numel() and torch.equal(before, self._params[name].detach()):
                raise PrivacyError(
                    f"{name!r} was not changed by a noisy step: build the optimizer and the private step after the "
                    "model is on its device and its adapters are in place",
                    code="parameter-unchanged",
                )
        self._before = None
