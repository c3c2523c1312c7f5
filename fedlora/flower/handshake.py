"""What server and node make sure of before a run: one fedlora, one base model, one config.

The server asks with its version and a hash of each table that decides what is trained; a node whose tables are others
says which. Its answer names its own version and base model's hash, which the server checks (`check_hello`).
Tables that a node may have of its own (its data, its device) or does not use are not compared.
"""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, RecordDict

from fedlora import __version__
from fedlora.config import RunConfig
from fedlora.errors import ReplyError

TABLES = ("seed", "model", "adapter", "task", "partition", "clients", "train", "strategy", "wire", "privacy")


def question(config: RunConfig) -> RecordDict:
    """The content of the server's "hello"."""
    return RecordDict({"hello": ConfigRecord({"fedlora": __version__, "config": json.dumps(_hashes(config))})})


def require_same_config(content: RecordDict, config: RunConfig) -> None:
    """Raise on a node whose config would train something else.

    Args:
        content: of the server's "hello".
        config: as the node reads it.

    Raises:
        ReplyError: naming the tables that differ.
    """
    asked = json.loads(str(content.config_records["hello"].get("config", "{}")))
    other = [table for table, own in _hashes(config).items() if asked.get(table, own) != own]
    if other:
        names = ", ".join(table if table == "seed" else f"[{table}]" for table in other)
        raise ReplyError(f"its config is not the server's: {names} differ: give server and nodes the same config file")


def _hashes(config: RunConfig) -> dict[str, str]:
    """A hash of each table; of the model without where it lies, since its weights have a hash of their own."""
    anywhere = config.model.model_copy(update={"name": "", "revision": None, "trust_remote_code": False})
    config = config.model_copy(update={"model": anywhere})
    return {table: config.digest(table) for table in TABLES}
