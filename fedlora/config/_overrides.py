"""Changes of a config's tables, the same ones in whatever order they are given.

They are `key=value` texts, as `--set` takes them, or a tree of tables with values, as Python has it.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from fedlora.config._base import OPEN_TABLES
from fedlora.config._run import RunConfig
from fedlora.errors import ConfigError

Keys = tuple[str, ...]
Overrides = Sequence[str] | Mapping[str, Any]
"""Texts such as "train.lr=0.1", or a tree such as {"train": {"lr": 0.1}}."""

UNSET = object()
"""In a tree: a key that was given no value, to be removed once it is known to be a key."""
LIST_OF_TABLES = "clients.profiles"
"""Its tables' keys may be None, as those of the config's other tables."""
INNER = "inner"
"""Field of a rule around another one: a table within the table, which has a name of its own."""
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PART = re.compile(r"""\s*(?:("(?:[^"\\]|\\.)*"|'[^']*')|([^.="'\s][^.=]*?))\s*([.=])""")
"""A part of a dotted key and the sign behind it; in quotes, as in TOML, a part may have dots and more in it."""


def without_unset(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the keys that overrides have removed, and without tables that hold nothing else."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            inner = without_unset(value)
            if inner or not value:
                out[key] = inner
        elif value is not UNSET:
            out[key] = value
    return out


def apply_overrides(tree: dict[str, Any], overrides: Overrides) -> None:
    """Change a config's tree in place.

    The name of a rule, partitioner or task comes before its fields: another name removes the fields of the old one,
    but for a partition's number of clients where the new one has it, too. A table of a Python tree is merged into that
    of the config, and any other value takes the place of the old one, a dict's, too. Of texts, whole tables come before
    their keys, and a key without a value ("train.epochs=") becomes `UNSET`.

    Raises:
        ConfigError: an override has no key, goes through a value as if it were a table, or has a value that no TOML
            file could hold.
    """
    if isinstance(overrides, Mapping):
        _merge(tree, overrides, ())
        return
    split = [split_override(override) for override in overrides]
    for keys, text in sorted(split, key=lambda pair: (len(pair[0]), not _names_entry(pair[0]))):
        _apply(tree, keys, text)


def changed_keys(overrides: Overrides) -> set[Keys]:
    """The keys that overrides give values to, each as its parts."""
    if isinstance(overrides, Mapping):
        return set(_leaves(overrides, ()))
    return {split_override(override)[0] for override in overrides}


def refuse_twice(overrides: Overrides) -> None:
    """Raise `ConfigError` if one key is given two values: which of them counts would depend on their order."""
    if isinstance(overrides, Mapping):
        return
    first: dict[Keys, str] = {}
    for override in overrides:
        keys, text = split_override(override)
        if first.setdefault(keys, text) != text:
            raise ConfigError(
                f"--set {'.'.join(keys)} is given twice, as {first[keys]!r} and {text!r}: give it once",
                code="key-given-twice",
            )


# ------------------------------------------------------------------------------------------------ trees


def _merge(tree: dict[str, Any], changes: Mapping[str, Any], table: Keys) -> None:
    for given, value in sorted(changes.items(), key=lambda item: item[0] != "name"):
        key = _name(given, ".".join(table) or "the config")
        keys = (*table, key)
        if not _is_merged(keys, value):
            _put(tree, keys, _plain(value, ".".join(keys)))
            continue
        here = _named(tree.get(key), keys)
        tree[key] = here if isinstance(here, dict) else {}
        _merge(tree[key], value, keys)


def _leaves(changes: Mapping[str, Any], table: Keys) -> Iterator[Keys]:
    for key, value in changes.items():
        keys = (*table, str(key))
        if _is_merged(keys, value) and value:
            yield from _leaves(value, keys)
        else:
            yield keys


def _is_merged(keys: Keys, value: Any) -> bool:
    """Whether a value is a table's keys, rather than what a key is set to."""
    if not isinstance(value, Mapping):
        return False
    if keys[0] in OPEN_TABLES:
        return set(keys[1:]) <= {INNER}
    if len(keys) > 1 or keys[0] not in RunConfig.model_fields:
        return False
    kind = RunConfig.model_fields[keys[0]].annotation
    return not isinstance(kind, type) or issubclass(kind, BaseModel)


def _plain(value: Any, key: str) -> Any:
    """A value as a TOML file would give it, or None; numbers and arrays of numpy and torch are Python's.

    Within a value there is no None: the run's own file could not say it, and a resume would have another config.
    """
    if isinstance(value, Enum):
        value = value.value
    if callable(tolist := getattr(value, "tolist", None)):
        value = tolist()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if inner is None and key != LIST_OF_TABLES:
                raise ConfigError(
                    f"{key}.{name} cannot be None, which no config file can say: leave it out", code="bad-value"
                )
        return {_name(name, key): _plain(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        if any(inner is None for inner in value):
            raise ConfigError(f"{key} has None in a list, which no config file can say: leave it out", code="bad-value")
        return [_plain(inner, key) for inner in value]
    if isinstance(value, str):
        _require_utf8(value, key)
    elif not (value is None or isinstance(value, bool | int | float)):
        cure = 'name it, as "my_module:name"' if callable(value) else "give a number, a text, a list or a dict"
        raise ConfigError(f"{key} is a {type(value).__name__}: {cure}", code="bad-value")
    return value


def _name(name: Any, key: str) -> str:
    """A key of a dict that is a value: a text, or a number such as that of a group."""
    if isinstance(name := _plain(name, key), str | int) and not isinstance(name, bool):
        return str(name)
    raise ConfigError(f"{key} has {name!r} as a key: give it as a text", code="bad-value")


# ------------------------------------------------------------------------------------------------ texts


def split_override(override: str) -> tuple[Keys, str]:
    """The parts of the key of a `key=value` text, without their quotes, and the text of the value.

    Raises:
        ConfigError: it has no key, or one in quotes is no TOML.

    Example:
        >>> split_override("adapter.rank_pattern.'layer.0' = 4")
        (('adapter', 'rank_pattern', 'layer.0'), '4')
    """
    keys: list[str] = []
    place, sign = 0, "."
    while sign == "." and (found := _PART.match(override, place)) is not None:
        quoted, bare, sign = found.groups()
        keys.append(bare if quoted is None else _unquoted(quoted))
        place = found.end()
    if sign == ".":
        raise ConfigError(
            f"--set {override!r} must have the form key=value, for example train.lr=0.001; train.lr= removes the key",
            code="not-key-value",
        )
    _require_utf8(override, f"--set {override!r}")
    return tuple(keys), override[place:].strip()


def dotted(keys: Keys) -> str:
    """A key as `--set` takes it: a part that is no bare key of TOML's stands in quotes.

    Example:
        >>> dotted(("adapter", "rank_pattern", "layer.0"))
        'adapter.rank_pattern."layer.0"'
    """
    return ".".join(part if _BARE.fullmatch(part) else json.dumps(part, ensure_ascii=False) for part in keys)


def _unquoted(part: str) -> str:
    try:
        return str(tomllib.loads(f"key = {part}")["key"])
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--set: the key {part} is not valid TOML: {error}", code="not-toml") from None


def _apply(tree: dict[str, Any], keys: Keys, text: str) -> None:
    here = tree
    for depth, table in enumerate(keys[:-1]):
        inner = here[table] = _named(here.get(table, {}), keys[: depth + 1])
        if not isinstance(inner, dict):
            what = ".".join(keys[: depth + 1])
            raise ConfigError(
                f"--set {'.'.join(keys)}={text}: {what!r} is a single value, not a table: set it as {what}=...",
                code="not-a-table",
            )
        here = inner
    if text:
        value = _value(keys, text)
        if keys[0] in OPEN_TABLES and len(keys) == 1 and isinstance(value, dict) and "name" not in value:
            raise ConfigError(
                f"--set {keys[0]}={text} takes the place of the whole table and has no name: add name, or set single "
                f"keys, such as {keys[0]}.{next(iter(value), 'name')}=...",
                code="table-without-name",
            )
        _put(here, keys, value)
        return
    if keys[0] in OPEN_TABLES and len(keys) > 1 and keys[-1] not in here:
        raise ConfigError(
            f"--set {'.'.join(keys)}= removes a key that is not set: [{keys[0]}] has no {keys[-1]!r}",
            code="key-not-set",
        )
    here[keys[-1]] = UNSET


def _value(keys: Keys, text: str) -> Any:
    """The text as TOML; a bare word is a string, and so is what only reads as a number where a string is wanted."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    if isinstance(value, str | list | dict):
        return value
    kind = _type_of(keys)
    if kind is None or _fits(kind, value) or not _fits(kind, text):
        return value
    return text


def _type_of(keys: Keys) -> Any:
    """The type of a key, as pydantic understands it; None for an unknown one, or a field of a registry's entry."""
    if keys[0] in OPEN_TABLES:
        return str if _names_entry(keys) else None
    kind: Any = RunConfig
    for key in keys:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif key in getattr(kind, "model_fields", {}):
            field = kind.model_fields[key]
            kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        else:
            return None
    return None if isinstance(kind, type) and issubclass(kind, BaseModel) else kind


def _fits(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ both


def _names_entry(keys: Keys) -> bool:
    """Whether it is the name of a rule, a partitioner or a task, or of a rule within a rule."""
    return keys[0] in OPEN_TABLES and len(keys) > 1 and keys[-1] == "name" and set(keys[1:-1]) <= {INNER}


def _named(table: Any, keys: Keys) -> Any:
    """A rule within a rule as a table, where it is given by its name alone."""
    return {"name": table} if isinstance(table, str) and keys[0] in OPEN_TABLES and keys[-1] == INNER else table


def _put(here: dict[str, Any], keys: Keys, value: Any) -> None:
    """Set the last of the keys in its table."""
    if _names_entry(keys) and here.get("name") != value:
        # another rule, partitioner or task: the old one's fields do not apply
        stay = {"clients": here["clients"]} if "clients" in here and _takes_clients(keys, value) else {}
        here.clear()
        here.update(stay)
    here[keys[-1]] = value


def _takes_clients(keys: Keys, name: Any) -> bool:
    """Whether it names a partitioner of fedlora's that is told the number of clients."""
    from fedlora.partition import partitioners

    if keys[0] != "partition" or not isinstance(name, str) or name not in partitioners or partitioners.is_foreign(name):
        return False
    return "clients" in partitioners.get(name).__dataclass_fields__


def _require_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} is not UTF-8 text: write it in UTF-8", code="not-utf8") from None
