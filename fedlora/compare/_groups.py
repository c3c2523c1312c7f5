"""Which runs are seeds of one setting, and what the settings are called."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.compare._ground import makes_a_setting, told_apart
from fedlora.compare._reading import Run
from fedlora.config import OPEN_TABLES
from fedlora.errors import ConfigError

ABSENT = "-"


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one setting.

    Args:
        label: the keys in which it differs from the other groups, such as "ffa, lr=0.01".
        runs: by ascending seed.
    """

    label: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> dict[int, Run]:
        """The runs by seed."""
        return {run.seed: run for run in self.runs}


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
            "compare runs of one task"
        )
    runs = told_apart(runs)
    sets: dict[str, list[Run]] = {}
    for run in runs:
        setting = {key: value for key, value in run.keys.items() if makes_a_setting(key)}
        sets.setdefault(json.dumps(setting, sort_keys=True), []).append(run)
    labels = _labels([found[0].keys for found in sets.values()])
    out: list[Group] = []
    for label, found in zip(labels, sets.values(), strict=True):
        if max(Counter(run.seed for run in found).values()) == 1:
            out.append(Group(label or found[0].keys["strategy.name"], sorted(found, key=lambda run: run.seed)))
        else:
            out += [Group(f"{label} ({run.path.name})".strip(), [run]) for run in found]
    times = Counter(group.label for group in out)
    return [
        group if times[group.label] == 1 else Group(f"{group.label} [{group.runs[0].path}]", group.runs)
        for group in out
    ]


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Key -> its value in each group, of every key in which the groups differ; "-" where a group has no such key."""
    keys = _differing([group.runs[0].keys for group in groups])
    return {key: [_say(group.runs[0].keys.get(key, ABSENT)) for group in groups] for key in keys}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(key for setting in settings for key in setting if makes_a_setting(key))
    return [key for key in names if len({json.dumps(setting.get(key, ABSENT)) for setting in settings}) > 1]


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """As few keys as tell the settings apart; names of rules, partitions and tasks first, then as in a config."""
    rank = {f"{table}.name": 0 for table in OPEN_TABLES}
    keys = sorted(_differing(settings), key=lambda key: rank.get(key, 1 + (key.split(".")[0] in OPEN_TABLES)))
    chosen: list[str] = []
    for key in keys:
        if _number(settings, [*chosen, key]) > _number(settings, chosen):
            chosen.append(key)
    parts = [[_part(key, setting) for key in chosen if key in setting] for setting in settings]
    return [", ".join(part) for part in parts]


def _number(settings: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len({json.dumps([setting.get(key, ABSENT) for key in keys]) for setting in settings})


def _part(key: str, setting: Mapping[str, Any]) -> str:
    value = _say(setting[key])
    return value if key.endswith(".name") else f"{key.rpartition('.')[2]}={value}"


def _say(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
