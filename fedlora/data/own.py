"""A federation whose data never meet: each node names its own file, and the server needs test data alone, or none.

The run's config says `data.source = "nodes"`, `data.test = FILE` (the server's; none with `evaluation.on = "clients"`)
and

```toml
[partition]
name = "nodes"
clients = 2
```

A node's own config names its file, and all of it is that client's share; where clients evaluate, it keeps a part of it
apart, or names a second file.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedlora.assets import Checkpoint
from fedlora.config import NODES, RunConfig
from fedlora.data import Apart, FederatedData, column_roles, load_local_pinned, require_shared, task_columns
from fedlora.data._screen import invented, require_header, screened
from fedlora.data._sources import needed_columns, source_files
from fedlora.data._split import Split, keep_apart, own_parts
from fedlora.errors import ConfigError, DataError
from fedlora.hashing import Stamp, stamp
from fedlora.tasks import Examples, load_task

logger = logging.getLogger(__name__)


def brought_by_nodes(config: RunConfig) -> bool:
    """Whether each node brings its own data.

    Raises:
        ConfigError: the source says so and the partition does not, or the other way round.
    """
    source, partition = config.data.source == NODES, config.partition.name == NODES
    if source != partition:
        raise ConfigError(
            "data.source = 'nodes' and partition.name = 'nodes' go together, since nodes with data of their own divide "
            "nothing: set both or neither",
            code="nodes-in-one-table-only",
        )
    return source


def number_of_nodes(config: RunConfig) -> int:
    """How many nodes bring data.

    Raises:
        ConfigError: the partition does not say, or says more than that.
    """
    fields = config.partition.fields
    clients = fields.pop("clients", None)
    if fields:
        raise ConfigError(
            f"partition 'nodes' has no field {min(fields)!r}: its only one is clients", code="unknown-key"
        )
    if not isinstance(clients, int) or isinstance(clients, bool) or clients < 1:
        raise ConfigError(
            f"partition.clients must be the number of nodes, a whole number from 1, not {clients!r}", code="bad-value"
        )
    return clients


def require_labels(config: RunConfig) -> None:
    """Raise `ConfigError` where the task has classes that the config does not name: a node's file may lack one."""
    task = load_task(config.task)
    if task.has_classes and not getattr(task, "labels", ()):
        raise ConfigError(
            "each node reads its own file, which may not hold every class: name all classes, as in "
            "task.labels = ['no', 'yes']",
            code="classes-unknown",
        )


def load_own(config: RunConfig) -> FederatedData:
    """What this machine has of such a federation.

    Returns:
        On a node: its own examples, all of them the share of any client, since only one is here; they are the probes
        too. (Under [privacy] invented examples are, and rows that cannot be used are left out, see
        `fedlora.data._screen`.) On the server: test examples, if it has any, and clients without any.

    Raises:
        ConfigError: the config lacks what every machine must agree on.
        DataError: a file is missing or not usable.
    """
    number = number_of_nodes(config)
    require_labels(config)
    _require_no_limit(config)
    if config.data.own is None:
        return _of_server(config, number)
    file = _require_file(config, config.data.own)
    examples, probes, _ = _read(config.model_dump_json(), str(file), _stamps(config, file))
    for note in examples.notes:  # what may be counts is said here alone
        logger.info("%s: %s", file, note)
    domain = config.data.domain if config.data.domain in examples.columns else None
    domains = None if domain is None else examples.columns[domain].astype(str)
    facts = {"groups": _groups(config, examples), "domains": domains, "labels": examples.labels}
    split, apart = Split.of(config), {}
    if config.data.own_test is not None and split.client_test:
        second = _require_file(config, config.data.own_test)
        tested, _, _ = _read(config.model_dump_json(), str(second), _stamps(config, second))
        apart["test"] = Apart(tested, (np.arange(len(tested)),) * number)
        split = replace(split, client_test=0.0)
    (here,), places = own_parts([np.arange(len(examples))], split, config.seed, facts)
    apart |= {part: Apart(examples, (rows,) * number) for part, (rows,) in places.items()}
    return replace(_without_clients(config, examples, number), probes=probes, clients=(here,) * number, apart=apart)


def _of_server(config: RunConfig, number: int) -> FederatedData:
    """What the server has: its test set, or invented examples with which the model is tried out."""
    if config.data.test is None:
        if config.evaluation.at_server:
            raise ConfigError(
                "the nodes keep their data, so the server needs test data of its own: set data.test to a file, or let "
                "the nodes evaluate with evaluation.on = 'clients'",
                code="no-test-data",
            )
        task = load_task(config.task)
        probes = invented(task, Checkpoint.of(config.model), task_columns(task, config.data, None))
        return _without_clients(config, probes, number)
    file = _require_file(config, config.data.test)
    examples, _, digest = _read(config.model_dump_json(), str(file), _stamps(config, file))
    rows, validated = np.arange(len(examples)), np.empty(0, np.int64)
    if fraction := Split.of(config).server_validation:
        groups = _groups(config, examples)
        rows, validated = keep_apart(rows, fraction, config.seed, "validation", groups=groups, labels=examples.labels)
    test = examples.take(rows)
    found = replace(_without_clients(config, examples, number), test=test, probes=test, test_digest=digest)
    return replace(found, validation=examples.take(validated)) if len(validated) else found


def _without_clients(config: RunConfig, examples: Examples, number: int) -> FederatedData:
    """Some examples that nobody holds; what a node has is its own affair: not even a hash of it is known elsewhere."""
    domain = config.data.domain if config.data.domain in examples.columns else None
    names = () if domain is None else tuple(str(name) for name in np.unique(examples.columns[domain].astype(str)))
    return FederatedData(
        train=examples,
        test=None,
        probes=examples,
        clients=(np.empty(0, np.int64),) * number,
        dropped=np.empty(0, np.int64),
        label_names=examples.label_names,
        domains=names,
        domain_column=domain,
    )


def _groups(config: RunConfig, examples: Examples) -> np.ndarray | None:
    """The group of each example of this machine's file; None where the config knows of no groups."""
    column = column_roles(config.data).get("group")
    if column is None:
        return None
    if column not in examples.columns:
        raise DataError(
            f"the file has no column {column!r} (data.group), whose groups must not be divided between training and "
            "test: add it, or name a file of examples to be tested on (test = ... in node-config.toml)",
            code="no-group-column",
        )
    return examples.columns[column]


def _require_file(config: RunConfig, path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no data file {path!r} on this machine: {_cure(config)}", code="no-such-file")
    return file


def _stamps(config: RunConfig, file: Path) -> tuple[Stamp, ...]:
    return (stamp(file), *Checkpoint.of(config.model).stamps())


def require_readable(config: RunConfig) -> None:
    """Raise what hinders a private client whatever its examples are, and can therefore be told.

    Raises:
        AssetError: the model was not fetched.
        ConfigError: the config lacks what every machine must agree on.
        DataError: this node's file is missing, or its header lacks a column.
        ModelError: there is no tokenizer, or its chat template cannot be used.
    """
    task, model = load_task(config.task), Checkpoint.of(config.model)
    if not brought_by_nodes(config):
        require_shared(config)
        source_files(config.data)
        return
    if config.data.own is None:
        return
    number_of_nodes(config)
    require_labels(config)
    _require_no_limit(config)
    columns = task_columns(task, config.data, None)
    file = _require_file(config, config.data.own)
    require_header(file, needed_columns(task, columns))
    invented(task, model, columns)


def _require_no_limit(config: RunConfig) -> None:
    if config.privacy is not None and config.data.limit is not None:
        raise ConfigError(
            "data.limit draws from all rows of a node's file, so that one more row changes which others are used: "
            "remove it under [privacy]",
            code="limit-not-private",
        )


@lru_cache(maxsize=2)
def _read(config: str, file: str, _stamps: tuple[Stamp, ...]) -> tuple[Examples, Examples, str]:
    """The examples of a file and the probes that go with it, with a hash of what may be told."""
    read = RunConfig.model_validate_json(config)
    if read.data.own is None or read.privacy is None:
        examples, digest = load_local_pinned(read, file)
        return examples, examples, digest
    task, model = load_task(read.task), Checkpoint.of(read.model)
    columns = task_columns(task, read.data, None)
    return screened(Path(file), task, model, columns), invented(task, model, columns), ""


def _cure(config: RunConfig) -> str:
    return "correct data in its node-config.toml" if config.data.own else "correct data.test in the run's config"
