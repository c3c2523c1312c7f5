"""What one client trains in a round, and what follows from that alone: its steps, its batches, its rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedlora.adapter import AdapterState, Part
from fedlora.config import TrainConfig
from fedlora.errors import TrainingError
from fedlora.rng import derive


@dataclass(frozen=True)
class TrainJob:
    """What one client trains in one round.

    Args:
        adapter: where training starts.
        trains: the parts that receive gradients.
        indices: the client's examples, as positions in the training set.
        seed: decides the batches and the dropout masks.
        proximal_mu: FedProx's mu; where it is 0, `train.proximal_mu` counts.
        toward: the adapter to which the proximal term draws, and a task's reference model; None: `adapter`.
        tilt: what is added to each step's gradient, by tensors' names; see `ClientPlan.tilt`.
        round: of the run, from 1; a schedule of the learning rate goes by it.
        rounds: of the run in all.
        optimizer: the optimiser's state of the client's last round, as `TrainResult.optimizer` has it; empty: it starts
            anew.
        client_id: whose, for a loop of one's own.
        first: parts that are trained first, and then no more; see `fedlora.training.cohort`.
        first_times: how many times as long as the others.
    """

    adapter: AdapterState
    trains: frozenset[Part]
    indices: np.ndarray
    seed: int
    proximal_mu: float = 0.0
    toward: AdapterState | None = None
    tilt: Mapping[str, Tensor] = field(default_factory=dict)
    round: int = 1
    rounds: int = 1
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    client_id: int = 0
    first: frozenset[Part] = frozenset()
    first_times: int = 1


def nothing_to_train(job: TrainJob) -> TrainingError:
    """The error of a job whose adapter has none of the parts that it trains."""
    return TrainingError(
        f"there is nothing to train: the adapter has no tensor in {sorted(job.trains)}", code="nothing-to-train"
    )


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a client's local training.

    Args:
        adapter: after training; parts that were frozen are as they were.
        num_examples: that the client has.
        steps: optimiser steps taken.
        examples_seen: sum of the batch sizes.
        loss: mean over the steps of the batch's mean loss, without the proximal term.
        seconds: wall time of everything.
        compute_seconds: the part of `seconds` spent in forward, backward and optimiser step.
        optimizer: the optimiser's state, with `train.keep_optimizer`; see `FlatOptimizer.state_of`.
    """

    adapter: AdapterState
    num_examples: int
    steps: int
    examples_seen: int
    loss: float
    seconds: float
    compute_seconds: float
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)


def number_of_steps(size: int, config: TrainConfig) -> int:
    """Optimiser steps for a client of `size` examples: `steps`, or `epochs` (1 by default) passes, rounded up."""
    if config.steps is not None:
        return config.steps
    in_a_pass = -(-size // config.batch_size)
    return max(1, math.ceil((config.epochs or 1.0) * in_a_pass - 1e-9))


def examples_of(size: int, config: TrainConfig) -> int:
    """Examples that `train` sees on a client of `size` examples: whole passes, and the batches of the last one."""
    if size == 0:
        return 0
    passes, rest = divmod(number_of_steps(size, config), -(-size // config.batch_size))
    return passes * size + min(rest * config.batch_size, size)


def batches(indices: np.ndarray, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Batches without replacement: shuffled pass after shuffled pass, each cut into consecutive pieces.

    The last batch of a pass may be smaller; a client smaller than the batch size uses what it has.

    Args:
        indices: the client's examples.
        batch_size: examples in a full batch.
        steps: how many batches.
        seed: the order is a function of it and of `indices`.
    """
    generator = np.random.Generator(np.random.PCG64(derive(seed, "batches")))
    given = 0
    while given < steps:
        order = generator.permutation(indices)
        for start in range(0, len(order), batch_size):
            if given == steps:
                return
            yield order[start : start + batch_size]
            given += 1


def rows_of(jobs: Sequence[TrainJob], configs: Sequence[TrainConfig]) -> np.ndarray:
    """The examples in all batches of some jobs, one after the other."""
    drawn = [
        batch
        for job, config in zip(jobs, configs, strict=True)
        if (size := len(job.indices))
        for batch in batches(job.indices, config.batch_size, number_of_steps(size, config), job.seed)
    ]
    return np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)


def learning_rate(step: int, steps: int, config: TrainConfig, job: TrainJob) -> float:
    """The rate of one step.

    Warm-up is linear: to lr over the first rounds, and anew in each round, where step `warmup_steps` is the first to
    have the whole. Then the rate falls to lr_end, which the step after the run's last would have: along a line, or
    lr_end + (lr - lr_end) (1 + cos(pi t)) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983, equation (5)) for t from 0
    to 1.

    Args:
        step: of the round, from 0.
        steps: of the round; of each round, as far as the schedule goes.
        config: lr, lr_end, schedule and warm-ups.
        job: says which round it is, and of how many.
    """
    done, warm = (job.round - 1) * steps + step, config.warmup_rounds * steps
    up = min(1.0, (step + 1) / (config.warmup_steps + 1)) * min(1.0, (done + 1) / (warm + 1))
    if config.schedule == "constant" or done <= warm:
        return up * config.lr
    t = (done - warm) / (job.rounds * steps - warm)
    fall = 1 - t if config.schedule == "linear" else (1 + math.cos(math.pi * t)) / 2
    return up * (config.lr_end + (config.lr - config.lr_end) * fall)
