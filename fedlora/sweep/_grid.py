"""From `key=value,value` to a grid of settings with names that can be folders'."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from fedlora.config import Keys, dotted, split_override
from fedlora.errors import ConfigError

Settings = Mapping[str, tuple[str, ...]]
"""Name -> overrides, such as "strategy=ffa,lr=0.01" -> ("strategy.name=ffa", "train.lr=0.01")."""

RESERVED = {"seed": "--seeds", "name": "-o", "output": "-o"}
"""Keys that a sweep sets itself, and the option that decides them."""
LONGEST = 48
"""Letters of a value in a name; a longer one is cut, and a hash of the whole follows."""


def grid(assignments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every combination of some keys' alternatives.

    Args:
        assignments: such as "train.lr=0.001,0.01" or "adapter.targets=['query'],['query','value']": commas outside of
            brackets and quotes stand between alternatives. A key with one value is set everywhere.

    Returns:
        Name -> overrides, the last key changing fastest. A name says the keys that have alternatives; it is "" where
        none has.

    Raises:
        ConfigError: no `key=value`, an alternative is empty or stands there twice, a key twice, or the sweep sets it.

    Example:
        >>> grid(["strategy.name=fedavg,ffa", "rounds=3"])
        {'strategy=fedavg': ('strategy.name=fedavg', 'rounds=3'), 'strategy=ffa': ('strategy.name=ffa', 'rounds=3')}
    """
    found: dict[Keys, list[str]] = {}
    for assignment in assignments:
        keys, text = split_override(assignment)
        key = ".".join(keys)
        if key in RESERVED:
            raise ConfigError(f"--set {key}: a sweep sets this key itself, use {RESERVED[key]}", code="reserved-key")
        if keys in found:
            raise ConfigError(
                f"--set {key} is given twice: give all alternatives at once, separated by commas",
                code="key-given-twice",
            )
        found[keys] = list(alternatives(text))
        for value, times in Counter(found[keys]).items():
            if not value or times > 1:
                what = f"{value!r} is given twice" if value else "an alternative is empty"
                raise ConfigError(
                    f"--set {assignment!r}: {what}; separate the alternatives by single commas", code="bad-alternatives"
                )
    short = _short_keys([keys for keys, values in found.items() if len(values) > 1])
    out: dict[str, tuple[str, ...]] = {}
    for values in itertools.product(*found.values()):
        pairs = dict(zip(found, values, strict=True))
        name = ",".join(f"{short[keys]}={plain(value)}" for keys, value in pairs.items() if keys in short)
        if name in out:  # values that differ only in marks that a folder's name cannot have
            name += "-" + _hash("\n".join(values))
        out[name] = tuple(f"{dotted(keys)}={value}" for keys, value in pairs.items())
    return out


def alternatives(text: str) -> Iterator[str]:
    """The parts of a text between commas that are in no bracket and no quotes.

    Example:
        >>> list(alternatives("[1, 2], 'a,b', c"))
        ['[1, 2]', "'a,b'", 'c']
    """
    depth, quote, part = 0, "", ""
    for mark in text:
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "'\"":
            quote = mark
        else:
            depth += (mark in "[{(") - (mark in "]})")
            if mark == "," and depth == 0:
                yield part.strip()
                part = ""
                continue
        part += mark
    yield part.strip()


def plain(text: str) -> str:
    """A text with nothing in it that a folder's name or a shell would stumble over."""
    text = re.sub(r"\s*,\s*", ",", text.strip())
    name = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", text.replace('"', "").replace("'", "")).strip("-,") or "empty"
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{_hash(text)}"


def _short_keys(chosen: Sequence[Keys]) -> dict[Keys, str]:
    """ "strategy.name" -> "strategy", "train.lr" -> "lr"; the whole key where two would be called the same."""
    short = {keys: plain(".".join(keys[:-1]) if keys[-1] == "name" else keys[-1]) for keys in chosen}
    times = Counter(short.values())
    return {keys: name if times[name] == 1 else plain(".".join(keys)) for keys, name in short.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
