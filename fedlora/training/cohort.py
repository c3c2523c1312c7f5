"""Local training, of one client or of many at once through one frozen base.

Each client's result is what it would be alone, up to rounding: its batches, its dropout, its optimiser's state and its
rates are its own, and the loss is the sum of the clients' losses, so that its gradients are too. The clients beside it
change the shapes of the products, and so the last digits in float32.

A client that fails (a loss that is not finite, an example that cannot be batched) leaves, and the others go on.

A job may name parts to be trained first (`TrainJob.first`), the others then on what those came to: two phases with the
optimiser, the rates and the batch size of [train], each with an optimiser state and a schedule of its own. A proximal
term and a task's reference are those of the start in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedlora.config import TrainConfig
from fedlora.model import Base
from fedlora.rng import derive
from fedlora.speedups.activation_cache import prepare
from fedlora.tasks._base import Examples, Task
from fedlora.training.dropout_masks import RowsError
from fedlora.training.job import TrainJob, TrainResult, rows_of
from fedlora.training.own_loop import train_by_own_loop
from fedlora.training.plain_loop import TrainingLoop
from fedlora.training.row_groups import PassCost
from fedlora.training.stacked_lora import cannot_stack
from fedlora.training.step import Outcome

ADDED = ("steps", "examples_seen", "seconds", "compute_seconds")
"""Fields of a result that are the sums of both phases; the loss is that of the second."""


def train(
    base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig, *, synchronize: bool = False
) -> TrainResult:
    """Train an adapter on one client's examples: the cohort of one.

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        job: adapter, trained parts and examples of the client.
        config: optimiser, rates and batch size.
        synchronize: wait for the device at each step, so that `compute_seconds` is exact on a GPU (slower).

    Raises:
        TrainingError: the client has no examples, nothing trains, or loss or adapter are not finite any more.
    """
    (outcome,) = train_cohort(base, task, examples, [job], [config], synchronize=synchronize)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def train_cohort(
    base: Base,
    task: Task,
    examples: Examples,
    jobs: Sequence[TrainJob],
    configs: Sequence[TrainConfig],
    *,
    cost: PassCost | None = None,
    synchronize: bool = False,
) -> list[Outcome]:
    """Train many clients' adapters, side by side where the base allows it.

    Clients may differ in everything: rank, steps, batch size, lengths, rates. Those that train other parts, or with
    another optimiser, form a cohort of their own. All adapters and states are in memory at once: how many clients to
    give is the caller's choice (see `fedlora.simulation.capacity`).

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        jobs: adapter, trained parts and examples of each client.
        configs: optimiser, rates and batch size, one for each job.
        cost: of a pass over some rows; None: by the model's size.
        synchronize: wait for the device at each step, so that `compute_seconds` is exact on a GPU (slower).

    Returns:
        An outcome for each job, in their order.
    """
    two = [k for k, job in enumerate(jobs) if job.first]
    if not two:
        return _in_one_phase(base, task, examples, jobs, configs, cost, synchronize)
    begun = _in_one_phase(
        base,
        task,
        examples,
        [replace(jobs[k], trains=jobs[k].first, seed=derive(jobs[k].seed, "first"), tilt={}) for k in two],
        [configs[k].longer(jobs[k].first_times) for k in two],
        cost,
        synchronize,
    )
    outcomes: dict[int, Outcome] = dict(zip(two, begun, strict=True))
    left = dict(enumerate(jobs))
    for k, outcome in outcomes.items():
        job = left.pop(k)
        if isinstance(outcome, TrainResult):
            left[k] = replace(
                job, adapter=outcome.adapter, trains=job.trains - job.first, toward=job.toward or job.adapter
            )
    rest = [configs[k] for k in left]
    ended = _in_one_phase(base, task, examples, list(left.values()), rest, cost, synchronize)
    for k, outcome in zip(left, ended, strict=True):
        before = outcomes.get(k)
        if isinstance(before, TrainResult) and isinstance(outcome, TrainResult):
            outcome = replace(outcome, **{key: getattr(before, key) + getattr(outcome, key) for key in ADDED})
        outcomes[k] = outcome
    return [outcomes[k] for k in range(len(jobs))]


def _in_one_phase(
    base: Base,
    task: Task,
    examples: Examples,
    jobs: Sequence[TrainJob],
    configs: Sequence[TrainConfig],
    cost: PassCost | None,
    synchronize: bool,
) -> list[Outcome]:
    """Train what the jobs name, cohort after cohort of those that can go together."""
    if configs and configs[0].loop is not None:
        return [_by_own_loop(base, task, examples, *work) for work in zip(jobs, configs, strict=True)]
    if base.cache is not None and not any(config.neftune_noise_alpha for config in configs):
        prepare(base, task, examples, rows_of(jobs, configs))
    outcomes: dict[int, Outcome] = {}
    todo = alike(jobs, configs)
    while todo:
        part = todo.pop(0)
        if len(part) > 1 and why_alone(base) is not None:
            todo = [[number] for number in part] + todo
            continue
        run = TrainingLoop(base, task, examples, [(jobs[k], configs[k]) for k in part], cost, synchronize)
        try:
            outcomes.update(zip(part, run.run(), strict=True))
        except RowsError as error:
            if len(part) == 1:
                raise
            base.alone = str(error)
            todo.insert(0, part)
    return [outcomes[number] for number in range(len(jobs))]


def _by_own_loop(base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig) -> Outcome:
    try:
        return train_by_own_loop(base, task, examples, job, config)
    except Exception as error:
        return error


def alike(jobs: Sequence[TrainJob], configs: Sequence[TrainConfig]) -> list[list[int]]:
    """Numbers of the clients that train the same parts with the same optimiser."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, (job, config) in enumerate(zip(jobs, configs, strict=True)):
        found.setdefault((tuple(sorted(job.trains)), config.optimizer), []).append(number)
    return list(found.values())


def why_alone(base: Base) -> str | None:
    """Why clients go one by one through a base, or None where they go together as far as is known."""
    return base.alone or base.coupled or cannot_stack(base)
