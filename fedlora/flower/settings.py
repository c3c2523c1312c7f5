"""How both apps find the run's config in Flower's run config.

Keys: `toml` (the whole config as text, as the in-process engine passes it), or `config` (a TOML file inside the app's
folder) with `set` ("rounds=20 strategy.name=ffa", separated by blanks), as `flwr run . --run-config` passes them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from flwr.app import Context

from fedlora.config import RunConfig, load_config, parse_config
from fedlora.errors import ConfigError

APP_FOLDER = Path(__file__).resolve().parents[2]


def config_of(context: Context) -> RunConfig:
    """The run's config.

    Raises:
        ConfigError: if the run config has neither key, or the config is wrong.
    """
    text = str(context.run_config.get("toml", ""))
    overrides = shlex.split(str(context.run_config.get("set", "")))
    if text:
        return parse_config(text, overrides)
    name = str(context.run_config.get("config", ""))
    if not name:
        raise ConfigError("no config was given: add --run-config 'config=\"configs/quickstart.toml\"'")
    path = Path(name)
    return load_config(path if path.is_absolute() or path.exists() else APP_FOLDER / path, overrides)


def client_id_of(context: Context) -> int:
    """The client's number, 0 to n - 1, from the node's config.

    Raises:
        ConfigError: if the node has none.
    """
    value = context.node_config.get("partition-id")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError("this node has no number: start it with --node-config 'partition-id=0 num-partitions=3'")
    return value
