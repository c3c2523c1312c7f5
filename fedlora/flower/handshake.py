"""What server and node make sure of before a run: one fedlora, one base model and tokenizer, one config, one data set.

The server asks with its version, a hash of each table that decides what is trained, and hashes of what it stands on
(`fedlora.provenance`); a node whose tables, tokenizer or other parts are others says which. Its answer names its own
version and base model's hash, which the server checks (`check_hello`).
Tables that a node may have of its own (its data, its device) or does not use are not compared.
"""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, RecordDict

from fedlora import __version__
from fedlora.config import NODES, RunConfig
from fedlora.errors import ReplyError
from fedlora.provenance import DATA, WORDS, Provenance, in_words

TABLES = (
    *("seed", "model", "adapter", "task", "partition", "clients", "train", "strategy", "wire", "privacy"),
    *("evaluation", "selection"),  # which examples are kept from training
)


def question(config: RunConfig, pins: Provenance) -> RecordDict:
    """The content of the server's "hello".

    Args:
        config: The run's config.
        pins: Hashes of the server's model and data, where they may be disclosed.
    """
    facts = {"config": _hashes(config), "provenance": shared(config, pins).known}
    texts = {key: json.dumps(value) for key, value in facts.items()}
    return RecordDict({"hello": ConfigRecord({"fedlora": __version__, **texts})})


def with_ledger(question: RecordDict, ledger: str) -> RecordDict:
    """A "hello" to a node whose ledger had this head when the server last saw it."""
    return RecordDict({"hello": ConfigRecord({**question.config_records["hello"], "ledger": ledger})})


def ledger_seen(content: RecordDict) -> str:
    """Head of this node's ledger when the server last saw it, by the server's "hello"; "" if it never did."""
    return str(content.config_records["hello"].get("ledger", ""))


def shared(config: RunConfig, pins: Provenance) -> Provenance:
    """The parts that server and nodes have in common: data only where all read the same source.

    The base model is not among them: its fingerprint has a check of its own, on the server. Nor is the adapter that the
    run began with, whose values nodes are sent.
    """
    parts = set(WORDS) - {"base", "start"}
    return pins.only(parts - set(DATA) if config.data.source == NODES else parts)


def require_same_ground(content: RecordDict, config: RunConfig, pins: Provenance) -> None:
    """Raise on a node whose tokenizer, class names or data are not the server's.

    Args:
        content: The server's "hello".
        config: The run's config as this node reads it.
        pins: Hashes of this node's model and data, where they may be disclosed.

    Raises:
        ReplyError: the message names the parts that differ.
    """
    asked = json.loads(str(content.config_records["hello"].get("provenance", "{}")))
    if changed := Provenance.read(asked).changed(shared(config, pins)):
        verb = "is" if len(changed) == 1 and changed[0] != "class_names" else "are"
        raise ReplyError(
            f"{in_words(changed)} on this node {verb} not the server's (another hash): give both the same files",
            code="other-provenance",
        )


def require_same_config(content: RecordDict, config: RunConfig) -> None:
    """Raise on a node whose config would train something else.

    Args:
        content: The server's "hello".
        config: The run's config as this node reads it.

    Raises:
        ReplyError: the message names the tables that differ.
    """
    asked = json.loads(str(content.config_records["hello"].get("config", "{}")))
    other = [table for table, own in _hashes(config).items() if asked.get(table, own) != own]
    if other:
        names = ", ".join(table if table in ("seed", "rounds") else f"[{table}]" for table in other)
        raise ReplyError(
            f"its config is not the server's: {names} differ: give server and nodes the same config file",
            code="other-config",
        )


def _hashes(config: RunConfig) -> dict[str, str]:
    """A hash of each table; of the model without where it lies, since its weights have a hash of their own."""
    anywhere = config.model.model_copy(update={"name": "", "revision": None, "trust_remote_code": False})
    config = config.model_copy(update={"model": anywhere})
    by_rounds = {} if config.train.schedule == "constant" else {"rounds": str(config.rounds)}
    return {table: config.digest(table) for table in TABLES} | by_rounds
