"""Runs by setting: which are seeds of one, how the settings are called, and whether they stand on the same things."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from operator import attrgetter
from typing import Any

import pandas as pd

from fedlora.compare._runs import Run
from fedlora.config import OPEN_TABLES
from fedlora.errors import ConfigError
from fedlora.provenance import MODEL, WORDS
from fedlora.sanitize import clean_text

ABSENT = "-"
LONGEST_LABEL = 4000

NO_SETTING = ("seed", "name", "output", "runtime", "tracking")
"""Keys and tables in which the runs of one setting may differ."""

NAMES = {
    "class_names": ("task", "data"),
    "train_data": ("data", "partition"),
    "test_data": ("data",),
    "start": ("adapter",),
}
"""Part of a run's provenance -> the config tables that name it; all other parts are named by [model]."""


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one setting.

    Args:
        label: the keys in which it differs from the other groups, such as "ffa, lr=0.01".
        runs: by ascending seed.
    """

    label: str
    runs: Sequence[Run]

    def pairs(self, other: Group) -> list[tuple[Run, Run]]:
        """A run of each group for every seed that both have, by ascending seed."""
        theirs = {run.seed: run for run in other.runs}
        return [(run, theirs[run.seed]) for run in sorted(self.runs, key=attrgetter("seed")) if run.seed in theirs]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but seed, name and machine are one group; groups stand in the order of their first.

    Runs that were made with another base, tokenizer or other data under the same name are kept apart. Where a seed
    occurs twice in one setting (the same run with another version of the program, say), each of its runs is a group of
    its own, called by its folder.

    Raises:
        ConfigError: the runs have different tasks or figures.
    """
    measured = {(run.keys["task.name"], run.metric): run.path for run in runs}
    if len(measured) > 1:
        (one, here), (other, there) = list(measured.items())[:2]
        raise ConfigError(
            f"{str(here)!r} measures {one[1]} of {one[0]} and {str(there)!r} {other[1]} of {other[0]}: "
            "compare runs of one task",
            code="tasks-differ",
        )
    sets = _by_setting(_told_apart(runs))
    found: list[Group] = []
    for label, alike in zip(_labels(_settings([alike[0] for alike in sets])), sets, strict=True):
        if len({run.seed for run in alike}) == len(alike):
            found.append(Group(label or alike[0].keys["strategy.name"], sorted(alike, key=attrgetter("seed"))))
        else:
            found += [Group(clean_text(f"{label} ({run.path.name})", LONGEST_LABEL), [run]) for run in alike]
    times = Counter(group.label for group in found)
    return [
        replace(group, label=clean_text(f"{group.label} [{group.runs[0].path}]", LONGEST_LABEL))
        if times[group.label] > 1
        else group
        for group in found
    ]


def differing_keys(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each key in which the groups differ, a column for each group; "-" where a group has no such key."""
    table = _differing(_settings([group.runs[0] for group in groups])).map(_say)
    return table.set_axis([group.label for group in groups]).T


def silently_changed(*pairs: tuple[Run, Run]) -> tuple[str, ...]:
    """The parts in which two runs differ although their configs name the same ones, and draw with the same seed."""
    found = [
        part
        for one, other in pairs
        for part in one.provenance.changed(other.provenance)
        if _named(part, one.keys) == _named(part, other.keys) and (part in MODEL or _same_draws(part, one, other))
    ]
    return tuple(dict.fromkeys(found))


def _same_draws(part: str, one: Run, other: Run) -> bool:
    """Which rows are tested on is the seed's choice where they are cut from the source, or limited."""
    drawn = part == "test_data" and (one.keys.get("data.test") is None or one.keys.get("data.limit") is not None)
    return not drawn or one.seed == other.seed


def _named(part: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    tables = NAMES.get(part, ("model",))
    return {
        key: value
        for key, value in keys.items()
        if key.partition(".")[0] in tables and not (key.startswith("partition.") and "column" not in key)
    }


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with a key more for each part in which runs of one setting differ, so that they are not pooled."""
    keys = {run: dict(run.keys) for run in runs}
    for alike in _by_setting(runs):
        for pair in combinations(alike, 2):
            for part in silently_changed(pair):
                for run in pair:
                    keys[run][WORDS[part].removeprefix("the ")] = run.provenance.known[part][:8]
    return [replace(run, keys=keys[run]) for run in runs]


# ---------------------------------------------------------------------------------------------- settings as a table


def _settings(runs: Iterable[Run]) -> pd.DataFrame:
    """A row for each run and a column for each key that makes a setting; cells as JSON, or `ABSENT`."""
    rows = [
        {key: json.dumps(value) for key, value in run.keys.items() if key.partition(".")[0] not in NO_SETTING}
        for run in runs
    ]
    return pd.DataFrame(rows).fillna(ABSENT)


def _by_setting(runs: Sequence[Run]) -> list[list[Run]]:
    setting = _settings(runs).agg("\n".join, axis=1)
    return [[runs[place] for place in alike.index] for _, alike in setting.groupby(setting, sort=False)]


def _differing(settings: pd.DataFrame) -> pd.DataFrame:
    return settings.loc[:, settings.nunique() > 1]


def _labels(settings: pd.DataFrame) -> list[str]:
    """As few keys as tell the settings apart; names of rules, partitions and tasks first, then as in a config."""
    settings = _differing(settings)
    rank = {f"{table}.name": 0 for table in OPEN_TABLES}
    chosen: list[str] = []
    told = 1
    for key in sorted(settings, key=lambda key: rank.get(key, 1 + (key.split(".")[0] in OPEN_TABLES))):
        number = len(settings[[*chosen, key]].drop_duplicates())
        if number > told:
            chosen, told = [*chosen, key], number
    rows = settings[chosen].to_dict("records")
    return [", ".join(_part(key, cell) for key, cell in row.items() if cell != ABSENT) for row in rows]


def _part(key: str, cell: str) -> str:
    return _say(cell) if key.endswith(".name") else f"{key.rpartition('.')[2]}={_say(cell)}"


def _say(cell: str) -> str:
    return "none" if cell == "null" else str(json.loads(cell)) if cell.startswith('"') else cell
