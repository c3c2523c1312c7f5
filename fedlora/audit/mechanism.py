"""Direct checks of a run's private training: what its trainer does, seen from outside, against what its account says.

The run's own trainer (`train_private_cohort`, as federations call it) trains the run's own model on tasks that see its
samples and choose its gradients (`fedlora.audit.probe_tasks`). The optimiser is plain gradient descent with a rate that
makes the claimed noise, or the clip norm, 1; what an optimiser does to noised gradients is post-processing.

C = max_grad_norm, sigma = noise multiplier, E = expected batch size, q = sample rate, p = trained entries.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlora.audit.observed_trainer import QUIET, Client, Trainer
from fedlora.audit.probe_tasks import Scaled, Silent
from fedlora.errors import PrivacyError
from fedlora.privacy import dpsgd
from fedlora.privacy.accounting import Entry
from fedlora.privacy.checks import (
    Check,
    excluded_bits,
    expanded_from_a_word,
    independence,
    largest,
    masks,
    noise_grain,
    noise_scale,
    noise_shape,
    samples,
)
from fedlora.privacy.dpsgd import secret_generator, secret_rng
from fedlora.privacy.ledger import Ledger
from fedlora.training import dp_loop as private_cohort
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.dropout_masks import Keys
from fedlora.training.workspace import Workspace

NUMBERS = 30_000_000
"""Noise that an audit draws in one of its runs, at most: larger adapters are watched for fewer clients and steps."""
EXAMPLES = 8
"""Of the sums whose sensitivity is measured."""


def check_examples(workspace: Workspace, settings: PrivateSettings, generators: int) -> Iterator[Check]:
    """Check the private steps of unit = "example".

    Args:
        workspace: opened for the config.
        settings: of one of its clients.
        generators: how many freshly seeded ones are watched for repetitions; fewer where the adapter is large.

    Raises:
        PrivacyError: the model cannot be trained privately.
    """
    trainer = Trainer(workspace, replace(settings, budget=None))
    yield Check("private steps", trainer.kind)
    for part in (
        lambda: _sensitivity(trainer),
        lambda: _dropout(trainer),
        lambda: _noise(trainer, generators),
        lambda: _samples(trainer),
        lambda: _account(trainer),
    ):
        try:
            yield from part()
        except PrivacyError as error:
            yield Check("training", f"failed: {error.__cause__ or error}", "runs to its end", True)


# ------------------------------------------------------------------------------------------------ sums


def _sensitivity(trainer: Trainer) -> Iterator[Check]:
    """The sum before its noise: of one example, of several, and of one more.

    Dropout is on. An example has the same masks in every company, as if they were drawn before: given all masks, each
    example may move the sum by no more than C, and masks that are drawn anew keep that on average.
    """
    data, C = trainer.workspace.data.train, trainer.settings.max_grad_norm
    if len(data) < 2:
        return
    rng, generator = secret_rng(), secret_generator()
    m = min(EXAMPLES, len(data) - 1)
    chosen = rng.choice(len(data), m + 1, replace=False)
    seeds = rng.integers(2**62, size=m + 1)
    start = trainer.start(lambda value: value + 0.05 * torch.randn(value.shape, generator=generator).to(value))
    plan = replace(trainer.settings.schedule, sample_rate=1.0, steps=1)
    quiet = replace(trainer.settings, noise_multiplier=QUIET, schedule=plan)

    def sums(
        groups: Sequence[Sequence[tuple[int, float]]], settings: PrivateSettings = quiet, physical: int | None = None
    ) -> Tensor:
        """Of groups of examples, each with the factor of its loss: [groups, p] in units of C."""
        flat = [(member, k) for k, group in enumerate(groups) for member in group]
        places = [place for (place, _), _ in flat]
        probe = Scaled(trainer.workspace.task, [factor for (_, factor), _ in flat], [k for _, k in flat])
        ends = np.cumsum([len(group) for group in groups])
        clients = [
            Client(np.arange(end - len(group), end), adapter=start, physical=physical)
            for group, end in zip(groups, ends, strict=True)
        ]
        rows = data.take([int(chosen[place]) for place in places])

        def masks(indices: np.ndarray) -> Keys:
            return np.array([seeds[places[index]] for index in indices], np.uint64)

        return -trainer.run(probe, rows, clients, settings, masks=masks, lr=trainer.clip_rate).double()

    far = replace(quiet, max_grad_norm=1e6 * C, noise_multiplier=QUIET / 1e6)
    lengths = sums([[(place, 1.0)] for place in range(m + 1)], far).norm(dim=1)
    if not bool((lengths > 100 * QUIET * trainer.width**0.5).all()):
        yield Check("gradients", "an example has none", "above 0", True)
        return
    big = [(place, 100 / float(length)) for place, length in enumerate(lengths)]
    small = [(place, 0.5 / float(length)) for place, length in enumerate(lengths)]
    singles = sums([[one] for one in [*big, *small]])
    reached = 0.99 - trainer.rounding
    yield largest("one example's part", singles.norm(dim=1).tolist(), 1 + trainer.floor, "C", reached=reached)

    group = [big[place] if place % 2 else small[place] for place in range(m)]
    parts = sum(singles[place if place % 2 else m + 1 + place] for place in range(m))
    more = [big[m], big[m - 1 - m % 2], small[m]]  # another one, a copy, another one that is not clipped
    whole, cut = sums([group, *([one, *group] for one in more)]), sums([group], physical=3)[0]
    gaps = [float((found - parts).norm()) for found in (whole[0], cut)]
    yield largest("a sum less its examples' parts", gaps, trainer.rounding * m**0.5, "C")
    moved = (whole[1:] - whole[0]).norm(dim=1).tolist()
    yield largest("one example more moves it by", moved, 1 + 2 * trainer.floor, "C", reached=reached)
    odd = sums([[(m, math.inf), *group], [(m, math.nan), *group]])
    gaps = (odd - whole[0]).norm(dim=1).tolist()
    yield largest("one that is not finite moves it by", gaps, 1 + 2 * trainer.floor, "C")


# ------------------------------------------------------------------------------------------------ dropout


def _dropout(trainer: Trainer) -> Iterator[Check]:
    """Whether masks are independent of the other examples: see `fedlora.privacy.checks.masks`."""
    if not trainer.drops_out:
        yield Check("dropout", "none")
        return
    yield masks("dropout masks", trainer.copies)


# ------------------------------------------------------------------------------------------------ noise


def _noise(trainer: Trainer, generators: int) -> Iterator[Check]:
    settings, width = trainer.settings, trainer.width
    plan = settings.schedule
    steps = max(1, min(plan.steps, 8, NUMBERS // (2 * width)))
    clients = max(2, min(64, NUMBERS // (steps * width)))
    every = replace(settings, schedule=replace(plan, sample_rate=1.0, steps=steps))
    runs: list[list[Tensor]] = []  # [run][step] -> [clients, p], in units of sigma
    for many in (clients, min(8, clients)):  # the second time with the same seeds
        probe = Silent(trainer.workspace.task, 1)
        crowd = [Client(np.array([k]), seed=k, physical=settings.physical_batch_size) for k in range(many)]
        moved = trainer.run(probe, trainer.workspace.data.train, crowd, every, look=True, lr=trainer.noise_rate)
        taken = [len(values) for values in probe.values.values()]
        if taken != [steps] * many:
            yield Check("steps", f"{min(taken, default=0)} with examples", f"{steps}", True)
            return
        places = [torch.stack([probe.values[k][step] for k in range(many)]) for step in range(steps)]
        places.append(trainer.flat(trainer.zeros) + moved)
        runs.append([after - before for before, after in pairwise(places)])
    draws = runs[0]
    yield noise_scale(
        "noise: each tensor and step",
        {f"{name}, step {t}": part for t, row in enumerate(draws, 1) for name, part in trainer.by_name(row).items()},
    )
    yield noise_shape("noise: its law", torch.cat([row.flatten() for row in draws])[:1_000_000])
    yield noise_grain("noise: its grain", draws[0][0])

    total = max(1, min(plan.steps, NUMBERS // (2 * width)))
    empty = replace(settings, schedule=replace(plan, steps=total))
    nobody = [Client(np.empty(0, np.int64), seed=k) for k in range(2)]
    moved = trainer.run(
        Silent(trainer.workspace.task, 1),
        trainer.workspace.data.train,
        nobody,
        empty,
        lr=trainer.noise_rate,
        momentum=0.9,
    )
    reach = np.cumsum(0.9 ** np.arange(total))  # how far the noise of the last step, the one before ... has gone
    unit = moved / float(np.sqrt((reach**2).sum()))
    yield noise_scale(f"noise: {total} empty samples", trainer.by_name(unit))

    fresh, picked = _fresh(trainer, generators)
    rows = [torch.cat(run, dim=1)[:, : NUMBERS // 1000] for run in runs]  # of each client, all steps
    least = min(size for size in trainer.sizes if size >= min(16, max(trainer.sizes)))
    tensors = [part for row in draws for part in trainer.by_name(row).values() if part.shape[1] >= least]
    groups = [fresh, torch.cat(rows), torch.stack([part[:, :least].flatten() for part in tensors])]
    bits = excluded_bits(len(fresh))
    yield independence(f"noise: fresh ({bits}-bit seeds seen)", groups)
    module = dpsgd if trainer.why_alone else private_cohort
    short = expanded_from_a_word(module.secret_generator(trainer.base.device))
    yield Check("noise: its generator", "from 32 bits" if short else "from more than 32 bits", "more", short)
    if trainer.settings.schedule.sample_rate < 1:
        alike = len(picked) - len(np.unique(picked, axis=0))
        yield Check(f"samples: {len(picked)} generators", f"{alike} twice", "0 twice", alike > 0)


def _fresh(trainer: Trainer, generators: int) -> tuple[Tensor, np.ndarray]:
    """One step of many clients: the noise [g, d] that each draws first, and which of 48 examples each samples."""
    settings, n = trainer.settings, 48
    many = max(20, min(generators, 40 * NUMBERS // (n // 2 * trainer.width)))
    coin = replace(settings, schedule=replace(settings.schedule, sample_rate=0.5, steps=1))
    at_once = max(1, min(many, NUMBERS // (n * trainer.width)))
    noise, picked = [], []
    for begin in range(0, many, at_once):
        probe = Silent(trainer.workspace.task, n)
        crowd = [Client(np.arange(k * n, (k + 1) * n), begin + k) for k in range(min(at_once, many - begin))]
        moved = trainer.run(probe, trainer.workspace.data.train, crowd, coin, lr=trainer.noise_rate)
        noise.append(moved[:, :256].clone())
        picked += [np.isin(np.arange(n), probe.samples.get(k, [[]])[0]) for k in range(len(crowd))]
    return torch.cat(noise), np.stack(picked)


# ------------------------------------------------------------------------------------------------ samples


def _samples(trainer: Trainer) -> Iterator[Check]:
    plan = trainer.settings.schedule
    q = plan.sample_rate
    steps = 100
    n = max(10, round(10 / q))
    plan = replace(plan, steps=steps)
    crowd = [Client(np.arange(k * n, (k + 1) * n), seed=k) for k in range(3)]
    runs = []
    for clients in (crowd, crowd[:1]):  # the second run is the first client's, once more
        probe = Silent(trainer.workspace.task, n)
        trainer.run(probe, trainer.workspace.data.train, clients, replace(trainer.settings, schedule=plan), lr=0.0)
        for k in range(len(clients)):
            drawn = probe.samples.get(k, [])
            if q < 1 and len(drawn) > steps:
                yield Check("samples", f"{len(drawn)} in {steps} steps", f"at most {steps}", True)
                return
            runs.append(
                np.stack([np.isin(np.arange(n), one) for one in drawn] + [np.zeros(n, bool)] * (steps - len(drawn)))
            )
    yield from samples("samples", runs, q)


# ------------------------------------------------------------------------------------------------ the account


def _account(trainer: Trainer) -> Iterator[Check]:
    """What a ledger keeps of one round, against what the checks above held the trainer to."""
    settings = trainer.settings
    plan = settings.schedule
    checked = Entry(plan.sample_rate, settings.noise_multiplier, plan.steps)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl")
        with ledger.spend(settings.entry, run="audit", round=1):
            (kept,) = ledger.entries()
    yield Check("the ledger's entry", _shown(kept), _shown(checked), kept != checked)


def _shown(entry: Entry) -> str:
    return f"q {entry.sample_rate:.4g}, sigma {entry.noise_multiplier:.4g}, {entry.steps} steps"
