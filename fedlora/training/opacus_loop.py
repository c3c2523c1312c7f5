"""DP-SGD of one client by Opacus's hooks, for layers whose adapters have no stacked form.

`fedlora.training.dp_loop` trains all others. Rates, steps, noise and errors are the same in both.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fedlora.config import TrainConfig
from fedlora.errors import PrivacyError
from fedlora.model import Base, seeded
from fedlora.privacy.dpsgd import PrivateStep, poisson_batches
from fedlora.sanitize import clean_text
from fedlora.tasks._base import Batch, Examples, Task, to_device
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.dropout_masks import Keys, Masks, RowDropout, RowsError, Watch, secret_keys
from fedlora.training.job import TrainJob, TrainResult, learning_rate, nothing_to_train

logger = logging.getLogger(__name__)


def masked_losses(task: Task, model: torch.nn.Module, batch: Batch, keys: Keys, device: torch.device) -> Tensor:
    """The loss of each example of a batch on the CPU, each with masks from its own key.

    Raises:
        PrivacyError: the model draws random numbers that no example owns, or masks whose rows are not examples.
    """
    dropout = RowDropout()
    dropout.begin(keys)
    try:
        with dropout:
            return unshared_losses(task, model, to_device(task, batch, device), device)
    except RowsError as error:
        raise PrivacyError(
            f"dropout cannot be drawn for each example separately in {type(model).__name__} ({error}): set "
            "model.dropout = 0 and adapter.dropout = 0",
            code="dropout-not-per-example",
        ) from error


def unshared_losses(task: Task, model: torch.nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The loss of each example; inside `RowDropout`.

    Raises:
        PrivacyError: the model draws random numbers that no example owns.
    """
    with Watch(device) as watch:
        losses = task.losses(model, batch)
    if watch.drawn:
        raise PrivacyError(
            f"{type(model).__name__} draws random numbers that belong to no single example (it skips whole layers, "
            "or adds jitter or hashes at random), so that one example may change the noise of others: set "
            "model.dropout = 0, or choose another model",
            code="randomness-not-per-example",
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
        config: learning rate, optimiser and proximal term; `clip_norm` is not used.
        settings: rates and noise.
        masks: each example's key of dropout masks; None: from the operating system. A test may bring its own.

    Returns:
        The adapter, with `num_examples` 1, and no figure that depends on the data but the seconds.

    Raises:
        PrivacyError: training failed; why is in this process's log alone, since it may tell of the data.
        TrainingError: nothing trains.
    """
    if task.refers:
        raise PrivacyError(
            "a loss with a reference is trained privately where adapters can be stacked alone: set adapter.method = "
            "'lora', or task.loss_type = 'orpo'",
            code="reference-with-hooks",
        )
    begin = time.perf_counter()
    parameters = base.write(job.adapter, job.trains)
    if not parameters:
        raise nothing_to_train(job)
    base.train_mode(True)
    mu = job.proximal_mu or config.proximal_mu
    anchor = [parameter.detach().clone() for parameter in parameters] if mu else []
    tilt = [job.tilt.get(name) for name in base.tensor_names(job.trains)]

    def add_terms() -> None:
        if mu:
            add_proximal(parameters, anchor, mu)
        for parameter, term in zip(parameters, tilt, strict=True):
            if term is not None and parameter.grad is not None:
                parameter.grad += term.to(parameter.grad)

    if job.adapter.tensors(("R",)):
        raise PrivacyError(
            "cores between frozen factors are not trained where clients go one by one: choose strategy 'ffa'",
            code="core-not-trained",
        )
    optimizer = make_optimizer(parameters, config)
    plan, keys = settings.schedule, masks or secret_keys
    clip = settings.clipping_norm(base.dtype)
    sizes = [size for size in (settings.physical_batch_size, config.micro_batch_size) if size is not None]

    def losses(positions: np.ndarray) -> Tensor:
        rows = job.indices[positions]
        return masked_losses(task, base.model, task.collate(examples, rows), keys(rows), base.device)

    try:
        with (
            seeded(secret_seed(), base.device),
            PrivateStep(
                base.model,
                optimizer,
                max_grad_norm=clip,
                noise_multiplier=settings.noise_multiplier * settings.max_grad_norm / clip,
                expected_batch_size=plan.expected_batch_size,
                physical_batch_size=min(sizes, default=None),
                after_noise=add_terms if mu or job.tilt else None,
            ) as private,
        ):
            for step, positions in enumerate(poisson_batches(len(job.indices), plan.sample_rate, plan.steps)):
                optimizer.param_groups[0]["lr"] = learning_rate(step, plan.steps, config, job)
                private.step(positions, losses)
    except Exception as error:
        raise veiled(error) from error
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise not_finite(config)
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


def not_finite(config: TrainConfig) -> PrivacyError:
    """The error of a client whose adapter holds numbers that are not finite."""
    return PrivacyError(
        f"the adapter is no longer finite after private training: lower train.lr (now {config.lr:g})",
        code="adapter-not-finite",
    )


def veiled(error: Exception) -> PrivacyError:
    """An error that tells nothing of the data: why training failed goes to this process's log alone."""
    logger.warning("private training failed: %s: %s", type(error).__name__, clean_text(error))
    logger.debug("private training failed", exc_info=error)
    told = PrivacyError(
        "private training failed: see this client's own log; the reason is not sent, because it may reveal private "
        "data",
        code="private-training-failed",
    )
    told.__cause__ = error
    return told
