"""A name -> class table for the things that a config chooses by name (rules, partitioners, tasks).

The entries are frozen dataclasses, and their fields ARE their configuration: a table in a TOML file,
`{name = "fair", regularisation = 0.01}`, becomes `Fair(regularisation=0.01)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedlora.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and the frozen dataclasses that they stand for.

    Args:
        kind: what the entries are, for messages: "aggregation rule".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """A class decorator; a name can be taken once."""

        def add(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ConfigError(
                    f"{self.kind} {name!r} is registered by both {self._entries[name]} and {cls}: rename one",
                    code="registered-twice",
                )
            self._entries[name] = cls
            return cls

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> type[T]:
        """The class of that name; `ConfigError` with the nearest valid name otherwise."""
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}; {nearest(name, self._entries)}", code="unknown-name")
        return self._entries[name]

    def build(self, name: str, fields: Mapping[str, Any]) -> T:
        """An instance of entry `name` with `fields`, each checked against the dataclass's types."""
        return build(self.get(name), fields, f"{self.kind} {name!r}")


def build(cls: type[T], fields: Mapping[str, Any], what: str) -> T:
    """Build a dataclass from untrusted fields: unknown names and wrong types raise `ConfigError`."""
    valid = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in fields:
        if key not in valid:
            raise ConfigError(f"{what} has no field {key!r}; {nearest(key, valid)}", code="unknown-key")
    try:
        return TypeAdapter(cls).validate_python(dict(fields))
    except ValidationError as error:
        raise ConfigError(f"{what}: {first_problem(error)}", code="bad-value") from None


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error as one readable clause."""
    problems = error.errors(include_url=False, include_context=False)
    problem, where = problems[0], _place(problems[0]["loc"])
    if problem["type"] == "missing":
        return f"{where} is missing: set it"
    # Where several types are allowed, each has its own problem with the value.
    each = [other["msg"].removeprefix("Value error, ") for other in problems if _place(other["loc"]) == where]
    message = " or ".join([each[0], *(msg.removeprefix("Input should be ") for msg in dict.fromkeys(each[1:]))])
    given = problem.get("input")
    return (f"{where}: " if where else "") + message + ("" if isinstance(given, dict) else f", not {given!r}")


def _place(loc: tuple[int | str, ...]) -> str:
    """The key; the place in a union of types ("constrained-float") is pydantic's own word, and no key."""
    return ".".join(str(part) for part in loc if "-" not in str(part) and "[" not in str(part))
