"""A federation whose data never meet: each node names its own file, and the server needs test data alone.

The run's config says `data.source = "nodes"`, `data.test = FILE` (the server's) and

```toml
[partition]
name = "nodes"
clients = 2
```

A node's own config names its file, and all of it is that client's share.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from fedlora.assets import Checkpoint
from fedlora.config import NODES, RunConfig
from fedlora.data import FederatedData, load_local_pinned, require_shared, task_columns
from fedlora.data._screen import invented, require_header, screened
from fedlora.data._sources import source_files
from fedlora.errors import ConfigError, DataError
from fedlora.hashing import Stamp, stamp
from fedlora.tasks import Examples, load_task


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
    if "label" in task.roles and not getattr(task, "labels", ()):
        raise ConfigError(
            "each node reads its own file, which may not hold every class: name all classes, as in "
            "task.labels = ['no', 'yes']",
            code="classes-unknown",
        )


def load_own(config: RunConfig) -> FederatedData:
    """What this machine has of such a federation.

    Returns:
        On a node: its own examples, all of them the share of any client, since only one is here; they stand in for the
        test examples too, which a node does not have. (Under [privacy] invented examples do, and rows that cannot be
        used are left out, see `fedlora.data._screen`.) On the server: test examples, and clients without any.

    Raises:
        ConfigError: the config lacks what every machine must agree on.
        DataError: a file is missing or not usable.
    """
    number = number_of_nodes(config)
    require_labels(config)
    _require_no_limit(config)
    path = config.data.own or config.data.test
    if path is None:
        raise ConfigError(
            "the nodes keep their data, so the server needs test data of its own: set data.test to a file",
            code="no-test-data",
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no data file {path!r} on this machine: {_cure(config)}", code="no-such-file")
    stamps = (stamp(file), *Checkpoint.of(config.model).stamps())
    examples, test, digest = _read(config.model_dump_json(), str(file), stamps)
    here = np.arange(len(examples)) if config.data.own else np.empty(0, np.int64)
    domain = config.data.domain if config.data.domain in examples.columns else None
    names = () if domain is None else tuple(str(name) for name in np.unique(examples.columns[domain].astype(str)))
    return FederatedData(
        train=examples,
        test=test,
        clients=(here,) * number,
        dropped=np.empty(0, np.int64),
        label_names=examples.label_names,
        domains=names,
        domain_column=domain,
        label_noise=(0.0,) * number,
        feature_noise=(0.0,) * number,
        # What a node holds is its own affair: not even a hash of it is known elsewhere.
        test_digest="" if config.data.own else digest,
    )


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
    columns = task_columns(task, config.data)
    file = Path(config.data.own).expanduser()
    if not file.is_file():
        raise DataError(
            f"there is no data file {config.data.own!r} on this machine: {_cure(config)}", code="no-such-file"
        )
    require_header(file, tuple(columns.values()))
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
    """Training and test examples, with a hash of what may be told."""
    read = RunConfig.model_validate_json(config)
    if read.data.own is None or read.privacy is None:
        examples, digest = load_local_pinned(read, file)
        return examples, examples, digest
    task, model = load_task(read.task), Checkpoint.of(read.model)
    columns = task_columns(task, read.data)
    return screened(Path(file), task, model, columns), invented(task, model, columns), ""


def _cure(config: RunConfig) -> str:
    return "correct data in its node-config.toml" if config.data.own else "correct data.test in the run's config"
