"""Private training that is broken in one place each: what `fedlora audit` must refute.

A mutant takes pytest's monkeypatch and breaks the code that trains: of the stacked loop (`STACKED`), of Opacus's
(`HOOKS`), or of the server's merge (`MERGED`). Some of the latter are the code itself with a word changed.
"""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.privacy import dpsgd
from fedlora.privacy import server_dp as central
from fedlora.privacy.calibrate import Schedule
from fedlora.privacy.dpsgd import PrivateStep, secret_rng
from fedlora.privacy.mutants import MUTANTS
from fedlora.rng import derive
from fedlora.training import dp_loop as private_cohort
from fedlora.training import opacus_loop
from fedlora.training.dp_loop import PrivateTrainingLoop
from fedlora.training.dropout_masks import Keys, row_keys

Mutant = Callable[[pytest.MonkeyPatch], None]

real_noise, real_batches, real_generator = private_cohort.noise, dpsgd.poisson_batches, dpsgd.secret_generator
real_step, real_next = PrivateTrainingLoop._step_with_noise, PrivateTrainingLoop._next_batch


def _clipped(gradients: Tensor, most: Tensor) -> None:
    gradients.mul_((most / (gradients.norm(dim=1) + 1e-6)).clamp_(max=1.0)[:, None])


# ------------------------------------------------------------------------------------------------ clipping


def _sums(clip: Callable[[PrivateTrainingLoop, Tensor, Tensor], Tensor | None]) -> Mutant:
    """Sums of gradients [b, p] that were clipped to C [b] in another way."""

    def clipped_sums(self: Any, gradients: Tensor, owners: Tensor, members: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            gradients[~gradients.isfinite().all(dim=1)] = 0.0
            most = gradients.new_tensor([self._how[id(client)].max_grad_norm for client in members])[owners]
            other = clip(self, gradients, most)
            found = gradients if other is None else other
            return found.new_zeros(len(members), found.shape[1]).index_add_(0, owners, found)

    return lambda patch: patch.setattr(PrivateTrainingLoop, "_clipped_sums", clipped_sums)


def _spans(loop: Any) -> list[tuple[str, slice]]:
    return [(column.name, slice(column.start, column.stop)) for column in loop._columns.columns]


def _per_tensor(loop: Any, gradients: Tensor, most: Tensor) -> None:
    for _, span in _spans(loop):
        _clipped(gradients[:, span], most)


def _per_layer(loop: Any, gradients: Tensor, most: Tensor) -> None:
    layers: dict[str, list[int]] = {}
    for name, span in _spans(loop):
        layers.setdefault(name.split(":")[0], []).extend(range(span.start, span.stop))
    for columns in layers.values():
        part = gradients[:, columns]
        _clipped(part, most)
        gradients[:, columns] = part


def _without(left_out: Callable[[str], bool]) -> Callable[[Any, Tensor, Tensor], None]:
    def clip(loop: Any, gradients: Tensor, most: Tensor) -> None:
        kept = [span for name, span in _spans(loop) if not left_out(name)]
        part = torch.cat([gradients[:, span] for span in kept], dim=1)
        factor = (most / (part.norm(dim=1) + 1e-6)).clamp_(max=1.0)[:, None]
        for span in kept:
            gradients[:, span] *= factor

    return clip


def _to_twice(loop: Any, gradients: Tensor, most: Tensor) -> None:
    _clipped(gradients, 2 * most)


def _to_entries(loop: Any, gradients: Tensor, most: Tensor) -> None:
    gradients.clamp_(-most[:, None], most[:, None])


def _on_average(loop: Any, gradients: Tensor, most: Tensor) -> Tensor:
    mean = gradients.mean(0, keepdim=True)
    _clipped(mean, most[:1])
    return mean.expand_as(gradients).clone()


def _not_at_all(loop: Any, gradients: Tensor, most: Tensor) -> None:
    pass


def first_part_alone(patch: pytest.MonkeyPatch) -> None:
    """Of a sample that is cut for memory, all parts but the first are dropped."""

    def next_batch(self: Any, client: Any) -> None:
        real_next(self, client)
        self._parts[id(client)] = []

    patch.setattr(PrivateTrainingLoop, "_next_batch", next_batch)


# ------------------------------------------------------------------------------------------------ noise


def _noise(change: Callable[[float, Tensor, torch.Generator], Tensor]) -> Mutant:
    return lambda patch: patch.setattr(private_cohort, "noise", change)


def _noise_by_tensor(share: Callable[[str], float]) -> Mutant:
    """Noise of another deviation in some tensors, by their names."""

    def step(self: Any, client: Any) -> None:
        own = client.job.adapter.tensors()
        each = [torch.full((own[c.name].numel(),), share(c.name)) for c in self._columns.columns]
        shares = torch.cat(each)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                private_cohort, "noise", lambda std, like, g: real_noise(std, like, g) * shares.to(like.dtype)
            )
            real_step(self, client)

    return lambda patch: patch.setattr(PrivateTrainingLoop, "_step_with_noise", step)


def uniform(std: float, like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) - 0.5) * std * 12**0.5


def coarse(std: float, like: Tensor, generator: torch.Generator) -> Tensor:
    return real_noise(std, like, generator).bfloat16().to(like.dtype)


class Carried:
    """Half of each draw's variance is of the draw before."""

    def __init__(self) -> None:
        self.last: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, std: float, like: Tensor, generator: torch.Generator) -> Tensor:
        fresh = real_noise(std, like, generator)
        before = self.last.get((id(generator), like.shape), real_noise(std, like, generator))
        self.last[id(generator), like.shape] = fresh
        return (fresh + before) / 2**0.5


def _settings(change: Callable[[Any, Any], Any]) -> Mutant:
    """A step with noise by other settings."""

    def step(self: Any, client: Any) -> None:
        how = self._how[id(client)]
        self._how[id(client)] = change(client, how)
        try:
            real_step(self, client)
        finally:
            self._how[id(client)] = how

    return lambda patch: patch.setattr(PrivateTrainingLoop, "_step_with_noise", step)


def fading(client: Any, how: Any) -> Any:
    return replace(how, noise_multiplier=how.noise_multiplier / (4 if client.done else 1))


def by_true_size(client: Any, how: Any) -> Any:
    size = float(max(1, len(client.chosen)))
    return replace(how, schedule=replace(how.schedule, expected_batch_size=size))


def none_when_still(patch: pytest.MonkeyPatch) -> None:
    """A step without a gradient is skipped, and its noise with it."""

    def step(self: Any, client: Any) -> None:
        if bool(self._sums[id(client)].any()):
            real_step(self, client)
        else:
            self._sums.pop(id(client))
            client.done += 1

    patch.setattr(PrivateTrainingLoop, "_step_with_noise", step)


def momentum_before_noise(patch: pytest.MonkeyPatch) -> None:
    """Momentum of the sums, and noise for the last one alone."""

    def step(self: Any, client: Any) -> None:
        kept = vars(self).setdefault("kept", {})
        sums = self._sums[id(client)] + client.config.momentum * kept.get(id(client), 0.0)
        self._sums[id(client)] = kept[id(client)] = sums
        for held in self._optimizer._state:
            held.zero_()
        real_step(self, client)

    patch.setattr(PrivateTrainingLoop, "_step_with_noise", step)


# ------------------------------------------------------------------------------------------------ seeds


def _generators(make: Callable[..., torch.Generator]) -> Mutant:
    def mutant(patch: pytest.MonkeyPatch) -> None:
        for module in (private_cohort, dpsgd):
            patch.setattr(module, "secret_generator", make)

    return mutant


def of_8_bits(device: Any = "cpu") -> torch.Generator:
    generator = real_generator(device)
    return generator.set_state(_states()[os.urandom(1)[0]].get_state())


def _states() -> list[torch.Generator]:
    if not _STATES:  # not the expansion of a word, so that repetitions alone give them away
        _STATES.extend(real_generator() for _ in range(256))
    return _STATES


_STATES: list[torch.Generator] = []


def by_manual_seed(device: Any = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(int.from_bytes(os.urandom(7), "big"))


def of_the_run(device: Any = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def in_pairs() -> Mutant:
    held: list[torch.Generator] = []

    def make(device: Any = "cpu") -> torch.Generator:
        if held:
            return held.pop()
        generator = real_generator(device)
        held.append(generator.clone_state())
        return generator

    return _generators(make)


# ------------------------------------------------------------------------------------------------ samples


def _samples(draw: Callable[[int, float, int], Iterator[np.ndarray]]) -> Mutant:
    def mutant(patch: pytest.MonkeyPatch) -> None:
        for module in (private_cohort, opacus_loop):
            patch.setattr(module, "poisson_batches", draw)

    return mutant


def shuffled(n: int, q: float, steps: int, generator: Any = None) -> Iterator[np.ndarray]:
    order, size, at = secret_rng().permutation(n), max(1, round(q * n)), 0
    for _ in range(steps):
        if at + size > n:
            order, at = secret_rng().permutation(n), 0
        yield np.sort(order[at : at + size])
        at += size


def of_one_size(n: int, q: float, steps: int, generator: Any = None) -> Iterator[np.ndarray]:
    for _ in range(steps):
        yield np.sort(secret_rng().choice(n, min(n, max(1, round(q * n))), replace=False))


def at_rate(factor: float) -> Callable[..., Iterator[np.ndarray]]:
    return lambda n, q, steps, generator=None: real_batches(n, min(1.0, factor * q), steps, generator)


def seeded(n: int, q: float, steps: int, generator: Any = None) -> Iterator[np.ndarray]:
    return real_batches(n, q, steps, np.random.default_rng(0))


def seeded_with_8_bits(n: int, q: float, steps: int, generator: Any = None) -> Iterator[np.ndarray]:
    return real_batches(n, q, steps, np.random.default_rng(os.urandom(1)[0]))


def used_twice(n: int, q: float, steps: int, generator: Any = None) -> Iterator[np.ndarray]:
    for sample in real_batches(n, q, (steps + 1) // 2):
        yield from (sample, sample)


def in_blocks(n: int, q: float, steps: int, generator: Any = None) -> Iterator[np.ndarray]:
    """Neighbours go together."""
    for sample in real_batches((n + 1) // 2, q, steps):
        both = np.concatenate([2 * sample, 2 * sample + 1])
        yield np.sort(both[both < n])


def half_the_steps(patch: pytest.MonkeyPatch) -> None:
    """A ledger that keeps half of the steps."""
    real = Schedule.entry

    def entry(self: Schedule, noise_multiplier: float) -> Any:
        return replace(real(self, noise_multiplier), steps=max(1, self.steps // 2))

    patch.setattr(Schedule, "entry", entry)


# ------------------------------------------------------------------------------------------------ dropout


def masks_of_the_clients(patch: pytest.MonkeyPatch) -> None:
    """Masks from the run's public seed: an example's go by its place in the batch."""

    def keys(self: Any, group: Any) -> Keys:
        of_each = [
            row_keys(derive(client.job.seed, "dropout"), client.done, places)
            for client, places in zip(group.clients, group.places, strict=True)
        ]
        return np.concatenate(of_each)

    patch.setattr(PrivateTrainingLoop, "_keys", keys)


def _masks(make: Callable[[int], Callable[[], int]]) -> Mutant:
    """Keys: number of rows -> what gives one after the other."""

    def secret_keys(rows: np.ndarray) -> Keys:
        key = make(len(rows))
        return np.array([key() for _ in rows], np.uint64)

    def mutant(patch: pytest.MonkeyPatch) -> None:
        for module in (private_cohort, opacus_loop):
            patch.setattr(module, "secret_keys", secret_keys)

    return mutant


def by_place(rows: int) -> Callable[[], int]:
    places = iter(range(rows))
    return lambda: next(places)


def one_for_all(rows: int) -> Callable[[], int]:
    seed = int.from_bytes(os.urandom(8), "big")
    return lambda: seed


def in_twos(rows: int) -> Callable[[], int]:
    seeds = [int.from_bytes(os.urandom(8), "big") for _ in range(rows)]
    places = iter(range(rows))
    return lambda: seeds[next(places) // 2]


DROPPED: Mapping[str, Mutant] = {
    "masks of the clients": masks_of_the_clients,
    "masks by place": _masks(by_place),
    "one mask for the batch": _masks(one_for_all),
    "one mask for two examples": _masks(in_twos),
}

STACKED: Mapping[str, Mutant] = {
    "per-tensor clipping": _sums(_per_tensor),
    "per-layer clipping": _sums(_per_layer),
    "clipping to 2C": _sums(_to_twice),
    "clipping of entries": _sums(_to_entries),
    "clipping of the mean": _sums(_on_average),
    "no clipping": _sums(_not_at_all),
    "an unclipped head": _sums(_without(lambda name: ":" not in name)),
    "one unclipped tensor": _sums(_without(lambda name: name.endswith("0.attention.self.query:B"))),
    "parts of a sample dropped": first_part_alone,
    "no noise on the head": _noise_by_tensor(lambda name: 1.0 if ":" in name else 1e-3),
    "little noise on B": _noise_by_tensor(lambda name: 0.25 if name.endswith(":B") else 1.0),
    "noise / 4": _noise(lambda std, like, g: real_noise(std / 4, like, g)),
    "noise / 1.3": _noise(lambda std, like, g: real_noise(std / 1.3, like, g)),
    "uniform noise": _noise(uniform),
    "bfloat16 noise": _noise(coarse),
    "noise carried over": _noise(Carried()),
    "noise / 4 after the first step": _settings(fading),
    "division by the true size": _settings(by_true_size),
    "no step without a gradient": none_when_still,
    "momentum before noise": momentum_before_noise,
    "noise of 8 bits": _generators(of_8_bits),
    "noise of 32 bits": _generators(by_manual_seed),
    "noise of the run's seed": _generators(of_the_run),
    "noise shared by two clients": in_pairs(),
    "shuffled passes": _samples(shuffled),
    "samples of one size": _samples(of_one_size),
    "samples at 2q": _samples(at_rate(2)),
    "samples at 1.2q": _samples(at_rate(1.2)),
    "samples of a fixed seed": _samples(seeded),
    "samples of 8 bits": _samples(seeded_with_8_bits),
    "samples used twice": _samples(used_twice),
    "samples of blocks": _samples(in_blocks),
    "half of the steps accounted": half_the_steps,
}


# ------------------------------------------------------------------------------------------------ Opacus's hooks


def _private_step(change: Callable[[PrivateStep], None]) -> Mutant:
    def make(*args: Any, **kwargs: Any) -> PrivateStep:
        step = PrivateStep(*args, **kwargs)
        change(step)
        return step

    return lambda patch: patch.setattr(opacus_loop, "PrivateStep", make)


def hooks_per_tensor(step: PrivateStep) -> None:
    dp = step.optimizer

    def accumulate() -> None:
        for p in dp.params:
            norms = p.grad_sample.flatten(1).norm(dim=1)
            factor = (dp.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            gradient = torch.einsum("i,i...", factor, p.grad_sample)
            p.summed_grad = gradient if p.summed_grad is None else p.summed_grad + gradient
            p.grad_sample._processed = True

    dp.clip_and_accumulate = accumulate


def hooks_to_twice(step: PrivateStep) -> None:
    step.optimizer.max_grad_norm *= 2
    step.optimizer.noise_multiplier /= 2


def hooks_fading(step: PrivateStep) -> None:
    full = step.optimizer.noise_multiplier
    step.optimizer.attach_step_hook(lambda dp: setattr(dp, "noise_multiplier", full / 4))


HOOKS: Mapping[str, Mutant] = {
    **{name: _private_step(change) for name, change in MUTANTS.items()},
    "per-tensor clipping": _private_step(hooks_per_tensor),
    "clipping to 2C": _private_step(hooks_to_twice),
    "noise / 4 after the first step": _private_step(hooks_fading),
    **{name: STACKED[name] for name in STACKED if name.startswith(("samples", "shuffled"))},
    "noise of 8 bits": STACKED["noise of 8 bits"],
    "noise of 32 bits": STACKED["noise of 32 bits"],
    "noise of the run's seed": STACKED["noise of the run's seed"],
}


# ------------------------------------------------------------------------------------------------ the server's merge


def _edited(name: str, old: str, new: str) -> Mutant:
    """A method of `ServerDP` with some words changed."""
    source = textwrap.dedent(inspect.getsource(getattr(central.ServerDP, name)))

    def mutant(patch: pytest.MonkeyPatch) -> None:
        assert old in source, f"{name} does not say {old!r} any more"
        space: dict[str, Any] = dict(vars(central))
        exec("from __future__ import annotations\n" + source.replace(old, new), space)
        patch.setattr(central.ServerDP, name, space[name])

    return mutant


def _merge_noise(change: Callable[[Tensor, float, torch.Generator], Tensor]) -> Mutant:
    return lambda patch: patch.setattr(central, "_noise", change)


real_merge_noise = central._noise


def uncharged(patch: pytest.MonkeyPatch) -> None:
    """The count query's noise is not paid for by the updates'."""
    patch.setattr(central.ServerDP, "update_multiplier", property(lambda self: self.noise_multiplier))


MERGED: Mapping[str, Mutant] = {
    "no clipping": _edited("aggregate", "weight * factor", "weight"),
    "per-tensor clipping": _edited(
        "aggregate", "alpha=weight * factor", "alpha=weight * min(1.0, clip / float(change.norm() + 1e-12))"
    ),
    "an unclipped head": _edited(
        "aggregate", "alpha=weight * factor", "alpha=weight * (factor if ':' in name else 1.0)"
    ),
    "a head that is left out of the norm": _edited(
        "aggregate", "for d in difference.values()", "for n, d in difference.items() if ':' in n"
    ),
    "clipping to 2C": _edited("aggregate", "min(1.0, clip / norm)", "min(1.0, 2 * clip / norm)"),
    "updates that are not finite": _edited("aggregate", "if math.isfinite(norm)", "if True"),
    "noise for equal weights": _edited("aggregate", "largest / total", "1 / count"),
    "noise for the sum of all who were asked": _edited("aggregate", "largest / total", "largest / (total + largest)"),
    "noise / 4": _merge_noise(lambda like, std, g: real_merge_noise(like, std / 4, g)),
    "no noise on the head": _merge_noise(
        lambda like, std, g: real_merge_noise(like, std if 4 in like.shape else std / 100, g)
    ),
    "noise of 8 bits": lambda patch: patch.setattr(central, "secret_generator", of_8_bits),
    "noise of 32 bits": lambda patch: patch.setattr(central, "secret_generator", by_manual_seed),
    "noise of the run's seed": lambda patch: patch.setattr(central, "secret_generator", of_the_run),
    "the same noise for each tensor": _edited("aggregate", "std, generator)", "std, generator.clone_state())"),
    "bfloat16 noise": _merge_noise(lambda like, std, g: real_merge_noise(like, std, g).bfloat16().double()),
    "too few clients": _edited("aggregate", "count < self.minimum_cohort", "False"),
}

ADAPTIVE: Mapping[str, Mutant] = {
    "a count without noise": _merge_noise(
        lambda like, std, g: real_merge_noise(like, std if like.ndim else std / 20, g)
    ),
    "a count that is not paid for": uncharged,
    "a count by the clip norm": _edited("aggregate", "unclipped += norm <= clip", "unclipped += 3 * (norm <= clip)"),
}
