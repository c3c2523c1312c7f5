"""The Python entry point: train a federation and look at what it left, as the command line does.

import fedlora

run = fedlora.run("quickstart", rounds=2)
run.metrics[["accuracy", "train_loss"]]
model = run.model()
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from fedlora.callbacks import Callback
from fedlora.config import RunConfig, load_config, parse_config
from fedlora.errors import ConfigError, ExportError
from fedlora.passed_in import keep_data, kept_model, names_of_classes, shown, split_objects, with_objects
from fedlora.runs.place import check_free
from fedlora.runs.rundir import RunDir

if TYPE_CHECKING:
    import pandas
    from peft import PeftModel

    from fedlora.evaluation.pretrained_adapter import Source


@final
@dataclass(frozen=True)
class Run:
    """A run in its folder; what is read from there is read anew each time.

    Args:
        path: of the folder.
    """

    path: Path

    @property
    def config(self) -> RunConfig:
        """The resolved config."""
        return self._folder.config

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._folder.finished

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row for each round, 0 being the evaluation before training; the index is the round.

        Columns are the figures of metrics.jsonl that are single numbers: "accuracy", "loss", "train_loss", "bytes_up",
        "seconds", and with dots those of the domains ("domains.films.accuracy"), the classes and the rule.
        """
        import pandas

        from fedlora.config import flatten

        rows = []
        for record in self._folder.read_metrics():
            flat = flatten({key: value for key, value in record.items() if key != "clients"})
            rows.append({key: value for key, value in flat.items() if value is None or isinstance(value, int | float)})
        return pandas.DataFrame(rows).set_index("round") if rows else pandas.DataFrame()

    @property
    def result(self) -> Mapping[str, Any]:
        """What result.json holds: the last figures, and of a private run its claim; empty until the run is finished."""
        return self._folder.read_json("result.json") or {}

    @property
    def adapter(self) -> Path:
        """The folder with the adapter in PEFT's format.

        Raises:
            RunDirError: the run has none (yet).
        """
        from fedlora.evaluation.pretrained_adapter import find_adapter

        return find_adapter(self.path).folder

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self._folder.report

    def model(self) -> PeftModel:
        """The base model with the adapter, in evaluation mode, as plain transformers and PEFT load it.

        Raises:
            RunDirError: the run has no adapter (yet), or what it was trained on has changed since.
            ModelError: the base cannot be loaded, or the adapter does not fit it.
        """
        from fedlora.evaluation.pretrained_adapter import data_for, find_adapter, load_for

        source = find_adapter(self.path)
        has_classes = _task(source.config).has_classes
        adapted, _ = load_for(source, data_for(source).test if has_classes else None)
        adapted.train_mode(False)
        return adapted.peft

    @property
    def _folder(self) -> RunDir:
        return RunDir.open(self.path)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.metrics._repr_html_() or ""


def load_run(path: str | Path) -> Run:
    """The run in a folder, finished or not.

    Raises:
        RunDirError: there is none.
    """
    return Run(RunDir.open(path).path)


def run(
    config: str | Path | RunConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **changes: Any,
) -> Run:
    """Train a federation, and write everything to the folder `output`/`name` of its config.

    Models and data are named in the config, or passed in as objects:

    - `model`: a `transformers.PreTrainedModel`, which stays as it is, with `tokenizer`, its tokenizer or processor.
    - `dataset`: the examples, as a `datasets.Dataset`, a `pandas.DataFrame` or a list of dicts; or a mapping that has
      those for the test beside them, {"train": ..., "test": ...}.
    - `clients`: each client's own examples, a mapping of names to data or a list of data, instead of a partition. The
      column "client" says whose an example is, and is `data.domain` where that is not set and no test data are given.

    Args:
        config: a TOML file, the name of one that ships with fedlora ("quickstart"), or a `RunConfig`.
        overwrite: replace an earlier run of that name.
        resume: go on with it.
        callbacks: Told what happens, in their order, after the run's folder was written.
        quiet: Show nothing; otherwise there is a moving line in a terminal or notebook, and lines elsewhere.
        changes: keys of the config with new values, a table's keys as a dict (`rounds=2, train={"lr": 1e-3}`), None for
            a key that is to have no value (`privacy=None`), and the objects above. A value takes the place of the old
            one, a dict's, too.

    Returns:
        The finished run.

    Raises:
        FedloraError: of any kind; the message is one line that names the cure, and the folder stays intact.
    """
    resolved = resolve_config(config, changes)
    _require_callbacks(callbacks)
    if resume and overwrite:
        raise ConfigError(
            "resume continues a run and overwrite starts it again: give only one of them", code="resume-and-overwrite"
        )
    folder = RunDir.open(Path(resolved.output) / resolved.name, resolved) if resume else None
    if quiet:
        return Run(train(resolved, *callbacks, folder=folder, overwrite=overwrite).path)
    from rich.console import Console

    from fedlora.terminal import Terminal

    with Terminal(Console(file=sys.stdout)) as terminal:
        terminal.doing(f"loading {shown(resolved.model.name)} and {shown(resolved.data.source)}")
        return Run(train(resolved, terminal, *callbacks, folder=folder, overwrite=overwrite).path)


def train(
    config: RunConfig,
    *callbacks: Callback,
    folder: RunDir | None = None,
    overwrite: bool = False,
    replay: Path | None = None,
) -> RunDir:
    """`run` of a resolved config: what the command line and the Python entry point share.

    Args:
        config: of the run.
        callbacks: Told what happens.
        folder: of the run to go on with; None for a new one.
        overwrite: replace an earlier run of that name.
        replay: the folder of a run; in each round only those clients answer that did then.

    Raises:
        FedloraError: of any kind; a folder that holds nothing yet is removed again.
    """
    from fedlora.data.describe import draw_labels
    from fedlora.federation.given_adapter import pins_of, read_start
    from fedlora.federation.load_rule import load_rule
    from fedlora.progress import before_training
    from fedlora.report import plot_accuracy, write_report
    from fedlora.tracking import require_tracker
    from fedlora.training import open_workspace

    if folder is not None and folder.unverified:
        raise ExportError(
            f"{str(folder.path)!r} is finished, but its adapter could not be verified: try again with "
            f"fedlora export {folder.path} OUT",
            code="adapter-not-verified",
        )
    if folder is not None and folder.finished:
        for one in callbacks:
            one.message(f"{folder.path} is finished: nothing is left to train")
        return folder
    resume = folder is not None
    if not resume:
        check_free(config, overwrite=overwrite)
    load_rule(config)  # what is wrong with it is said before anything is loaded
    require_tracker(config)
    before = None if replay is None else RunDir.open(replay)
    if before is not None:
        from fedlora.simulation.replay import require_clients, require_replayable
        from fedlora.simulation.run import as_begun

        require_replayable(before, config)
        config = as_begun(config, before)
    workspace = open_workspace(config)  # before an earlier run is removed: the config may turn out to be wrong

    from fedlora.simulation.run import refuse_early, run_simulation

    if before is not None:
        require_clients(before, len(workspace.data.clients))
        if folder is not None and folder.begun:
            before.require(replace(workspace.pins, start=folder.provenance.start))
        else:
            before.require(pins_of(workspace, read_start(workspace)))
    refuse_early(config, workspace, begun=folder is not None and folder.begun)
    folder = folder or RunDir.create(config, overwrite=overwrite)
    try:
        if config.privacy is None:  # label counts are the clients' own
            draw_labels(workspace.data, folder.path / "labels.png")
        again = None if before is None else before.read_metrics()
        run_simulation(config, folder, *callbacks, resume=resume, replay=again)
    except Exception:
        if not resume:
            folder.discard_if_untrained()
        raise
    records = folder.read_metrics()
    if any("loss" in record for record in records):
        plot_accuracy(records, folder.path / "accuracy.png", before=before_training(config))
    if not folder.report.is_file():
        write_report(folder)
    return folder


def evaluate(run: Run | str | Path, data: Any = None, **changes: Any) -> pandas.DataFrame:
    """Measure an adapter on a run's test examples, or on others.

    Args:
        run: a run, its folder, or a folder with an adapter in PEFT's format.
        data: a .csv, .tsv, .jsonl, .json or .parquet file, or examples as `run` takes them; None: the run's test set.
        changes: of the config, as for `run`; of objects only `model` (and `tokenizer`), which must be those of the run.

    Returns:
        A row for "all" and one for each domain; a column for each figure, and "examples".

    Raises:
        FedloraError: there is no adapter, it does not fit its base, or the examples are not usable.
    """
    import pandas

    from fedlora.evaluation.pretrained_adapter import find_adapter

    path = run.path if isinstance(run, Run) else Path(run)
    plain, objects = split_objects(changes)
    if odd := sorted(objects.keys() - {"model", "tokenizer"}):
        raise ConfigError(f"{odd[0]}= is for training: pass what is to be measured as data=", code="key-without-effect")
    if objects:
        plain = {**plain, "model": {**plain.get("model", {}), "name": str(kept_model(objects))}}
    file = Path(data if isinstance(data, str | Path) else keep_data(data, "data=")) if data is not None else None
    rows, _ = figures_of(find_adapter(path, plain, file), file)
    return pandas.DataFrame(list(rows.values()), index=list(rows))


def partition_table(config: str | Path | RunConfig, **changes: Any) -> pandas.DataFrame:
    """Who holds what with a config, before anything is trained, as `fedlora partition` prints it.

    It is not called `fedlora.partition`, which is the package of the partitioners.

    Args:
        config: as for `run`.
        changes: as for `run`.

    Returns:
        A row for each client: "name" and "domain" where the data have them, "examples", for classes "labels.NAME" with
        the number of examples of each, and "label_entropy" in bits.

    Raises:
        FedloraError: the config is wrong, or the data are not there or cannot be divided like that.
    """
    from fedlora.data import load_data
    from fedlora.data.describe import clients_table

    return clients_table(load_data(resolve_config(config, changes)))


Rows = dict[str, dict[str, float]]


def figures_of(source: Source, data: Path | None) -> tuple[Rows, Rows]:
    """What an adapter reaches: "all" and each domain -> "examples", the task's main figure, and the other figures; and
    each class -> its figures, none where there are no classes.

    Args:
        source: of the adapter.
        data: a file; None: the test examples of its run.
    """
    from collections import Counter

    from fedlora.data import column_roles
    from fedlora.evaluation.pretrained_adapter import examples_for, load_for
    from fedlora.training import evaluate as measure

    examples = examples_for(source, data)
    model, task = load_for(source, examples)
    domain = column_roles(source.config.data).get("domain")
    domain = domain if domain in examples.columns else None
    found = measure(model, task, examples, domain_column=domain)
    sizes: Counter[str] = Counter() if domain is None else Counter(str(value) for value in examples.columns[domain])
    rows = {"all": found.overall, **found.domains}
    names = [task.metric, *(name for name in found.overall if name != task.metric)]
    sizes["all"] = len(examples)
    figures: Rows = {}
    for label, row in rows.items():
        figures[label] = {"examples": sizes[label]} | {name: row[name] for name in names}
    return figures, task.by_class(found.sums, examples.label_names)


def resolve_config(config: str | Path | RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A config with some keys changed.

    Args:
        config: a file, the name of a shipped one, or a config.
        changes: keys with new values, tables as mappings; and what is passed in as an object, see `run`.

    Raises:
        ConfigError: as `load_config`, or an object is not of a kind that can be passed in.
    """
    if not isinstance(config, str | Path | RunConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}: give a TOML file, the name of one that ships with fedlora, or a "
            "RunConfig, and what is to be changed as keyword arguments",
            code="bad-object",
        )
    plain, objects = split_objects(changes)
    if not isinstance(config, RunConfig):
        resolved = load_config(config, plain)
    else:
        resolved = parse_config(config.model_dump(mode="json"), plain) if plain else config
    if not objects:
        return resolved
    resolved = with_objects(resolved, objects)
    names = names_of_classes(objects, resolved.data.label)
    if not names or not _task(resolved).has_classes or resolved.task.fields.get("labels"):
        return resolved
    return resolved.model_copy(update={"task": resolved.task.model_copy(update={"labels": list(names)})})


def _require_callbacks(callbacks: Any) -> None:
    """Raise `ConfigError` for what could not be told anything, before a run begins."""
    given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    odd = [one for one in given if not isinstance(one, Callback)]
    if odd or given is not callbacks:
        raise ConfigError(
            f"callbacks= is a list of instances of classes derived from fedlora.Callback, not {(odd or given)[0]!r}",
            code="bad-object",
        )


def _task(config: RunConfig) -> Any:
    from fedlora.tasks import load_task

    return load_task(config.task)
