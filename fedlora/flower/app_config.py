"""How both apps find the run's config in Flower's run config, and what a node says of itself in its own.

Run config: `toml` (the whole config as text, as tests and workers pass it), or `config` (a TOML file inside the
app's folder) with `set` ("rounds=20 strategy.name=ffa", separated by blanks), as `flwr run . --run-config` passes them.

Node config (`flower-supernode --node-config`): `NODE_KEYS`. What it says of a node's machine stands above the run's
config, which is the same for all.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from fedlora.config import NODES, RunConfig, load_config, parse_config, settle
from fedlora.errors import ConfigError, nearest

APP_FOLDER = Path(__file__).resolve().parents[2]

NODE_KEYS = {
    "partition-id": int,  # the client's number, 0 to n - 1
    "num-partitions": int,  # n, which Flower's own examples give; nobody reads it
    "data": str,  # its own data file
    "test": str,  # a second file, on which it evaluates
    "device": str,  # what it trains on
    "rank": int,  # of its adapter
    "ledger": str,  # its privacy ledger
    "epsilon": float,  # that all runs together may spend in it, at "delta"; set by its gate, from the site's policy
    "delta": float,
    "worker": str,  # its worker's socket, which `node_app` reads
}
"""Keys of a node's config, and their types."""


def config_of(context: Context) -> RunConfig:
    """The run's config, on a node with the node's own data file and device.

    Raises:
        ConfigError: if the run config has neither key, or a config is wrong.
    """
    config = _run_config_of(context)
    if config.data.own is not None or config.data.own_test is not None:
        raise ConfigError(
            "data.own and data.own_test are a node's own matter: remove them, and name the files in the node's "
            "--node-config",
            code="own-data-in-run-config",
        )
    require_node_config(context.node_config)
    data, device = context.node_config.get("data"), context.node_config.get("device")
    if data:
        own = {"own": data, "own_test": context.node_config.get("test")}
        config = config.model_copy(update={"data": config.data.model_copy(update=own)})
    elif config.data.source == NODES and "partition-id" in context.node_config:
        raise ConfigError(
            "each node brings its own data: start this one with --node-config 'data=\"/path/to/file\"'",
            code="no-own-data",
        )
    if device:
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"device": device})})
    return config


def require_node_config(facts: Mapping[str, object]) -> None:
    """Raise `ConfigError` for a node's config with an unknown key, or a value of another type than `NODE_KEYS` has."""
    for key, value in facts.items():
        if key not in NODE_KEYS:
            raise ConfigError(
                f"this node's config has an unknown key {key!r}; {nearest(key, NODE_KEYS)}", code="unknown-key"
            )
        if type(value) is not NODE_KEYS[key]:
            raise ConfigError(
                f"this node's config: {key} must be of type {NODE_KEYS[key].__name__}, not {value!r}", code="wrong-type"
            )


def by_itself(config: RunConfig) -> RunConfig:
    """What each "auto" that goes by the machine is where server and nodes are machines of their own: the same for all.

    A simulation chooses once for its run, and tells its processes (`fedlora.simulation.run`).
    """
    return settle(config, {"kernels": "off", "prefix_cache": "off", "dtype": "float32"})


def _run_config_of(context: Context) -> RunConfig:
    text = str(context.run_config.get("toml", ""))
    try:
        overrides = shlex.split(str(context.run_config.get("set", "")))
    except ValueError as error:
        raise ConfigError(
            f"the run config's set = {context.run_config['set']!r} cannot be read: {error}", code="unreadable-overrides"
        ) from None
    if text:
        return _parsed(text, tuple(overrides))
    name = str(context.run_config.get("config", ""))
    if not name:
        raise ConfigError(
            "no config was given: add --run-config 'config=\"configs/quickstart.toml\"'", code="no-config"
        )
    # Flower puts the folder into which it unpacked the app on sys.path.
    folders = [*map(Path, sys.path), Path(), APP_FOLDER]
    path = next((folder / name for folder in folders if (folder / name).is_file()), Path(name))
    return by_itself(load_config(path, overrides))


@lru_cache(maxsize=4)
def _parsed(text: str, overrides: tuple[str, ...]) -> RunConfig:
    """A virtual client would spend more time on its config than on its message: each of them has the same text."""
    return by_itself(parse_config(text, overrides))


def client_id_of(context: Context) -> int:
    """The client's number, 0 to n - 1, from the node's config.

    Raises:
        ConfigError: if the node has none.
    """
    value = context.node_config.get("partition-id")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(
            "this node has no number: start it with --node-config 'partition-id=0 num-partitions=3'",
            code="no-client-number",
        )
    return value


def rank_of(context: Context) -> int | None:
    """The rank that this node's config asks for; None: the run's config decides.

    Raises:
        ConfigError: it is no rank.
    """
    rank = context.node_config.get("rank")
    if rank is None:
        return None
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"this node's rank must be a whole number from 1, not {rank!r}", code="invalid-rank")
    return rank
