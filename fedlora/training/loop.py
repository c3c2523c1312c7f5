"""One client's local training: a plain torch loop, a function of the adapter, the examples and the job's seed alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fedlora.adapter import AdapterState, Part
from fedlora.config import TrainConfig
from fedlora.errors import TrainingError
from fedlora.model import Base, seeded
from fedlora.rng import derive
from fedlora.tasks._base import Batch, Examples, Task

CHECK_EVERY = 32  # steps between looks at the loss on a device where looking waits for all work to end


@dataclass(frozen=True)
class TrainJob:
    """What one client trains in one round.

    Args:
        adapter: where training starts.
        trains: the parts that receive gradients.
        indices: the client's examples, as positions in the training set.
        seed: of the batches and of dropout.
        proximal_mu: FedProx's mu; 0 takes the train config's.
    """

    adapter: AdapterState
    trains: frozenset[Part]
    indices: np.ndarray
    seed: int
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class TrainResult:
    """What came of it.

    Args:
        adapter: after training; parts that were frozen are as they were.
        num_examples: of the client.
        steps: optimiser steps taken.
        examples_seen: sum of the batch sizes.
        loss: mean over the steps of the batch's mean loss, without the proximal term.
        seconds: wall time of everything.
        compute_seconds: of it, in forward, backward and optimiser step.
    """

    adapter: AdapterState
    num_examples: int
    steps: int
    examples_seen: int
    loss: float
    seconds: float
    compute_seconds: float


def train(
    base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig, *, synchronize: bool = False
) -> TrainResult:
    """Train an adapter on one client's examples.

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        job: what to train.
        config: how.
        synchronize: wait for the device at each step, so that `compute_seconds` is exact on a GPU (slower).

    Raises:
        TrainingError: the client has no examples, nothing trains, or loss or adapter are not finite any more.
    """
    begin = time.perf_counter()
    if len(job.indices) == 0:
        raise TrainingError(
            "the client has no examples: give it some, or leave it out (a larger min_size in [partition])"
        )
    parameters = base.write(job.adapter, job.trains)
    if not parameters:
        raise TrainingError(f"nothing trains: the adapter has no tensor in {sorted(job.trains)}")
    steps = number_of_steps(len(job.indices), config)
    mu = job.proximal_mu or config.proximal_mu
    anchor = [parameter.detach().clone() for parameter in parameters] if mu else []
    optimizer = make_optimizer(parameters, config)
    look_every = 1 if base.device.type == "cpu" else CHECK_EVERY
    losses: list[Tensor] = []
    compute = 0.0
    seen = 0
    base.train_mode(True)
    with seeded(derive(job.seed, "dropout"), base.device):
        for step, chosen in enumerate(batches(job.indices, config.batch_size, steps, job.seed)):
            batch = to_device(task.collate(examples, chosen), base.device)
            started = _now(base.device, synchronize)
            loss = task.losses(base.model, batch).mean()
            loss.backward()
            if mu:
                add_proximal(parameters, anchor, mu)
            if config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            if step < config.warmup_steps:
                optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            elif step == config.warmup_steps:
                optimizer.param_groups[0]["lr"] = config.lr
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            compute += _now(base.device, synchronize) - started
            losses.append(loss.detach())
            seen += len(chosen)
            if step % look_every == look_every - 1:
                _refuse_not_finite(losses[-look_every:], step + 1 - look_every, config)
    mean = float(torch.stack(losses).double().mean())
    _refuse_not_finite(losses, 0, config)
    norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in parameters]))
    if not bool(torch.isfinite(norms).all()):
        raise TrainingError(f"the adapter is not finite after step {steps}: {_cure(config)}")
    result = base.read()
    seconds = time.perf_counter() - begin
    return TrainResult(result, len(job.indices), steps, seen, mean, seconds, compute)


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
        batch_size: of a full batch.
        steps: how many batches.
        seed: the draw is a function of it and of `indices`.
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


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of one step (from 0): linear warm-up to lr, which step `warmup_steps` is the first to have."""
    return config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    if device.type == "cpu":
        return batch
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def make_optimizer(
    parameters: list[Parameter], config: TrainConfig, *, fused: bool | None = None
) -> torch.optim.Optimizer:
    """The optimiser of a config.

    Args:
        parameters: that it moves.
        config: which one, with its rates.
        fused: whether AdamW runs as one kernel; None: where it can. It asks for gradients with their parameter's
            strides, which autograd gives and a sum of per-sample gradients need not.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True
        )
    if fused is None:
        fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


@torch.no_grad()
def add_proximal(parameters: Sequence[Parameter], anchor: Sequence[Tensor], mu: float) -> None:
    """The gradient of (mu / 2) |w - w0|^2, FedProx's proximal term (arXiv 1812.06127, equation (2)): mu (w - w0)."""
    moved = [(p, a) for p, a in zip(parameters, anchor, strict=True) if p.grad is not None]
    gradients = [p.grad for p, _ in moved]
    drift = torch._foreach_sub([p for p, _ in moved], [a for _, a in moved])
    torch._foreach_add_(gradients, drift, alpha=mu)  # type: ignore[arg-type]


def _refuse_not_finite(losses: Sequence[Tensor], first: int, config: TrainConfig) -> None:
    bad = ~torch.isfinite(torch.stack(tuple(losses)))
    if bool(bad.any()):
        step = first + int(bad.nonzero()[0]) + 1
        raise TrainingError(f"the loss is not finite at step {step}: {_cure(config)}")


def _cure(config: TrainConfig) -> str:
    clip = "" if config.clip_norm is not None else ", or set train.clip_norm (1.0 is usual)"
    return f"lower train.lr (now {config.lr:g}){clip}"


def _now(device: torch.device, synchronize: bool) -> float:
    if synchronize and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif synchronize and device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
