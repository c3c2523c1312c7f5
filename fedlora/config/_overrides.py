"""`--set key=value`: changes of a config's tables, the same ones in whatever order they are given."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from fedlora.config._base import OPEN_TABLES
from fedlora.config._run import RunConfig
from fedlora.errors import ConfigError

UNSET = object()
"""In a tree: a key that was given no value, to be removed once it is known to be a key."""


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


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Change a config's tree in place.

    Whole tables come before their keys, and the name of a rule, partitioner or task before its fields: another name
    removes the fields of the old one. A key without a value ("train.epochs=") becomes `UNSET`.

    Raises:
        ConfigError: an override has no key, or goes through a value as if it were a table.
    """
    split = [_split(override) for override in overrides]
    for keys, text in sorted(split, key=lambda pair: (len(pair[0]), not _names_entry(pair[0]))):
        _apply(tree, keys, text)


def refuse_twice(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` if one key is given two values: which of them counts would depend on their order."""
    first: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, text = _split(override)
        if first.setdefault(keys, text) != text:
            raise ConfigError(
                f"--set {'.'.join(keys)} is given twice, as {first[keys]!r} and {text!r}: give it once",
                code="key-given-twice",
            )


def _split(override: str) -> tuple[tuple[str, ...], str]:
    key, separator, text = override.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(
            f"--set {override!r} must have the form key=value, for example train.lr=0.001; train.lr= removes the key",
            code="not-key-value",
        )
    try:
        override.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set {override!r} is not UTF-8 text: write it in UTF-8", code="not-utf8") from None
    return tuple(part.strip() for part in key.split(".")), text.strip()


def _names_entry(keys: tuple[str, ...]) -> bool:
    return len(keys) == 2 and keys[0] in OPEN_TABLES and keys[1] == "name"


def _apply(tree: dict[str, Any], keys: tuple[str, ...], text: str) -> None:
    here = tree
    for depth, table in enumerate(keys[:-1]):
        here = here.setdefault(table, {})
        if not isinstance(here, dict):
            what = ".".join(keys[: depth + 1])
            raise ConfigError(
                f"--set {'.'.join(keys)}={text}: {what!r} is a single value, not a table: set it as {what}=...",
                code="not-a-table",
            )
    last = keys[-1]
    if not text:
        if keys[0] in OPEN_TABLES and len(keys) > 1 and last not in here:
            raise ConfigError(
                f"--set {'.'.join(keys)}= removes a key that is not set: [{keys[0]}] has no {last!r}",
                code="key-not-set",
            )
        here[last] = UNSET
        return
    value = _value(keys, text)
    if _names_entry(keys) and here.get("name") != value:
        here.clear()  # another rule, partitioner or task: the old one's fields do not apply
    here[last] = value


def _value(keys: tuple[str, ...], text: str) -> Any:
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


def _type_of(keys: tuple[str, ...]) -> Any:
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
