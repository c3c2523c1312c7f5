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
from fedlora.data import FederatedData, load_local_pinned
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
            "where nodes bring their own data nothing is read or divided: set both data.source = 'nodes' and "
            "partition.name = 'nodes', or neither"
        )
    return source


def number_of_nodes(config: RunConfig) -> int:
    """How many nodes bring data.

    Raises:
        ConfigError: the partition does not say, or says more than that.
    """
    fields = config.partition.fields
    clients = fields.pop("clients", None)
    if fields or not isinstance(clients, int) or isinstance(clients, bool) or clients < 1:
        raise ConfigError("partition 'nodes' has one key: clients = the number of nodes")
    return clients


def require_labels(config: RunConfig) -> None:
    """Raise `ConfigError` where the task has classes that the config does not name: a node's file may lack one."""
    task = load_task(config.task)
    if "label" in task.roles and not getattr(task, "labels", ()):
        raise ConfigError(
            "each node reads its own file, which may lack a class: name them all, as in task.labels = ['no', 'yes']"
        )


def load_own(config: RunConfig) -> FederatedData:
    """What this machine has of such a federation.

    Returns:
        On a node: its own examples, all of them the share of any client, since only one is here; they stand in for the
        test examples too, which a node does not have. On the server: test examples, and clients without any.

    Raises:
        ConfigError: the config lacks what every machine must agree on.
        DataError: a file is missing or not usable.
    """
    number = number_of_nodes(config)
    require_labels(config)
    path = config.data.own or config.data.test
    if path is None:
        raise ConfigError(
            "the nodes keep their data, so the server needs test data of its own: set data.test to a file"
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no data file {path!r} on this machine: {_cure(config)}")
    stamps = (stamp(file), *Checkpoint.of(config.model).stamps())
    examples, digest = _read(config.model_dump_json(), str(file), stamps)
    here = np.arange(len(examples)) if config.data.own else np.empty(0, np.int64)
    domain = config.data.domain if config.data.domain in examples.columns else None
    names = () if domain is None else tuple(str(name) for name in np.unique(examples.columns[domain].astype(str)))
    return FederatedData(
        train=examples,
        test=examples,
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


@lru_cache(maxsize=2)
def _read(config: str, file: str, _stamps: tuple[Stamp, ...]) -> tuple[Examples, str]:
    return load_local_pinned(RunConfig.model_validate_json(config), file)


def _cure(config: RunConfig) -> str:
    return "correct data in its node-config.toml" if config.data.own else "correct data.test in the run's config"
