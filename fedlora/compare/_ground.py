"""Whether runs whose configs name the same things were made with the same things."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from fedlora.compare._reading import Run
from fedlora.provenance import MODEL, WORDS

NAMES = {"class_names": ("task", "data"), "train_data": ("data", "partition"), "test_data": ("data",)}
"""Parts of a run's provenance -> the tables that name them; what is not here is named by [model]."""

NO_SETTING = ("seed", "name", "output", "runtime", "tracking")
"""Keys and tables that make no setting: which draw, what it is called, on what machine, and who else is told."""


def makes_a_setting(key: str) -> bool:
    """Whether runs that differ in this key are of different settings."""
    return key.partition(".")[0] not in NO_SETTING


def silently_changed(one: Run, other: Run) -> tuple[str, ...]:
    """The parts in which two runs differ although their configs name the same ones, and draw with the same seed."""
    return tuple(
        part
        for part in one.provenance.changed(other.provenance)
        if _named(part, one.keys) == _named(part, other.keys) and (part in MODEL or _same_draws(part, one, other))
    )


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with a key more for each part in which runs of one setting differ, so that they are not pooled."""
    settings: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        chosen = {key: value for key, value in run.keys.items() if makes_a_setting(key)}
        settings.setdefault(json.dumps(chosen, sort_keys=True, default=str), []).append(place)
    keys: dict[int, dict[str, Any]] = {}
    for places in settings.values():
        for pair in combinations(places, 2):
            for part in silently_changed(*(runs[place] for place in pair)):
                word = WORDS[part].removeprefix("the ")
                for place in pair:
                    keys.setdefault(place, {})[word] = runs[place].provenance.known[part][:8]
    return [replace(run, keys={**run.keys, **keys[i]}) if i in keys else run for i, run in enumerate(runs)]


def in_pairs(pairs: Iterable[tuple[Run, Run]]) -> tuple[str, ...]:
    """All parts that changed silently within any of the pairs."""
    return tuple(dict.fromkeys(part for pair in pairs for part in silently_changed(*pair)))


def _same_draws(part: str, one: Run, other: Run) -> bool:
    """Which rows are tested on is the seed's choice where they are cut from the source, or limited."""
    drawn = part == "test_data" and (one.keys.get("data.test") is None or one.keys.get("data.limit") is not None)
    return not drawn or one.seed == other.seed


def _named(part: str, keys: Mapping[str, Any]) -> str:
    tables = NAMES.get(part, ("model",))
    return json.dumps(dict(_of(keys, tables)), sort_keys=True, default=str)


def _of(keys: Mapping[str, Any], tables: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for key, value in keys.items():
        if key.partition(".")[0] in tables and not (key.startswith("partition.") and "column" not in key):
            yield key, value
