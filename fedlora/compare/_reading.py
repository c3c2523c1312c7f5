"""A run's folder as the figures that runs are compared by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import flat_keys
from fedlora.errors import FedloraError, RunDirError
from fedlora.provenance import Provenance
from fedlora.runs.config_changes import Change
from fedlora.runs.outcomes import read_outcomes
from fedlora.runs.rundir import RunDir
from fedlora.tasks import Task, load_task

NOTHING_KNOWN = Provenance()
CHANGED = "changed on the way"
"""Among the keys of a run: what resumes changed in its config."""


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Args:
        path: of its folder.
        keys: its config, by dotted key.
        task: that it learnt.
        records: its evaluated and unevaluated rounds, lines of metrics.jsonl.
        test: names its test examples; "" where the run kept no outcomes.
        outcomes: what was measured of each test example after the last round, [n, ...] by name.
        epsilon: that it spent, or None.
        provenance: what it was made with, as far as it says.
        changes: of its config on the way.
    """

    path: Path
    keys: Mapping[str, Any]
    task: Task
    records: Sequence[Mapping[str, Any]]
    test: str = ""
    outcomes: Mapping[str, np.ndarray] | None = None
    epsilon: float | None = None
    provenance: Provenance = NOTHING_KNOWN
    changes: Sequence[Change] = ()

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.keys["seed"])

    @property
    def metric(self) -> str:
        """The name of the task's main figure."""
        return self.task.metric

    @property
    def higher_is_better(self) -> bool:
        """The direction of the task's main figure."""
        return self.task.higher_is_better

    @property
    def curve(self) -> dict[int, float]:
        """Round -> the main figure, of the rounds that were evaluated; NaN where it was not finite."""
        return {
            int(record["round"]): math.nan if record[self.metric] is None else float(record[self.metric])
            for record in self.records
            if self.metric in record
        }

    @property
    def final(self) -> float:
        """The main figure after the last round."""
        curve = self.curve
        return curve[max(curve)]

    @property
    def best(self) -> float:
        """The best of all evaluated rounds: optimistic, as the test examples choose the round."""
        known = [value for value in self.curve.values() if not math.isnan(value)]
        return (max if self.higher_is_better else min)(known, default=math.nan)

    @property
    def worst_domain(self) -> float | None:
        """The main figure after the last round in the domain where it is worst; None without domains."""
        last = [record for record in self.records if self.metric in record][-1]
        values = [row.get(self.metric) for row in last.get("domains", {}).values()]
        known = [float(value) for value in values if value is not None]
        return (min if self.higher_is_better else max)(known) if known else None

    def total(self, name: str) -> float:
        """The sum of a figure over all rounds: "bytes_up", "bytes_down", "seconds"."""
        return float(sum(record.get(name) or 0 for record in self.records))

    def mean(self, name: str) -> float | None:
        """The mean of a figure over the rounds that have it: "aggregation_error"."""
        values = [float(record[name]) for record in self.records if record.get(name) is not None]
        return sum(values) / len(values) if values else None

    def reach(self, value: float) -> tuple[int, float] | None:
        """The first evaluated round in which the main figure is `value` or better, and the bytes sent and received
        until its end; None if it never was."""
        sent = 0.0
        for record in self.records:
            sent += float(record.get("bytes_up") or 0) + float(record.get("bytes_down") or 0)
            here = record.get(self.metric)
            if here is not None and (here >= value if self.higher_is_better else here <= value):
                return int(record["round"]), sent
        return None


def read_run(path: str | Path) -> Run:
    """A finished run.

    Raises:
        RunDirError: there is no run, it is not finished, or none of its rounds was evaluated.
    """
    folder = RunDir.open(path)
    if not folder.finished:
        raise RunDirError(
            f"{str(path)!r} is unfinished (round {folder.rounds_done} of {folder.config.rounds}): go on with "
            f"fedlora run --resume {path}"
        )
    task = load_task(folder.config.task)
    records = folder.read_metrics()
    if not any(task.metric in record for record in records):
        raise RunDirError(f"{str(path)!r} has no {task.metric} in any round: run it again")
    test, outcomes = read_outcomes(folder.path) or ("", None)
    claim = (folder.read_json("result.json") or {}).get("privacy") or {}
    made, changes = folder.provenance, folder.changes
    keys = flat_keys(folder.config)
    if changes:  # a run that went on with other values is a setting of its own
        keys[CHANGED] = ", ".join(map(str, changes))
    return Run(Path(path), keys, task, records, made.test_data or test, outcomes, claim.get("epsilon"), made, changes)


def read_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """The finished runs among some folders, and a line on each that cannot be compared.

    Args:
        paths: of runs; a folder that is none but holds some (as a sweep's) stands for those.

    Raises:
        RunDirError: a path is no run and holds none, or no run at all is left.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    seen: set[Path] = set()
    for path in _expand(paths):
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            runs.append(read_run(path))
        except FedloraError as error:
            left_out.append(" ".join(str(error).split()))
    if not runs:
        raise RunDirError("there is no finished run to compare" + "".join(f"; {line}" for line in left_out[:2]))
    return runs, left_out


def _expand(paths: Iterable[str | Path]) -> list[Path]:
    out: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(found.parent for found in path.glob("*/config.toml"))
        if (path / "config.toml").is_file() or not inside:
            RunDir.open(path)  # says if there is no run
            out.append(path)
        else:
            out += inside
    return out
