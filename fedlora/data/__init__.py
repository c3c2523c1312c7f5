"""From a config to examples on clients: read, tokenise, cut off the test examples, divide the rest.

Everything that a seed decides here has a key of its own (`fedlora.rng.derive`), and what costs time is done once a
process: tokenised examples and whole partitions are remembered by what they depend on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedlora.assets import ASSETS, Checkpoint
from fedlora.config import DataConfig, OpenTable, RunConfig
from fedlora.data._sources import (
    limited,
    limited_rows,
    optional_columns,
    read_file,
    read_source,
    require_one_kind,
    select,
    source_files,
)
from fedlora.data._split import Split, describe_split, keep_apart, own_parts, split_test
from fedlora.data.source import DataSource, own_source
from fedlora.errors import ConfigError, DataError, closest, nearest
from fedlora.hashing import Stamp, digest_of_rows, row_digests, stamp
from fedlora.partition import Partition, PartitionInput, load_partitioner
from fedlora.passed_in import shown
from fedlora.progress import activity
from fedlora.rng import derive
from fedlora.tasks import Examples, Table, Task, load_task

__all__ = [
    "DataSource",
    "FederatedData",
    "Table",
    "column_roles",
    "load_data",
    "load_local",
    "load_local_pinned",
    "read_file",
    "split_test",
    "task_columns",
]


@dataclass(frozen=True, eq=False)
class Apart:
    """A part of the clients' own examples that nobody trains on.

    Args:
        examples: of all clients here, clean.
        clients: sorted indices into `examples` of each client's; some may be empty.
    """

    examples: Examples
    clients: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class FederatedData:
    """The data of one federation.

    Args:
        train: training examples of all clients, noisy where the partition says so.
        test: the server's examples for evaluating the global model, always clean; those of all clients together where
            a simulation evaluates at the clients. None where this machine has none.
        probes: examples that may be looked at before anything is trained and whatever is private: to try out the
            model, and to compare exports. Never measured for their own sake; in a private run they are public.
        clients: sorted indices into `train` of the examples that each client trains on.
        client_names: of the clients, where the data name them; empty otherwise.
        dropped: sorted indices into `train` of the examples that no client holds.
        label_names: names of the classes.
        domains: names of the domains in sorted order; empty if no column holds them.
        domain_column: that column's name in `train.columns` and `test.columns`, or None.
        note: why examples were dropped; empty if none were.
        test_note: what is unusual about the test set's size; empty if nothing is.
        train_digest: a hash of the rows of the source in their order, before any seed chose among them, by what the
            task and the partition read of each; "" where this machine has no such source.
        test_digest: a hash of the test examples in their order, by what the task reads of each: two runs with the same
            one were tested on the same examples, whatever their models make of them.
        validation: the server's examples by which rounds are compared; None without a table [selection], or where it
            lies with the clients.
        apart: "test" and "validation" -> what each client keeps apart of its own.
    """

    train: Examples
    test: Examples | None
    probes: Examples
    clients: tuple[np.ndarray, ...]
    dropped: np.ndarray
    label_names: tuple[str, ...]
    domains: tuple[str, ...]
    domain_column: str | None = None
    note: str = ""
    test_note: str = ""
    client_names: tuple[str, ...] = ()
    train_digest: str = ""
    test_digest: str = ""
    validation: Examples | None = None
    apart: Mapping[str, Apart] = field(default_factory=dict)

    def require_test(self) -> Examples:
        """The test examples; `DataError` where this machine has none."""
        if self.test is None:
            raise DataError(
                "this machine has no test examples, which stay with the clients here: name a file (data.test, or "
                "fedlora evaluate --data)",
                code="no-test-data",
            )
        return self.test


@dataclass(frozen=True)
class _Key:
    """All that the tokenised examples depend on; hashable."""

    model: Checkpoint
    task: str
    data: str
    keep: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    limit_seed: int
    raw: bool


def load_data(config: RunConfig) -> FederatedData:
    """Read, tokenise and divide the data of a run; remembered, so that the second call is instant.

    Where each node brings its own (`fedlora.data.own`), it is what this machine has of them.

    Raises:
        AssetError: a named corpus or model was not fetched.
        ConfigError: the task's or the partition's table is wrong.
        DataError: a file or column is missing, a value is not usable, or a client would be empty.
    """
    from fedlora.data.own import brought_by_nodes, load_own

    load_task(config.task)
    if brought_by_nodes(config):
        return load_own(config)
    require_shared(config)
    partitioner = load_partitioner(config.partition.name, config.partition.fields)
    files = [file for file in source_files(config.data) if file is not None]
    files += () if (own := own_source(config.data)) is None else own.files
    roles = column_roles(config.data)
    if partitioner.needs_domain and "domain" not in roles:
        raise DataError(
            f"partition {config.partition.name!r} needs a column of domains: set data.domain",
            code="no-domain-column",
        )
    checkpoint = Checkpoint.of(config.model)
    keep = (*(roles[role] for role in ("domain", "group") if role in roles), *partitioner.columns)
    key = _Key(
        model=checkpoint,
        task=config.task.model_dump_json(),
        # The shares of test and validation are applied after the tokens are there.
        data=config.data.model_copy(update={"test_fraction": 0.5, "validation_fraction": 0.5}).model_dump_json(),
        keep=tuple(dict.fromkeys(keep)),
        stamps=(*map(stamp, files), *checkpoint.stamps()),
        limit_seed=0 if config.data.limit is None else config.seed,
        raw=config.train.loop is not None,
    )
    return _federate(key, config.partition.model_dump_json(), Split.of(config), config.seed)


def require_shared(config: RunConfig) -> None:
    """Raise `ConfigError` where a node names data of its own in a run that divides `data.source`."""
    if config.data.own is not None:
        raise ConfigError(
            "this node's config names data of its own, but the run divides data.source among the clients: set "
            "data.source = 'nodes' and partition.name = 'nodes' in the run's config",
            code="node-data-unused",
        )


def load_local(config: RunConfig, path: str | Path) -> Examples:
    """The examples of one file: of a node that brings its own data, or a server's own test file.

    Columns have the names that the config gives them; those of domains and groups are carried along if the file has
    them. The
    classes must be known beforehand, from `task.labels` or from the named corpus of `data.source`, since a node's
    file may lack one. `data.limit` applies.

    Raises:
        DataError: as `load_data`, or the classes are not known.
    """
    return load_local_pinned(config, path)[0]


def load_local_pinned(config: RunConfig, path: str | Path) -> tuple[Examples, str]:
    """As `load_local`, with the examples' hash (see `FederatedData.test_digest`)."""
    task = load_task(config.task)
    table = read_file(Path(path))
    corpus = ASSETS.get(config.data.source)
    names = () if corpus is None else corpus.label_names
    if task.has_classes and not names and not getattr(task, "labels", ()):
        raise DataError(
            f"the file {str(path)!r} may not hold every class: name all classes, as in task.labels = ['no', 'yes']",
            code="classes-unknown",
        )
    roles = column_roles(config.data)
    keep = tuple(dict.fromkeys(roles[r] for r in ("domain", "group") if r in roles and roles[r] in table.columns))
    columns = task_columns(task, config.data, table.columns)
    table = select(table, (*columns.values(), *keep), repr(shown(str(path))), optional_columns(task, columns))
    table = limited(table, config.data.limit, config.seed)
    for name in keep:
        require_one_kind(table.columns[name], name)
    digests = _row_digests(table, columns)
    table = _with_names(Table(table.columns, names), keep, config.data.group_names, all_occur=False)
    examples = task.prepare(table, Checkpoint.of(config.model), columns, keep=keep)
    return examples if config.train.loop is None else examples.with_raw(table), digest_of_rows(digests)


def _with_names(
    table: Table, columns: Sequence[str], names: Mapping[str, Mapping[str, str]], *, all_occur: bool = True
) -> Table:
    """The table with `data.group_names` in the place of the values of some columns.

    Args:
        table: raw examples.
        columns: of domains, groups and clients.
        names: column -> value -> name.
        all_occur: whether each column and value must be there, as in the training source and not in a file beside it.

    Raises:
        ConfigError: a column or value is not there, or a name would stand for two values.
    """
    renamed: dict[str, list[str]] = {}
    for column, mine in names.items():
        if column not in columns:
            if not all_occur:
                continue
            raise ConfigError(
                f"data.group_names names {column!r}, which is no column of domains, groups or clients; "
                f"{nearest(column, columns)}",
                code="no-such-column",
            )
        cells = [str(value) for value in table.columns[column]]
        values = set(cells)
        if all_occur and (unknown := sorted(mine.keys() - values)):
            raise ConfigError(
                f"data.group_names.{column} names the value {unknown[0]!r}, which is not in that column; "
                f"{nearest(unknown[0], [closest(unknown[0], values) or min(values)])}",
                code="no-such-value",
            )
        after = [mine.get(value, value) for value in values]
        if twice := sorted(name for name in set(after) if after.count(name) > 1):
            raise ConfigError(
                f"data.group_names.{column} gives the name {twice[0]!r} to two values: give each a name of its own",
                code="name-given-twice",
            )
        renamed[column] = [mine.get(value, value) for value in cells]
    return Table({**table.columns, **renamed}, table.label_names) if renamed else table


def column_roles(data: DataConfig) -> dict[str, str]:
    """Role ("text", "label", "domain", "group", and others of `data.columns` or the corpus) -> column.

    A named corpus's own columns stand where the config names none, or leaves the default.
    """
    corpus = ASSETS.get(data.source)
    roles = {} if corpus is None else dict(corpus.columns)
    for role in ("text", "label", "domain", "group"):
        named = getattr(data, role)
        if named is not None and not (role in roles and named == DataConfig.model_fields[role].default):
            roles[role] = named
    return roles | data.columns


def task_columns(task: Task, data: DataConfig, found: Collection[str] | None) -> dict[str, str]:
    """Role -> column of all that a task reads.

    Args:
        task: whose roles.
        data: names columns.
        found: the columns of the file, by which a task may know how to read it; None before it may be looked at.

    Raises:
        ConfigError: data.columns names a role that the task has not.
        DataError: the task knows no such files.
    """
    for role in data.columns:
        if role not in task.roles:
            raise ConfigError(
                f"data.columns names {role!r}, which the task does not need; {nearest(role, task.roles)}",
                code="unknown-role",
            )
    for role in ("text", "label"):
        if role not in task.roles and getattr(data, role) != DataConfig.model_fields[role].default:
            raise ConfigError(
                f"data.{role} names a column that the task does not read: remove it; its roles are "
                f"{', '.join(task.roles)}, in data.columns",
                code="key-without-effect",
            )
    roles = column_roles(data)
    return {role: roles.get(role, role) for role in task.roles_of(found, roles)}


def _row_digests(table: Table, columns: Mapping[str, str]) -> np.ndarray:
    return row_digests({role: table.columns[column] for role, column in columns.items()})


@dataclass(frozen=True, eq=False)
class _Prepared:
    """The examples of the training source and then of the test source.

    Args:
        examples: of both.
        begin: where those of the test source begin, if there is one.
        rows: a hash of each example's row.
        source: a hash of all rows of the training source.
    """

    examples: Examples
    begin: int | None
    rows: np.ndarray
    source: str


@lru_cache(maxsize=4)
def _prepared(key: _Key) -> _Prepared:
    data = DataConfig.model_validate_json(key.data)
    task = load_task(OpenTable.model_validate_json(key.task))
    source, test = read_source(data)
    columns = task_columns(task, data, source.columns)
    empty = optional_columns(task, columns)
    whole = select(source, (*columns.values(), *key.keep), f"data.source {shown(data.source)!r}", empty)
    digests = _row_digests(whole, columns)
    source_digest = digest_of_rows(digests, [whole.columns[name] for name in key.keep])
    table, rows = limited(whole, data.limit, key.limit_seed), digests[limited_rows(whole, data.limit, key.limit_seed)]
    begin = None
    domain = column_roles(data).get("domain")
    for name in key.keep:
        require_one_kind(table.columns[name], name)
    if test is not None:
        begin = len(table)
        needed = (*columns.values(), *(name for name in key.keep if name == domain))
        test = limited(select(test, needed, f"data.test {shown(str(data.test))!r}", empty), data.limit, key.limit_seed)
        if domain is not None:
            require_one_kind([*table.columns[domain], *test.columns[domain]], domain)
        rows = np.concatenate([rows, _row_digests(test, columns)])
        # Groups and clients are a matter of the training source, whose columns a test file need not have.
        blank = [""] * len(test)
        both = {name: [*values, *test.columns.get(name, blank)] for name, values in table.columns.items()}
        table = Table(both, table.label_names)
    table = _with_names(table, key.keep, data.group_names)
    activity.info("tokenising the examples")
    # In one go, so that both have the same classes.
    examples = task.prepare(table, key.model, columns, keep=key.keep)
    return _Prepared(examples.with_raw(table) if key.raw else examples, begin, rows, source_digest)


@lru_cache(maxsize=8)
def _federate(key: _Key, partition_table: str, split: Split, seed: int) -> FederatedData:
    data = DataConfig.model_validate_json(key.data)
    task = load_task(OpenTable.model_validate_json(key.task))
    table = OpenTable.model_validate_json(partition_table)
    prepared = _prepared(key)
    examples, begin = prepared.examples, prepared.begin
    roles = column_roles(data)
    domain = roles.get("domain")
    values = None if domain is None else examples.columns[domain].astype(str)
    groups = examples.columns[roles["group"]] if "group" in roles else None
    facts = {"groups": groups, "domains": values, "labels": examples.labels}
    rows = np.arange(len(examples) if begin is None else begin)
    tested = np.empty(0, np.int64) if begin is None else np.arange(begin, len(examples))
    test_note = ""
    if begin is None and split.server_test:
        mask = split_test(len(examples), split.server_test, seed, **facts)
        test_note = describe_split(mask, split.server_test, groups)
        rows, tested = np.flatnonzero(~mask), np.flatnonzero(mask)
    validated = np.empty(0, np.int64)
    if split.server_validation:
        rows, validated = keep_apart(rows, split.server_validation, seed, "validation", **facts)
    train = examples.take(rows)
    info = PartitionInput(size=len(train), labels=train.labels, columns=train.columns, domain=domain)
    partition = load_partitioner(table.name, table.fields).split(info, derive(seed, "partition"))
    shares, places = own_parts([rows[share] for share in partition.clients], split, seed, facts)
    if split.client_test and not len(tested):
        tested = np.sort(np.concatenate(places["test"]))
    test = examples.take(tested) if len(tested) else None
    clients = tuple(np.searchsorted(rows, share) for share in shares)
    return FederatedData(
        train=_with_noise(task, train, replace(partition, clients=clients), seed),
        test=test,
        probes=examples.take(rows[:1]) if test is None else test,
        clients=clients,
        dropped=partition.dropped,
        label_names=examples.label_names,
        domains=() if values is None else tuple(str(name) for name in np.unique(values)),
        domain_column=domain,
        note=partition.note,
        test_note=test_note,
        client_names=partition.names,
        train_digest=prepared.source,
        test_digest=digest_of_rows(prepared.rows[tested]) if len(tested) else "",
        validation=examples.take(validated) if len(validated) else None,
        apart={part: Apart(examples, tuple(of_clients)) for part, of_clients in places.items()},
    )


def _with_noise(task: Task, train: Examples, partition: Partition, seed: int) -> Examples:
    """Labels made wrong and inputs disturbed, client by client, each by a draw of its own."""
    classes = len(train.label_names)
    if train.raw and any((*partition.label_noise, *partition.feature_noise)):
        raise ConfigError(
            "the noise of partition.label_noise and partition.feature_noise is not in the raw rows that train.loop "
            "gets: remove the noise, or train.loop",
            code="noise-without-effect",
        )
    for client, rate in enumerate(partition.label_noise):
        if rate == 0:
            continue
        if train.labels is None:
            raise ConfigError("partition.label_noise needs labels, and this task has none; remove it", code="no-labels")
        generator = np.random.default_rng(derive(seed, "label_noise", client))
        rows = partition.clients[client]
        wrong = generator.permutation(rows)[: round(rate * len(rows))]
        labels = train.labels.copy()
        labels[wrong] = (labels[wrong] + generator.integers(1, classes, size=len(wrong))) % classes
        train = replace(train, labels=labels)
    for client, rate in enumerate(partition.feature_noise):
        if rate != 0:
            train = task.corrupt(train, partition.clients[client], rate, derive(seed, "feature_noise", client))
    return train
