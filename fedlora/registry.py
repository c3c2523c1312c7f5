"""What a config chooses by name: rules, partitioners, tasks and data sources, built-in or of one's own.

A name is a built-in one ("fedavg"), that of an entry point of an installed package, or "my_module:MyClass". The classes
are frozen dataclasses, and their fields ARE their configuration: a table in a TOML file,
`{name = "fair", regularisation = 0.01}`, becomes `Fair(regularisation=0.01)`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedlora.errors import ConfigError, closest, nearest
from fedlora.foreign_names import our_word

T = TypeVar("T")
OWN_CLASS = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
"""Names such as "my_module:MyClass"."""


class Registry(Generic[T]):
    """Names and the frozen dataclasses that they stand for.

    Args:
        kind: what the entries are, for messages: "aggregation rule".
        base: what they all derive from.
        group: of entry points by which packages offer more of them; a package of this name holds the built-in ones,
            each registered where its module is imported.
    """

    def __init__(self, kind: str, base: type, group: str) -> None:
        self.kind, self._base, self._group = kind, base, group
        self._entries: dict[str, type[T]] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """A class decorator; a name can be taken once."""

        def add(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ConfigError(
                    f"{self.kind} {name!r} is registered by both {self._entries[name]} and {cls}: rename one, or "
                    "remove its register line",
                    code="registered-twice",
                )
            self._entries[name] = cls
            return cls

        return add

    def __iter__(self) -> Iterator[str]:
        """Every name but those of single classes, "module:Class"."""
        return iter(sorted({**self._offered(), **self._built_in()}))

    def __contains__(self, name: str) -> bool:
        return re.match(OWN_CLASS, name) is not None or name in self._built_in() or name in self._offered()

    def items(self) -> list[tuple[str, type[T]]]:
        """Every name that there is with its class."""
        return [(name, self.get(name)) for name in self]

    def get(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            ConfigError: there is none (with the nearest valid name), or it is not of this kind.
        """
        if ":" in name:
            return self._checked(name, import_named(self.kind, name))
        if name in (found := self._built_in()):
            return found[name]
        if name in (offered := self._offered()):
            return self._checked(name, offered[name].load())
        raise ConfigError(
            f'unknown {self.kind} {name!r}; {our_word(name) or nearest(name, self)} (or give "module:Class")',
            code="unknown-name",
        )

    def build(self, name: str, fields: Mapping[str, Any]) -> T:
        """An instance of entry `name` with `fields`, each checked against the dataclass's types."""
        return build(self.get(name), fields, f"{self.kind} {name!r}")

    def is_foreign(self, name: str) -> bool:
        """Whether a name stands for code of another package: "module:Class", or an entry point that is none of ours."""
        return ":" in name or (name not in self._built_in() and name in self._offered())

    def _built_in(self) -> Mapping[str, type[T]]:
        if not self._complete:
            for module in pkgutil.iter_modules(getattr(sys.modules.get(self._group), "__path__", ())):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{self._group}.{module.name}")
            self._complete = True
        return self._entries

    def _offered(self) -> dict[str, EntryPoint]:
        return _entry_points(self._group, tuple(sys.path))

    def _checked(self, name: str, found: object) -> type[T]:
        if not (isinstance(found, type) and issubclass(found, self._base)):
            base = f"{self._base.__module__.partition('._')[0]}.{self._base.__name__}"
            raise ConfigError(
                f"{self.kind} {name!r} is not a subclass of {base}: derive it from that class", code="wrong-base-class"
            )
        if not getattr(vars(found).get("__dataclass_params__"), "frozen", False):  # its own, and no base class's
            raise ConfigError(
                f"{self.kind} {name!r} must be a frozen dataclass: put @dataclass(frozen=True) above it",
                code="not-a-dataclass",
            )
        return found  # type: ignore[return-value]


def import_named(kind: str, name: str) -> object:
    """What a name such as "my_module:Mine" stands for; the module is on Python's path or in this folder.

    Args:
        kind: What it is, for messages.
        name: The name.

    Raises:
        ConfigError: there is nothing of that name.
    """
    if re.match(OWN_CLASS, name) is None:
        raise ConfigError(f"{kind} {name!r}: write it as module:name, such as my_module:Mine", code="bad-class-path")
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{kind} {name!r}: there is no Python module {error.name!r} on the path or in this folder",
            code="class-not-found",
        ) from None
    if not hasattr(found, attribute):
        close = closest(attribute, [key for key in vars(found) if key[0] != "_"])
        cure = "check its spelling" if close is None else f"did you mean {close!r}?"
        raise ConfigError(
            f"{kind} {name!r}: the module {module!r} has no {attribute!r}; {cure}", code="class-not-found"
        )
    return getattr(found, attribute)


@lru_cache(maxsize=16)
def _entry_points(group: str, _path: tuple[str, ...]) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def build(cls: type[T], fields: Mapping[str, Any], what: str) -> T:
    """Build a dataclass from untrusted fields: unknown names and wrong types raise `ConfigError`."""
    valid = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in fields:
        if key not in valid:
            cure = our_word(key) or nearest(key, valid)
            raise ConfigError(f"{what} has no field {key!r}; {cure}", code="unknown-key")
        if fields[key] is None and valid[key].default is not None:
            cure = "give it a value" if _is_required(valid[key]) else "leave it out"
            raise ConfigError(f"{what}: {key} cannot be None, which no config file can say: {cure}", code="bad-value")
    try:
        built = TypeAdapter(cls).validate_python(dict(fields))
    except ValidationError as error:
        raise ConfigError(f"{what}: {first_problem(error)}", code="bad-value") from None
    refuse_truth(fields, built, f"{what}: ")
    return built


def refuse_truth(given: Mapping[Any, Any], built: Any, start: str = "") -> None:
    """Raise `ConfigError` for true or false that became a number, which pydantic makes of them.

    Args:
        given: keys and values, which may be mappings and lists.
        built: what pydantic made of them, a mapping or an object with these attributes.
        start: of the key in the message.
    """
    for name, value in given.items():
        made = built.get(name) if isinstance(built, Mapping) else getattr(built, str(name), None)
        _refuse_truth(value, made, f"{start}{name}")


def _refuse_truth(value: Any, made: Any, key: str) -> None:
    if isinstance(value, bool) and isinstance(made, int | float) and not isinstance(made, bool):
        raise ConfigError(f"{key} cannot be {str(value).lower()}: give it a value", code="bad-value")
    if isinstance(value, Mapping):
        refuse_truth(value, made, f"{key}.")
    elif isinstance(value, list | tuple) and isinstance(made, list | tuple):
        for inner, made_inner in zip(value, made, strict=False):
            _refuse_truth(inner, made_inner, key)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


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
