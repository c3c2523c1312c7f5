"""A config as one table of dotted keys: what two runs differ in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.config._run import RunConfig


def flat_keys(config: RunConfig) -> dict[str, Any]:
    """Every key of a config, as "train.lr", in the config's order; values are those of JSON."""
    return _flat(config.model_dump(mode="json"), "")


def different_keys(left: RunConfig, right: RunConfig) -> list[str]:
    """The dotted keys in which two configs differ, sorted; a key that one of them lacks counts as None."""
    one, other = flat_keys(left), flat_keys(right)
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out
