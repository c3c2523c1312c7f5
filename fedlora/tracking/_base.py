"""What every tracker does: takes the figures of each round, by name and round."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedlora.config import RunConfig, flatten

_UNUSUAL = re.compile(r"[^\w \-./]", re.ASCII)
"""Characters that MLflow does not take in a name; domains are named by the data."""


class Tracker(ABC):
    """One run in one tracker; making it opens the run there.

    Args:
        config: of the run.
        folder: of the run, for what the tracker keeps on disk.
        run_id: under which an earlier part of this run is known there; None for a new one.
    """

    package: ClassVar[str]
    """That must be installed, as it is imported."""
    run_id: str | None = None
    """Under which the tracker knows the run, where it has such a thing."""
    where: str = ""
    """Where to look, in a few words."""

    @abstractmethod
    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None: ...

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """The figures of one round."""

    @abstractmethod
    def close(self, *, ok: bool) -> None:
        """The run is over: `ok` if it came to its end."""


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics under flat names: "accuracy", "domains/films/accuracy", "rule/fair/objective".

    Lists and tables of clients become their lengths ("clients/answered"); what single clients say stays in the run's
    folder. Numbers that are not finite are left out.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if key in ("round", "clients"):
            continue
        if key == "federated":
            value = {name: value[name] for name in ("figures", "macro", "worst_tenth") if name in value}
        if key in ("domains", "classes", "federated", "validation", "rule"):
            found |= {f"{key}/{name}": number for name, number in _numbers(flatten(value, mark="/")).items()}
        elif isinstance(value, list | Mapping):
            found[f"clients/{key}"] = float(len(value))
        else:
            found |= _numbers({key: value})
    return {_UNUSUAL.sub("_", name): number for name, number in found.items()}


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value) for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)
    }
