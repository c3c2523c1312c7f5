"""Training by a loop of one's own, `train.loop`: one client at a time, and checked afterwards.

What the loop does to the model beside training its adapter is put back, see `fedlora.training.lent_base`.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedlora.assets import Checkpoint
from fedlora.client import LocalWork, Loop
from fedlora.config import RunConfig, TrainConfig
from fedlora.errors import ConfigError, ModelError, TrainingError
from fedlora.model import Base, seeded
from fedlora.registry import import_named
from fedlora.tasks._base import REFERENCE, Batch, Examples, Task, to_device
from fedlora.tasks._text import load_tokenizer
from fedlora.training.job import TrainJob, TrainResult, batches, number_of_steps
from fedlora.training.lent_base import bring_home, lent

FROZEN_PART_CHANGED = "frozen-part-changed"
"""Code of the error that ends a run: a frozen part of the adapter was trained, and the base is as it was."""
FIGURES = ("loss", "steps", "examples_seen")
"""What a loop may return."""


def load_loop(config: TrainConfig) -> Loop:
    """The loop that `train.loop` names.

    Raises:
        ConfigError: There is none, or it takes other arguments than the work and `train.options`.
    """
    assert config.loop is not None
    loop = import_named("training loop", config.loop)
    if not callable(loop):
        raise ConfigError(f"train.loop {config.loop!r} is no function: name one", code="bad-loop")
    try:
        inspect.signature(loop).bind(None, **config.options)
    except TypeError as error:
        raise ConfigError(
            f"train.loop {config.loop!r} is called with the client's work and train.options "
            f"({', '.join(config.options) or 'none'}), and it does not take these: {error}",
            code="bad-loop",
        ) from None
    return loop


def said_of_loops(config: RunConfig) -> Iterator[str]:
    """What is to be said once of a run whose clients train by a loop of their own."""
    if config.train.loop is not None:
        yield f"train.loop: clients train by {config.train.loop}, one at a time, without cohorts"
        yield "train.loop: two such runs give the same bytes only if the loop itself repeats them"
        yield "train.loop: nothing is claimed of privacy, whatever the loop does"


def require_plain_plan(config: TrainConfig, proximal_mu: float, *, tilted: bool = False) -> None:
    """Raise `TrainingError` for a plan that changes the loss, which is the loop's own."""
    if config.loop is not None and (proximal_mu or tilted):
        what = f"a proximal term to the loss (mu = {proximal_mu:g})" if proximal_mu else "a tilt to the loss"
        raise TrainingError(
            f"the rule adds {what}, which train.loop computes by itself: remove train.loop, or choose another rule",
            code="loop-has-its-loss",
        )


def train_by_own_loop(base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig) -> TrainResult:
    """Train an adapter on one client's examples by `train.loop`.

    Args:
        base: At the version to train on; its adapter is overwritten.
        task: Gives batches and losses to a loop that wants them.
        examples: The whole training set, with its raw rows.
        job: Adapter, trained parts and examples of the client.
        config: With the loop and the budget.

    Raises:
        ConfigError: There is no such loop, or it returns or keeps something else.
        TrainingError: It changed what was frozen, took more steps than it had, or loss or adapter are not finite.
    """
    loop = load_loop(config)
    require_plain_plan(config, job.proximal_mu, tilted=bool(job.tilt))
    base.require_fit(job.adapter)
    if not len(job.indices):
        raise TrainingError("the client has no examples: give it some", code="no-examples")
    if not base.write(job.adapter, job.trains):
        raise TrainingError(
            f"there is nothing to train: the adapter has no tensor in {sorted(job.trains)}", code="nothing-to-train"
        )
    kept = dict(job.optimizer)
    work = _work(base, task, examples, job, config, kept)
    begin = time.perf_counter()
    with seeded(job.seed, base.device), base.uncached(), lent(base):
        base.train_mode(True)
        returned = loop(work, **config.options)
        bring_home(base)
        trained = base.read()
    seconds = time.perf_counter() - begin
    figures = _figures(returned, work, config)
    if config.keep_optimizer:
        _require_tensors(kept, config)
    _require_frozen(job, trained.tensors())
    for name, value in trained.tensors(job.trains).items():
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"{name!r} is not finite after train.loop {config.loop!r}: lower its learning rate",
                code="adapter-not-finite",
            )
    return TrainResult(
        adapter=job.adapter.with_tensors(trained.tensors(job.trains)),
        num_examples=len(job.indices),
        steps=int(figures["steps"]),
        examples_seen=int(figures["examples_seen"]),
        loss=float(figures["loss"]),
        seconds=seconds,
        compute_seconds=seconds,
        optimizer=kept if config.keep_optimizer else {},
    )


def _work(
    base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig, kept: dict[str, Tensor]
) -> LocalWork:
    import datasets

    steps = number_of_steps(len(job.indices), config)
    rows = {name: values[job.indices].tolist() for name, values in examples.raw.items()}
    return LocalWork(
        model=base.peft_model,
        dataset=datasets.Dataset.from_dict(rows),
        tokenizer=_reader(base),
        label_names=examples.label_names,
        start=job.adapter.clone().tensors(),
        trains=frozenset(job.trains),
        steps=steps,
        batch_size=config.batch_size,
        batches=partial(_batches, base, task, examples, job, config, steps, {}),
        loss=lambda batch: task.losses(base.model, batch).mean(),
        client_id=job.client_id,
        round=job.round,
        rounds=job.rounds,
        seed=job.seed % 2**32,  # what libraries take
        keep=config.keep_optimizer,
        kept=kept,
    )


def _batches(
    base: Base,
    task: Task,
    examples: Examples,
    job: TrainJob,
    config: TrainConfig,
    steps: int,
    references: dict[int, Tensor],
) -> Iterator[Batch]:
    """The batches of fedlora's own loop; where the loss compares with the start, what that says is found out once.

    Args:
        references: By example, what the job's adapter says; filled by the first call, and the same for all calls.
    """
    drawn = list(batches(job.indices, config.batch_size, steps, job.seed))
    if task.refers and not references:
        found: dict[int, Tensor] = {}
        with _as_it_started(base, job), torch.no_grad():
            for chosen in drawn:
                batch = to_device(task, task.collate(examples, chosen), base.device)
                found |= zip(chosen.tolist(), task.reference(base.model, batch), strict=True)
        references.update(found)
    for chosen in drawn:
        batch = to_device(task, task.collate(examples, chosen), base.device)
        yield batch | ({REFERENCE: torch.stack([references[k] for k in chosen.tolist()])} if task.refers else {})


@contextmanager
def _as_it_started(base: Base, job: TrainJob) -> Iterator[None]:
    """Within, the model evaluates with the values that the job starts from, whatever it has been trained to since."""
    start, training = job.adapter.tensors(), base.model.training
    now = {name: parameter.data for name, parameter in base.parameters.items()}
    try:
        base.model.eval()
        for name, parameter in base.parameters.items():
            parameter.data = start[name].to(parameter.device, parameter.dtype, copy=True)
        yield
    finally:
        for name, parameter in base.parameters.items():
            parameter.data = now[name]
        base.model.train(training)


def _reader(base: Base) -> Any:
    """A copy of the base model's tokenizer or image processor; None where it has neither."""
    from transformers import AutoImageProcessor

    checkpoint = Checkpoint.of(base.config)
    try:
        return copy.deepcopy(load_tokenizer(checkpoint))
    except ModelError:
        pass
    try:
        return AutoImageProcessor.from_pretrained(checkpoint.source, **checkpoint.options)
    except (OSError, ValueError):
        return None


def _figures(returned: object, work: LocalWork, config: TrainConfig) -> dict[str, float]:
    """What the loop measured, with the budget where it does not say."""
    given = returned if isinstance(returned, Mapping) else {}
    odd = sorted(map(str, given.keys() - {*FIGURES}))
    if "loss" not in given or odd:
        what = f"{odd[0]!r} is none" if "loss" in given else "there is no 'loss'"
        raise ConfigError(
            f"train.loop {config.loop!r} must return its metrics, {{'loss': mean training loss}} and if it likes "
            f"'steps' and 'examples_seen': {what}",
            code="bad-loop",
        )
    found = {name: _number(name, value, config) for name, value in given.items()}
    steps = found.setdefault("steps", float(work.steps))
    found.setdefault("examples_seen", steps * work.batch_size)
    if not math.isfinite(found["loss"]):
        raise TrainingError(
            f"the loss of train.loop {config.loop!r} is not finite: lower its learning rate", code="loss-not-finite"
        )
    if not 0 <= steps <= work.steps:
        raise TrainingError(
            f"train.loop {config.loop!r} took {steps:g} steps of a budget of {work.steps}: stop it after work.steps",
            code="budget-exceeded",
        )
    return found


def _number(name: str, value: Any, config: TrainConfig) -> float:
    """A figure that a loop returned, such as a float or a tensor of one value; only the loss may not be finite."""
    number = None
    if not isinstance(value, str):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            number = float(value)
    if number is None or not (name == "loss" or math.isfinite(number)):
        what = str(value) if isinstance(value, float) else f"a {type(value).__name__}"
        raise ConfigError(
            f"train.loop {config.loop!r} returned {what} as {name!r}: return a finite number"
            + ("" if name == "loss" else f", or leave {name!r} out"),
            code="bad-loop",
        )
    return number


def _require_tensors(kept: Mapping[Any, Any], config: TrainConfig) -> None:
    """Raise `ConfigError` for what cannot be kept with a client."""
    for name, value in kept.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConfigError(
                f"train.loop {config.loop!r} put a {type(value).__name__} into work.kept under {name!r}: put tensors "
                "under names there (torch.tensor makes one of a number)",
                code="bad-loop",
            )


def _require_frozen(job: TrainJob, trained: Mapping[str, Tensor]) -> None:
    free = job.adapter.tensors(job.trains)
    for name, start in job.adapter.tensors().items():
        if name not in free and not torch.equal(trained[name], start.to(trained[name].dtype)):
            raise TrainingError(
                f"train.loop changed {name!r}, which the rule has frozen in this round: let it train what requires "
                "gradients alone",
                code=FROZEN_PART_CHANGED,
            )
