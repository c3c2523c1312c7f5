"""Everything that training and evaluation need, opened once per process: task, data, base model, kernels."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.assets import Checkpoint
from fedlora.config import RunConfig, settle
from fedlora.errors import ConfigError, ModelError, PrivacyError
from fedlora.model import Base, base_key, load_base
from fedlora.model.quantize import holds_int8
from fedlora.progress import activity
from fedlora.provenance import WORDS, Provenance, class_names_digest
from fedlora.speedups import Speedups, install
from fedlora.speedups.trial import Trial
from fedlora.tasks import load_task
from fedlora.tasks._base import Task
from fedlora.tasks._own_metric import with_own_metric
from fedlora.training.checkpointing import require_checkpoints
from fedlora.training.cohort import why_alone
from fedlora.training.embedding_noise import require_noisy
from fedlora.training.fits import require_fit
from fedlora.training.runtime import Machine, pass_over_libraries, setup
from fedlora.training.stacked_lora import cannot_share

if TYPE_CHECKING:
    from fedlora.data import FederatedData

SECTIONS = ("seed", "model", "adapter", "task", "data", "partition", "evaluation", "selection", "runtime")
"""The parts of a config that decide what is opened; two configs that differ elsewhere share it."""


@dataclass(frozen=True)
class Workspace:
    """What client and server work on.

    Args:
        config: the run's.
        task: what is learnt.
        data: examples and the clients' shares.
        base: the model with its adapter.
        machine: where it computes, and how.
        speedups: what makes the base faster.
    """

    config: RunConfig
    task: Task
    data: FederatedData
    base: Base
    machine: Machine
    speedups: Speedups

    @property
    def settled(self) -> dict[str, str]:
        """What each "auto" chose that a run keeps, for `fedlora.config.settle`."""
        return {**self.speedups.settled, "dtype": str(self.base.dtype).removeprefix("torch.")}

    @cached_property
    def provenance(self) -> Provenance:
        """What this process trains and tests on, by hashes."""
        return Provenance(
            base=self.base.weights_digest,
            class_names=class_names_digest(self.data.label_names),
            train_data=self.data.train_digest or None,
            test_data=self.data.test_digest or None,
            **self.task.reads(Checkpoint.of(self.config.model)),
        )

    @property
    def pins(self) -> Provenance:
        """As much of `provenance` as may be written and said: of a private run no hash of training data.

        Nor of test examples that were cut from the training source, since which those are depends on all of it.
        """
        config = self.config
        if config.privacy is None:
            return self.provenance
        hidden = {"train_data"} | ({"test_data"} if config.data.test is None else set())
        return self.provenance.only(WORDS.keys() - hidden)


_lock = threading.RLock()
_open: dict[str, Workspace] = {}  # one workspace: under the key of its config, and of the config that "auto" chose


def open_workspace(config: RunConfig) -> Workspace:
    """The workspace of a config; the process keeps the last one, so that every later call costs microseconds.

    Args:
        config: a resolved config.
    """
    with _lock:
        found = next((workspace for workspace in _open.values() if workspace.config is config), None)
        if found is not None:  # as clients of one process ask, each in its turn
            return found
        key = _key(config)
        if key not in _open:
            kept = [workspace.base for workspace in _open.values()]
            _open.clear()
            workspace = _opened(config, kept)
            _open[key] = _open[_key(settle(config, workspace.settled))] = workspace
        _require_possible(config, _open[key])
        _open[key] = replace(_open[key], config=config)
        return _open[key]


def _require_possible(config: RunConfig, workspace: Workspace) -> None:
    """Refuse what `[train]` asks for where the base or the data cannot have it."""
    base, hooks = workspace.base, config.example_privacy is not None and why_alone(workspace.base)
    if config.privacy is not None and holds_int8(base.model):
        raise PrivacyError(
            "the checkpoint is held in int8, which computes a column in another way for all rows of a batch where one "
            "of them is large: take the whole weights, or model.quantize = 'nf4' of them",
            code="examples-coupled",
        )
    if config.train.neftune_noise_alpha is not None:
        require_noisy(base.model, workspace.data.probes)
        if hooks:
            raise PrivacyError(
                f"train.neftune_noise_alpha does not go with private training by Opacus's hooks, which is used here "
                f"because {hooks}: remove it",
                code="noise-with-hooks",
            )
    if config.train.micro_batch_size is not None and base.coupled is not None:
        raise ModelError(
            f"train.micro_batch_size would change what is trained: {base.coupled}; remove it, and lower "
            "train.batch_size where memory is short",
            code="batch-not-divisible",
        )
    if config.train.keep_optimizer and hooks:
        raise PrivacyError(
            f"train.keep_optimizer does not go with private training by Opacus's hooks, which is used here because "
            f"{hooks}: remove it",
            code="state-with-hooks",
        )
    if config.train.gradient_checkpointing:
        require_checkpoints(base.model)
        if hooks:
            raise PrivacyError(
                f"train.gradient_checkpointing does not go with private training by Opacus's hooks, which is used here "
                f"because {hooks}: remove it, and lower privacy.physical_batch_size where memory is short",
                code="checkpointing-with-hooks",
            )


def _opened(config: RunConfig, kept: list[Base]) -> Workspace:
    """A new workspace, on the kept base if it is the one that the config names."""
    from fedlora.data import load_data

    machine = setup(config.runtime)
    task = with_own_metric(load_task(config.task), config.evaluation.metric)
    _require_hub_revision(config)
    task.reads(Checkpoint.of(config.model))  # a model that is not there is said before the data are read
    activity.info("reading %s", config.data.source)
    data = load_data(config)
    activity.info("loading %s", config.model.name)
    pass_over_libraries()
    wanted = (config, task.auto_class, task.head, task.model_kwargs(data.train), task.peft_task_type)
    if kept and kept[0].key != base_key(*wanted):
        kept.clear()  # two large bases do not fit a device
    base = kept[0] if kept else load_base(*wanted)
    # What is found out on examples is written down, or ends the run: in a private run on public ones alone.
    own = [data.train] if data.validation is None else [data.train, data.validation]
    public, secret = ([data.probes], own) if config.privacy else ([data.probes, data.train], [])
    require_fit(config, base, task, public)
    activity.info("choosing how to compute")
    trial = Trial(base, task, public)
    speedups = install(trial, config.runtime, public if secret else [*own, data.probes], secret)
    base.alone = cannot_share(trial) or base.alone
    return Workspace(config, task, data, base, machine, speedups)


def _key(config: RunConfig) -> str:
    # How many clients train at once, in how many processes and where, is asked of each run's own config.
    alike = config.runtime.model_copy(update={"cohort": 1, "processes": 1, "backend": "processes"})
    private = "" if config.privacy is None else "/private"
    raw = "" if config.train.loop is None else "/raw"
    return config.model_copy(update={"runtime": alike}).digest(*SECTIONS) + private + raw


def _require_hub_revision(config: RunConfig) -> None:
    if config.model.revision is not None and Path(Checkpoint.of(config.model).source).is_dir():
        raise ConfigError(
            f"model.revision applies to models of the hub, and {config.model.name!r} is a local folder: remove it",
            code="key-without-effect",
        )


def close_workspace() -> None:
    """Let go of the kept workspace and its base, so that their memory can be freed."""
    with _lock:
        _open.clear()
