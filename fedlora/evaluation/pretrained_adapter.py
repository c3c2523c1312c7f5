"""Any adapter in PEFT's format on its base, for evaluation: a run's, or one that somebody else trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedlora.assets import ASSETS, Checkpoint, local_name
from fedlora.config import Overrides, RunConfig, changed_keys, load_config, parse_config
from fedlora.data import FederatedData, load_data, load_local
from fedlora.errors import ConfigError, ModelError, RunDirError
from fedlora.model import load_adapted, unquantised
from fedlora.model.fingerprint import fingerprint
from fedlora.provenance import Provenance, class_names_digest, said_of_adapter
from fedlora.runs.rundir import PUT_BACK, RunDir, require_provenance
from fedlora.speedups.trial import find_coupling
from fedlora.tasks import Examples, Task, load_task, tasks
from fedlora.tasks._own_metric import with_own_metric
from fedlora.training.runtime import setup

if TYPE_CHECKING:
    from peft import PeftModel

TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
}
"""PEFT's names of tasks."""


NOTHING_KNOWN = Provenance()


@dataclass(frozen=True)
class Source:
    """Where an adapter is and what it is for.

    Args:
        folder: with adapter_config.json.
        config: of its run, or one made from adapter_config.json.
        run: that trained it, or None.
        made: what it was trained with, as far as that is known.
        own_data: whether the config's data are the run's own, and not what somebody asked for instead.
    """

    folder: Path
    config: RunConfig
    run: RunDir | None = None
    made: Provenance = NOTHING_KNOWN
    own_data: bool = True


@dataclass(frozen=True)
class Adapted:
    """A model with an adapter, as `evaluate` takes it.

    Args:
        peft: as PEFT loads it.
        device: on which it is.
        coupled: why an example's result depends on the examples beside it, if it does.
    """

    peft: PeftModel
    device: torch.device
    coupled: str | None = None

    @property
    def model(self) -> nn.Module:
        """The model inside, with the adapter's layers."""
        return self.peft.get_base_model()

    def train_mode(self, training: bool) -> None:
        """Dropout on or off."""
        self.model.train(training)

    def uncached(self) -> AbstractContextManager[None]:
        """Nothing is kept of such a model."""
        return nullcontext()


def find_adapter(path: Path, overrides: Overrides = (), data: Path | None = None) -> Source:
    """The adapter of a run's folder, or in a folder of PEFT's.

    Args:
        path: of the run, or of the folder.
        overrides: of its config, as `load_config` takes them.
        data: the file that it will be evaluated on, if it is not the run's own test set.

    Raises:
        RunDirError: there is neither, or the run has no adapter (yet).
        ConfigError: the adapter does not say what it is for, and neither do the overrides.
    """
    if not (path / "config.toml").is_file() and (path.parent / "config.toml").is_file() and path.name == "adapter":
        path = path.parent
    if (path / "config.toml").is_file():
        run = RunDir.open(path)
        if not (run.adapter_dir / "adapter_config.json").is_file():
            how = "its adapter was removed" if run.finished else f"go on with fedlora run --resume {path}"
            if run.unverified:
                how = f"what it exported could not be verified; try again with fedlora export {path} OUT"
            raise RunDirError(f"{str(path)!r} has no adapter: {how}", code="run-without-adapter")
        own = not {keys[0] for keys in changed_keys(overrides)} & {"data", "seed", "partition"}
        return Source(run.adapter_dir, load_config(path / "config.toml", overrides), run, run.provenance, own)
    if not (path / "adapter_config.json").is_file():
        raise RunDirError(
            f"{str(path)!r} is neither a run nor an adapter: name a folder with adapter_config.json",
            code="not-an-adapter",
        )
    return Source(path, _config_of(path, overrides, data), made=Provenance.of_adapter(path))


def _config_of(folder: Path, overrides: Overrides, data: Path | None) -> RunConfig:
    """The config that an adapter of unknown origin implies."""
    facts: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    given = changed_keys(overrides)
    base, task = facts.get("base_model_name_or_path"), _task_of(folder, facts)
    if not task and not {("task",), ("task", "name")} & given:
        raise ConfigError(
            f"{str(folder)!r} does not name its task: set task.name (and the task's fields)",
            code="adapter-without-task",
        )
    model = {"quantize": said_of_adapter(folder).get("quantize"), "revision": facts.get("revision")}
    if base:
        model["name"] = base if facts.get("revision") else local_name(base)
    # No named corpus, whose columns and classes would be taken for the adapter's.
    known: dict[str, Any] = {
        "name": folder.name,
        "data": {"source": str(data or "none")},
        "model": {key: value for key, value in model.items() if value},
        **({"task": task} if task else {}),
    }
    config = parse_config(known, overrides, source=str(folder))
    if not base and "name" not in config.model.model_fields_set:
        raise ConfigError(f"{str(folder)!r} does not name its base model: set model.name", code="adapter-without-base")
    for table, main, single in (("model", "name", "dtype"), ("data", "source", "text")):
        there = getattr(config, table).model_fields_set
        left_out = [key for key in known[table] if key not in there and (key == main or (table,) in given)]
        if left_out:
            what = ", ".join(f"{key} ({known[table][key]!r})" for key in left_out)
            raise ConfigError(
                f"[{table}] of {str(folder)!r} is given without {what}: add {' and '.join(left_out)}, or set single "
                f"keys, such as {table}.{single}",
                code="known-key-left-out",
            )
    return config


def _task_of(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The table [task] with the names of the classes, as the run that left an adapter wrote it; of another program's
    adapter what PEFT says. Code of somebody's own is not taken from there: {}."""
    said = said_of_adapter(folder)
    task, classes = said.get("task"), said.get("class_names")
    if not isinstance(task, dict):
        return {"name": TASKS[kind]} if (kind := facts.get("task_type")) in TASKS else {}
    if tasks.is_foreign(str(task.get("name"))):
        return {}
    return {k: v for k, v in task.items() if v is not None} | ({"labels": classes} if classes else {})


def examples_for(source: Source, data: Path | None) -> Examples:
    """The examples of a file, or the run's own test examples.

    Raises:
        ConfigError: there is no file, and no run that would have test examples.
        DataError: the file is not usable, or the classes are not known.
    """
    if data is None:
        if source.run is None:
            raise ConfigError("an adapter alone has no test examples: name a file with --data", code="no-examples")
        return data_for(source).require_test()
    return load_local(_with_labels(source), data)


def data_for(source: Source, *parts: str) -> FederatedData:
    """The data of a run, if they are those that it was made with.

    Args:
        source: of a run.
        parts: that will be looked at besides the class names and the test examples: "train_data".

    Raises:
        RunDirError: they changed.
    """
    data = load_data(source.config)
    found = Provenance(
        class_names=class_names_digest(data.label_names),
        train_data=data.train_digest or None,
        test_data=data.test_digest or None,
    )
    _require(source, found.only(("class_names", *(("test_data", *parts) if source.own_data else ()))))
    return data


def _require(source: Source, found: Provenance) -> None:
    if source.run is not None:
        source.run.require(found, PUT_BACK)
    else:
        cure = f"name the right one in model.name, or remove {str(source.folder / 'fedlora.json')!r}"
        require_provenance(source.made, found, f"the adapter in {str(source.folder)!r}", cure)


def load_for(source: Source, examples: Examples | None, *, packed: bool = False) -> tuple[Adapted, Task]:
    """The base with the adapter, and the task, ready for `evaluate`.

    Args:
        source: see `find_adapter`.
        examples: that it will be evaluated on; None: there are none.
        packed: without examples, whether a base in 4 or 8 bits stays so; its weights can then not be looked at.

    Raises:
        ConfigError: there are no examples, and nobody knows how many classes the adapter is for.
        ModelError: the base cannot be loaded, or the adapter does not fit it.
    """
    task = with_own_metric(load_task(source.config.task), source.config.evaluation.metric)
    checkpoint = Checkpoint.of(source.config.model)
    device = setup(source.config.runtime).device
    kwargs = _head(source, task) if examples is None else task.model_kwargs(examples)
    read = {} if examples is None else task.reads(checkpoint)
    names = class_names_digest(examples.label_names) if examples is not None else None
    found = Provenance(class_names=names, **read)
    if Path(checkpoint.source).is_dir():  # before anything else is said about a base that is another
        found = replace(found, base=fingerprint(checkpoint, quantize=source.config.model.quantize))
    _require(source, found)
    config = source.config if packed or examples is not None else unquantised(source.config)
    try:
        model = load_adapted(config, source.folder, task.auto_class, kwargs, device)
    except ModelError as error:
        raise ModelError(f"{str(source.folder)!r}: {error}", code=error.code) from None
    if found.base is None:
        commit = getattr(model.config, "_commit_hash", None)
        _require(source, Provenance(base=fingerprint(checkpoint, commit, quantize=source.config.model.quantize)))
    adapted = Adapted(model, device)
    if examples is not None and len(examples):
        adapted = replace(adapted, coupled=find_coupling(adapted, task, examples))
    return adapted, task


def _head(source: Source, task: Task) -> dict[str, Any]:
    """What the model must be told so that its head is as large as the adapter's."""
    if not task.has_classes:
        return {"num_labels": 1} if task.head else {}
    config = _with_labels(source)
    corpus = ASSETS.get(config.data.source)
    names = config.task.fields.get("labels") or (corpus.label_names if corpus else ())
    if not names:
        raise ConfigError(
            "the adapter does not say how many classes it has: name them in task.labels",
            code="classes-unknown",
        )
    return {"num_labels": len(names)}


def _with_labels(source: Source) -> RunConfig:
    """The config with the names of the classes that the run found in its data; a file of its own may lack one."""
    config, run = source.config, source.run
    fields = config.task.fields
    if run is None or fields.get("labels") or not load_task(config.task).has_classes:
        return config
    if (corpus := ASSETS.get(config.data.source)) is not None and corpus.label_names:
        return config
    names = (run.read_json("partition.json") or {}).get("label_names") or load_data(config).label_names
    return config.model_copy(update={"task": config.task.model_copy(update={"labels": list(names)})})
