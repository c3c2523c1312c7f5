"""What a client's private training is made of: its settings, the check of its model, and Opacus where it is needed.

Under example-level privacy nothing that depends on the data leaves the client but noised tensors: rates, steps and
noise follow from the config and from a number of examples that the client has declared in public.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fedlora.adapter import Part
from fedlora.config import ExamplePrivacyConfig, RunConfig, TrainConfig
from fedlora.errors import PrivacyError, TrainingError
from fedlora.model import Base, seeded
from fedlora.privacy.accounting import Budget, Entry
from fedlora.privacy.calibrate import Schedule, noise_multiplier_for, schedule
from fedlora.privacy.dpsgd import PrivateStep, clipping_norm, poisson_batches
from fedlora.privacy.preflight import preflight
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Task, to_device
from fedlora.training.dropout_masks import Masks, RowsError, Stream, Streams, Watch, example_parts, secret_masks
from fedlora.training.independence import company_of
from fedlora.training.job import TrainJob, TrainResult, learning_rate

logger = logging.getLogger(__name__)
_passed: WeakKeyDictionary[Base, set[frozenset[Part]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PrivateSettings:
    """How a client's steps are made private.

    Args:
        schedule: sample rate, steps a round, expected batch size.
        noise_multiplier: sigma.
        max_grad_norm: C, to which each example's gradient is clipped.
        physical_batch_size: most examples at once in memory; None: the whole sample.
        budget: over everything in the client's ledger; None: no end.
    """

    schedule: Schedule
    noise_multiplier: float
    max_grad_norm: float
    physical_batch_size: int | None = None
    budget: Budget | None = None

    @property
    def entry(self) -> Entry:
        """What one round costs."""
        return self.schedule.entry(self.noise_multiplier)

    def clipping_norm(self, dtype: torch.dtype) -> float:
        """To what norm gradients are clipped by a model that computes in `dtype`, so that the sensitivity is C."""
        return clipping_norm(self.max_grad_norm, dtype, self.schedule.expected_batch_size)


def private_settings(config: RunConfig, client_id: int) -> PrivateSettings:
    """The settings of one client: a function of the config alone, the same on the client and on the server.

    The plan counts every round as one in which the client takes part: the server knows whom it asks, so that asking
    few clients a round hides nothing from it.

    Raises:
        PrivacyError: the config has no [privacy], or its epsilon is out of reach.
    """
    privacy = require_privacy(config)
    train = config.train_of(client_id)
    plan = schedule(
        privacy.public_examples_of(client_id), train.batch_size, config.rounds, steps=train.steps, epochs=train.epochs
    )
    sigma, budget = privacy.noise_multiplier, privacy.budget
    if budget is not None:
        sigma = calibrated(budget, plan.sample_rate, plan.steps * plan.rounds)
    assert sigma is not None
    return PrivateSettings(plan, sigma, privacy.max_grad_norm, privacy.physical_batch_size, budget)


def require_privacy(config: RunConfig) -> ExamplePrivacyConfig:
    """The table [privacy] with unit = "example"; `PrivacyError` if there is none."""
    if config.example_privacy is None:
        raise PrivacyError("this run's clients do not train privately: add a table [privacy] to its config")
    return config.example_privacy


def require_private_task(task: Task) -> None:
    """`PrivacyError` for a task whose batches mix examples in one row."""
    if not task.rows_are_examples:
        raise PrivacyError(
            "this task packs several examples into one row, so that no gradient belongs to one example: set "
            "task.packing = false under [privacy]"
        )


def check_model(base: Base, task: Task, examples: Examples, job: TrainJob) -> None:
    """Refuse a model on which private training would fail or not be private; once for each base and trained parts.

    Args:
        base: its adapter is overwritten.
        task: gives batches and losses.
        examples: some of them are looked at: public ones, such as the test set.
        job: its adapter and trained parts.

    Raises:
        PrivacyError: names the module and the cure.
    """
    require_private_task(task)
    if not base.method.bilinear:
        raise PrivacyError(
            f"the gradients of single examples are not to be had with method {base.method.name!r}: set adapter.method "
            "= 'lora', or another one that trains A and B alone"
        )
    done = _passed.setdefault(base, set())
    if job.trains in done:
        return
    base.write(job.adapter, job.trains)
    base.train_mode(True)
    if len(examples) < 2:
        raise PrivacyError("the check before private training needs two test examples: raise data.test_fraction")
    together, alone = company_of(task, examples)
    own: Masks = lambda rows: [Stream(int(row), base.device) for row in rows]  # noqa: E731

    def losses(model: torch.nn.Module, batch: Batch, rows: Sequence[int]) -> Tensor:
        return masked_losses(task, model, batch, own(np.asarray(rows)), base.device)

    with base.uncached():
        preflight(base.model, losses, together, alone)
    done.add(job.trains)


def masked_losses(
    task: Task, model: torch.nn.Module, batch: Batch, streams: Sequence[Stream], device: torch.device
) -> Tensor:
    """The loss of each example of a batch on the CPU, each with masks from its own stream.

    Raises:
        PrivacyError: the model draws random numbers that no example owns, or masks whose rows are not examples.
    """
    masks = Streams()
    masks.tokens = task.tokens(batch)
    masks.parts = example_parts(batch, masks.tokens, streams)
    try:
        with masks:
            return unshared_losses(task, model, to_device(batch, device), device)
    except RowsError as error:
        raise PrivacyError(
            f"dropout cannot be drawn for each example in {type(model).__name__} ({error}): set model.dropout = 0 and "
            "adapter.dropout = 0"
        ) from error


def unshared_losses(task: Task, model: torch.nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The loss of each example; inside `Streams`.

    Raises:
        PrivacyError: the model draws random numbers that no example owns.
    """
    with Watch(device) as watch:
        losses = task.losses(model, batch)
    if watch.drawn:
        raise PrivacyError(
            f"{type(model).__name__} draws random numbers that belong to no single example (it leaves out whole "
            "layers, or jitters or hashes at random), so that one example may change what others meet: set "
            "model.dropout = 0, or choose another model"
        )
    return losses


def secret_seed() -> int:
    """A seed of 63 bits from the operating system, for what should draw nothing."""
    return int.from_bytes(os.urandom(8), "big") >> 1


def train_by_opacus(
    base: Base,
    task: Task,
    examples: Examples,
    job: TrainJob,
    config: TrainConfig,
    settings: PrivateSettings,
    *,
    masks: Masks | None = None,
) -> TrainResult:
    """What `train_private` of `fedlora.training.dp_loop` does, by Opacus: for layers without a stacked form.

    Args:
        base: at the version to train on; its adapter is overwritten.
        task: gives batches and losses.
        examples: the whole training set.
        job: what to train; without examples it takes steps of noise alone, as far as anybody can tell.
        config: learning rate, optimiser, proximal term; `clip_norm` is not looked at.
        settings: rates and noise.
        masks: each example's stream of dropout masks; None: seeded by the operating system. A test may bring its own.

    Returns:
        The adapter, with `num_examples` 1, and no figure that depends on the data but the seconds.

    Raises:
        PrivacyError: training failed; why is in this process's log alone, since it may tell of the data.
        TrainingError: nothing trains.
    """
    begin = time.perf_counter()
    parameters = base.write(job.adapter, job.trains)
    if not parameters:
        raise TrainingError(f"nothing trains: the adapter has no tensor in {sorted(job.trains)}")
    base.train_mode(True)
    mu = job.proximal_mu or config.proximal_mu
    anchor = [parameter.detach().clone() for parameter in parameters] if mu else []
    optimizer = make_optimizer(parameters, config)
    plan, streams = settings.schedule, masks or secret_masks(base.device)
    clip = settings.clipping_norm(base.dtype)

    def losses(positions: np.ndarray) -> Tensor:
        rows = job.indices[positions]
        return masked_losses(task, base.model, task.collate(examples, rows), streams(rows), base.device)

    try:
        with (
            seeded(secret_seed(), base.device),
            PrivateStep(
                base.model,
                optimizer,
                max_grad_norm=clip,
                noise_multiplier=settings.noise_multiplier * settings.max_grad_norm / clip,
                expected_batch_size=plan.expected_batch_size,
                physical_batch_size=settings.physical_batch_size,
                after_noise=(lambda: add_proximal(parameters, anchor, mu)) if mu else None,
            ) as private,
        ):
            for step, positions in enumerate(poisson_batches(len(job.indices), plan.sample_rate, plan.steps)):
                optimizer.param_groups[0]["lr"] = learning_rate(step, config)
                private.step(positions, losses)
    except Exception as error:
        logger.warning("private training failed: %s: %s", type(error).__name__, clean_text(error))
        logger.debug("private training failed", exc_info=True)
        raise PrivacyError(
            "private training failed; the reason may tell of the data and stays in this client's log: see there"
        ) from error
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise PrivacyError(f"the adapter is not finite after private training: lower train.lr (now {config.lr:g})")
    seconds = time.perf_counter() - begin
    return TrainResult(base.read(), 1, plan.steps, 0, float("nan"), seconds, 0.0)


def make_optimizer(parameters: list[Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a config. AdamW is not fused: that asks for gradients with their parameter's strides."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True
        )
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=False)


@torch.no_grad()
def add_proximal(parameters: Sequence[Parameter], anchor: Sequence[Tensor], mu: float) -> None:
    """The gradient of (mu / 2) |w - w0|^2, FedProx's proximal term (arXiv 1812.06127, equation (2)): mu (w - w0)."""
    moved = [(p, a) for p, a in zip(parameters, anchor, strict=True) if p.grad is not None]
    gradients = [p.grad for p, _ in moved]
    drift = torch._foreach_sub([p for p, _ in moved], [a for _, a in moved])
    torch._foreach_add_(gradients, drift, alpha=mu)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def calibrated(budget: Budget, sample_rate: float, steps: int) -> float:
    """`noise_multiplier_for`, worked out once for all clients of the same rate."""
    return noise_multiplier_for(budget.epsilon, budget.delta, sample_rate, steps, budget.accountant)
