"""Training in two phases: some parts first, and then the others on what those came to (`ClientPlan.first`).

Both phases have the optimiser, the rates and the batch size of [train], each with an optimiser state and a schedule of
its own. A proximal term and a task's reference are those of the start in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedlora.config import TrainConfig
from fedlora.model import Base
from fedlora.rng import derive
from fedlora.tasks._base import Examples, Task
from fedlora.training.cohort import train_cohort
from fedlora.training.job import TrainJob, TrainResult
from fedlora.training.step import Outcome

ADDED = ("steps", "examples_seen", "seconds", "compute_seconds")
"""Fields of a result that are the sums of both phases; the loss is that of the second."""


def train_in_phases(
    base: Base, task: Task, examples: Examples, jobs: Sequence[TrainJob], configs: Sequence[TrainConfig]
) -> list[Outcome]:
    """`train_cohort`, of jobs that may have parts to be trained first.

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        jobs: of the clients.
        configs: one for each job.
    """
    two = [k for k, job in enumerate(jobs) if job.first]
    if not two:
        return train_cohort(base, task, examples, jobs, configs)
    begun = train_cohort(
        base,
        task,
        examples,
        [replace(jobs[k], trains=jobs[k].first, seed=derive(jobs[k].seed, "first"), tilt={}) for k in two],
        [_longer(configs[k], jobs[k].first_times) for k in two],
    )
    outcomes: dict[int, Outcome] = dict(zip(two, begun, strict=True))
    left = dict(enumerate(jobs))
    for k, outcome in outcomes.items():
        job = left.pop(k)
        if isinstance(outcome, TrainResult):
            left[k] = replace(job, adapter=outcome.adapter, trains=job.trains - job.first, toward=job.adapter)
    ended = train_cohort(base, task, examples, list(left.values()), [configs[k] for k in left])
    for k, outcome in zip(left, ended, strict=True):
        before = outcomes.get(k)
        if isinstance(before, TrainResult) and isinstance(outcome, TrainResult):
            outcome = replace(outcome, **{key: getattr(before, key) + getattr(outcome, key) for key in ADDED})
        outcomes[k] = outcome
    return [outcomes[k] for k in range(len(jobs))]


def _longer(config: TrainConfig, times: int) -> TrainConfig:
    """The same training, so many times as long."""
    if config.steps is not None:
        return config.model_copy(update={"steps": config.steps * times})
    return config.model_copy(update={"epochs": (config.epochs or 1.0) * times})
