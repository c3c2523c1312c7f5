"""A training loop of one's own, `train.loop = "my_module:train"`: what it is given, and one made out of a Trainer.

    import fedlora.client

    @fedlora.client.from_trainer
    def train(work):
        return SFTTrainer(model=work.model, train_dataset=work.dataset, args=SFTConfig(...))

`fedlora.training.own_loop` calls it, and checks what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedlora.errors import ConfigError
from fedlora.tasks._base import Batch

if TYPE_CHECKING:
    import datasets
    from peft import PeftModel

Loop = Callable[..., Mapping[str, float]]
"""Trains `work.model` in place. Called with a `LocalWork` and `train.options` as keyword arguments; returns {"loss":
mean training loss}, and if they are not the budget's, "steps" and "examples_seen"."""
SCHEDULE = "schedule/"
"""Begins the names of what `from_trainer` keeps of the learning rate's schedule."""


@dataclass(frozen=True, eq=False)
class LocalWork:
    """What one client trains in one round.

    Args:
        model: A PEFT model whose adapter holds the plan's start. What the plan trains requires gradients, and nothing
            else; everything but the adapter's values is put back afterwards.
        dataset: The client's training examples, as raw rows with the columns that the config names.
        tokenizer: Of the base model (an image processor, where it reads pictures); None: the base has none.
        label_names: Names of the classes, in the order of the model's logits; empty where the task has none.
        start: The plan's starting tensors by name, such as "layers.0.q_proj:A".
        trains: The parts that are trained: "A", "B", "dense".
        steps: Budget of optimiser steps.
        batch_size: Examples in an optimiser step.
        batches: Draws the batches that fedlora's own loop would train on, `steps` of them, as the task makes them.
        loss: The task's mean loss of such a batch.
        client_id: Number of the client.
        round: From 1.
        rounds: Of the run in all.
        seed: Of this client in this round.
        keep: Whether `train.keep_optimizer` is set.
        kept: By name, what the loop put here in the last round in which the client's update was used. With `keep`,
            what it holds at the end is kept with the client for the next round.
    """

    model: PeftModel
    dataset: datasets.Dataset
    tokenizer: Any
    label_names: tuple[str, ...]
    start: Mapping[str, Tensor]
    trains: frozenset[str]
    steps: int
    batch_size: int
    batches: Callable[[], Iterator[Batch]]
    loss: Callable[[Batch], Tensor]
    client_id: int
    round: int
    rounds: int
    seed: int
    keep: bool
    kept: dict[str, Tensor]


def from_trainer(make: Callable[..., Any]) -> Loop:
    """A loop out of a transformers Trainer, such as TRL's SFTTrainer and DPOTrainer.

    The Trainer stops after the budget's steps, and writes no checkpoints and no progress: both are the run's. With
    `train.keep_optimizer` its optimiser goes on from round to round, and its schedule covers the whole run.

    Args:
        make: Builds the Trainer from a `LocalWork` and `train.options`; a function, which this may decorate.

    Returns:
        For `train.loop`.
    """

    def loop(work: LocalWork, **options: Any) -> Mapping[str, float]:
        from transformers import Trainer

        trainer = make(work, **options)
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"train.loop: from_trainer got a {type(trainer).__name__}: let {make.__name__} return a "
                "transformers.Trainer",
                code="bad-loop",
            )
        _prepare(trainer, work)
        done = trainer.train()
        if work.keep:
            work.kept.update(_state_of(trainer))
        return {
            "loss": float(done.training_loss),
            "steps": int(done.global_step),
            "examples_seen": int(done.global_step) * work.batch_size,
        }

    loop.__signature__ = _signature(make)  # type: ignore[attr-defined]
    return loop


def _signature(make: Callable[..., Any]) -> Any:
    import inspect

    return inspect.signature(make)


def _prepare(trainer: Any, work: LocalWork) -> None:
    """Give a Trainer the budget, and take from it what is the run's."""
    from transformers import ProgressCallback
    from transformers.trainer_callback import PrinterCallback, TrainerCallback

    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps
    if batch != work.batch_size:
        raise ConfigError(
            f"the trainer's batch has {batch} examples and train.batch_size is {work.batch_size}: set "
            "per_device_train_batch_size=work.batch_size in its arguments",
            code="budget-differs",
        )
    if args.max_steps not in (-1, work.steps):
        raise ConfigError(
            f"the trainer's max_steps is {args.max_steps} and the round's budget {work.steps} steps: leave max_steps "
            "out, and set train.steps or train.epochs",
            code="budget-differs",
        )
    args.max_steps, args.save_strategy = work.steps, "no"
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not work.keep:
        return
    create = trainer.create_scheduler
    trainer.create_scheduler = lambda num_training_steps, *rest: create(num_training_steps * work.rounds, *rest)

    class GoOn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            _load_state(trainer, work.kept)

    trainer.add_callback(GoOn())


def _state_of(trainer: Any) -> dict[str, Tensor]:
    """State of a Trainer's optimiser by parameter, and of its schedule."""
    import torch

    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value).detach().cpu().clone()
        for parameter, state in trainer.optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    schedule = trainer.lr_scheduler.state_dict()
    found[f"{SCHEDULE}last_epoch"] = torch.tensor(schedule["last_epoch"])
    found[f"{SCHEDULE}last_lr"] = torch.tensor(schedule["_last_lr"], dtype=torch.float64)
    return found


def _load_state(trainer: Any, kept: Mapping[str, Tensor]) -> None:
    """Let a Trainer's optimiser and schedule go on from what `_state_of` gave."""
    if f"{SCHEDULE}last_epoch" not in kept:
        return
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's is around torch's
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    plain = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(order):
        begin = f"{names[id(parameter)]}/"
        if mine := {name.removeprefix(begin): value for name, value in kept.items() if name.startswith(begin)}:
            plain["state"][place] = mine
    optimizer.load_state_dict(plain)
    last = int(kept[f"{SCHEDULE}last_epoch"])
    rates = kept[f"{SCHEDULE}last_lr"].tolist()
    state = {"last_epoch": last, "_step_count": last + 1, "_last_lr": rates}
    trainer.lr_scheduler.load_state_dict(trainer.lr_scheduler.state_dict() | state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
