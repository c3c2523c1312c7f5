"""A config, or any tree of tables, as one table of dotted keys: what two runs differ in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.config._run import RunConfig


def flat_keys(config: RunConfig) -> dict[str, Any]:
    """Every key of a config, as "train.lr", in the config's order; values are those of JSON."""
    return flatten(config.model_dump(mode="json"))


def different_keys(left: RunConfig, right: RunConfig) -> list[str]:
    """The dotted keys in which two configs differ, sorted; a key that one of them lacks counts as None."""
    one, other = flat_keys(left), flat_keys(right)
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def flatten(tree: Mapping[str, Any], *, mark: str = ".", lists: bool = False) -> dict[str, Any]:
    """A tree of tables as one: {"a": {"b": 1}} as {"a.b": 1}; an empty table stays.

    Args:
        tree: tables within tables.
        mark: between the names.
        lists: whether the tables of a list have keys too, "a[1].b", without what is None in them.
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        parts: dict[str, Mapping[str, Any]] = {}
        if isinstance(value, Mapping):
            parts = {str(key): value} if value else {}
        elif lists and isinstance(value, list) and all(isinstance(inner, Mapping) for inner in value):
            given = [{name: part for name, part in inner.items() if part is not None} for inner in value]
            parts = {f"{key}[{place}]": inner for place, inner in enumerate(given, 1)}
        for name, part in parts.items():
            out |= {f"{name}{mark}{rest}": leaf for rest, leaf in flatten(part, mark=mark, lists=lists).items()}
        if not parts:
            out[str(key)] = value
    return out
