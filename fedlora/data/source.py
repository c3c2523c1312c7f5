"""A source of examples of one's own: a database, a simulator, files of another kind.

`data.source = "my_module:MySource"` names one, or the entry point of a package in the group "fedlora.sources".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from fedlora.config import DataConfig
from fedlora.errors import ConfigError, DataError
from fedlora.registry import Registry
from fedlora.tasks import Table


class DataSource(ABC):
    """Where examples come from; a frozen dataclass, whose fields are the table `data.options`."""

    @abstractmethod
    def read(self, split: str) -> Table:
        """The examples of a split, the same ones each time; [data] says which of the columns matter.

        Args:
            split: `data.train_split` ("train" by default), or what `data.test` names.
        """

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that are read: when one of them changes, a process reads the examples anew."""
        return ()


sources: Registry[DataSource] = Registry("data source", DataSource, "fedlora.sources")


def own_source(data: DataConfig) -> DataSource | None:
    """The source of one's own that `data.source` names, if it does.

    Raises:
        ConfigError: it cannot be found, or its fields in `data.options` are wrong or nobody's.
    """
    if data.source in sources:
        return sources.build(data.source, data.options)
    if data.options:
        raise ConfigError(
            f"data.options are the fields of a data source of one's own, and {data.source!r} is none: remove them, or "
            "set data.source = 'my_module:MySource'",
            code="key-without-effect",
        )
    return None


def read_split(source: DataSource, split: str) -> Table:
    """What a source reads, if it is a table.

    Raises:
        DataError: it is none, or has no rows, or columns of different lengths.
    """
    found = source.read(split)
    name = f"{type(source).__name__}.read({split!r})"
    if not isinstance(found, Table):
        raise DataError(f"{name} returned a {type(found).__name__}: return a fedlora.data.Table", code="not-a-table")
    if len({len(values) for values in found.columns.values()}) > 1:
        raise DataError(f"{name} returned columns of different lengths: make them equal", code="not-a-table")
    if len(found) == 0:
        raise DataError(f"{name} returned no rows: return some, or name another split", code="empty-split")
    return found
