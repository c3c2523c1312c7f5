"""A figure of one's own, `evaluation.metric = "my_module:my_metric"`: a function of one argument, by its name of these.

- `measures`: what the task measured of each example (`Task.measure`), arrays [n, ...] by name. The function returns a
  value of each example, [n]; the figure is their mean.
- `sums`: statistics that add up over examples (`Task.sums`), such as a classifier's confusion matrix. The function
  returns the figure.

Either way clients send sums alone, and the figure of a federation is that of its examples in one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import numpy as np

from fedlora.errors import ConfigError, FedloraError
from fedlora.registry import import_named
from fedlora.tasks._base import Task

OWN = "own_metric"
"""Name of the sum of the values of a function of measures."""


def with_own_metric(task: Task, name: str | None) -> Task:
    """A task whose figures have one more, under the function's name.

    Args:
        task: Any.
        name: "module:function"; None: the task as it is.

    Raises:
        ConfigError: there is no such function, or it takes other arguments.
    """
    if name is None:
        return task
    own = object.__new__(_extended(type(task), name))
    own.__dict__.update(task.__dict__)
    return own


@cache
def _extended(kind: type[Task], name: str) -> type[Task]:
    function, reads = _read(name)
    short = name.partition(":")[2]

    def sums(self: Task, measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = kind.sums(self, measures)
        if reads == "sums":
            return found
        values, n = np.asarray(_called(function, name, measures), dtype=np.float64), int(found["examples"])
        if values.shape != (n,):
            raise ConfigError(
                f"evaluation.metric {name!r} gave values of shape {values.shape} for {n} examples: return one for each",
                code="bad-metric",
            )
        return {**found, OWN: np.asarray(values.sum())}

    def figures(self: Task, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        theirs = {key: value for key, value in sums.items() if key != OWN}
        found = kind.figures(self, theirs)
        if short in found:
            raise ConfigError(
                f"evaluation.metric {name!r}: the task has a figure {short!r} already; rename the function",
                code="bad-metric",
            )
        if reads == "measures":
            return {**found, short: float(sums[OWN] / sums["examples"])}
        try:
            return {**found, short: float(_called(function, name, theirs))}
        except (TypeError, ValueError):
            raise ConfigError(
                f"evaluation.metric {name!r}: a function of sums returns one number", code="bad-metric"
            ) from None

    signed = (*kind.signed_sums, OWN)
    inside = {"sums": sums, "figures": figures, "signed_sums": signed, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), inside)


def _read(name: str) -> tuple[Callable[[Any], Any], Literal["measures", "sums"]]:
    """The function, and what it reads."""
    function = import_named("metric", name)
    arguments = list(inspect.signature(function).parameters) if callable(function) else []
    if arguments == ["measures"]:
        return function, "measures"  # type: ignore[return-value]
    if arguments == ["sums"]:
        return function, "sums"  # type: ignore[return-value]
    raise ConfigError(
        f"evaluation.metric {name!r} must be a function of one argument, named measures (arrays of the examples, for a "
        "value of each) or sums (that add up over examples, for the figure)",
        code="bad-metric",
    )


def _called(function: Callable[[Any], Any], name: str, argument: Mapping[str, np.ndarray]) -> Any:
    try:
        return function(argument)
    except FedloraError:
        raise
    except Exception as error:
        raise ConfigError(
            f"evaluation.metric {name!r} failed: {type(error).__name__}: {error}", code="bad-metric"
        ) from error
