"""Where rules are found: files of this folder, `"module:Class"`, or the entry point group `fedlora.aggregators`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fedlora.aggregators._base import Aggregator, Claim
from fedlora.errors import ConfigError, nearest
from fedlora.registry import Registry, build

registry: Registry[Aggregator] = Registry("aggregation rule")
ENTRY_POINT_GROUP = "fedlora.aggregators"


def register(name: str) -> Any:
    """Class decorator that gives a rule of this folder its name in configs."""
    return registry.register(name)


def load_aggregator(name: str, fields: Mapping[str, Any] | None = None) -> Aggregator:
    """The rule of a config.

    Args:
        name: a built-in name ("fedavg"), an entry point's name, or "module:Class".
        fields: the rule's own fields.

    Raises:
        ConfigError: an unknown name (with the nearest valid one), a class that is no rule, a wrong field.
    """
    return build(rule_class(name), fields or {}, f"aggregation rule {name!r}")


def rule_class(name: str) -> type[Aggregator]:
    """The class of a rule by any of the three kinds of names (see `load_aggregator`)."""
    if ":" in name:
        return _checked(name, _import(name))
    _discover()
    if name in registry:
        return registry.get(name)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            return _checked(name, point.load())
    known = [*registry, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))]
    raise ConfigError(
        f'unknown aggregation rule {name!r}; {nearest(name, known)} (or give "module:Class")', code="unknown-name"
    )


def rules() -> dict[str, type[Aggregator]]:
    """Every rule that a config can name, built-in and from entry points."""
    _discover()
    found = {name: registry.get(name) for name in registry}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, _checked(point.name, point.load()))
    return found


def names_claiming(claim: Claim) -> list[str]:
    """The names of the rules that make a claim, sorted: for messages that say what to choose instead."""
    return sorted(name for name, cls in rules().items() if claim in cls.claims)


def _discover() -> None:
    package = sys.modules["fedlora.aggregators"]
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"fedlora.aggregators.{module.name}")


def _import(name: str) -> object:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(
            f"aggregation rule {name!r}: write it as module:Class, such as my_rules:Mine", code="bad-rule-path"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"aggregation rule {name!r}: there is no Python module {error.name!r} on the path or in this folder",
            code="rule-not-found",
        ) from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ConfigError(
            f"aggregation rule {name!r}: the module {module_name!r} has no {attribute!r}", code="rule-not-found"
        ) from None


def _checked(name: str, found: object) -> type[Aggregator]:
    if not (isinstance(found, type) and issubclass(found, Aggregator)):
        raise ConfigError(
            f"aggregation rule {name!r} is not a subclass of fedlora.aggregators.Aggregator: derive it from that class",
            code="not-a-rule",
        )
    if not dataclasses.is_dataclass(found):
        raise ConfigError(
            f"aggregation rule {name!r} must be a frozen dataclass: put @dataclass(frozen=True) above it",
            code="rule-not-frozen",
        )
    return found
