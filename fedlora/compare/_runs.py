"""A run's folder as the figures that runs are compared by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedlora.config import flat_keys
from fedlora.errors import FedloraError, RunDirError
from fedlora.fairness import Fairness, fairness
from fedlora.provenance import Provenance
from fedlora.runs.config_changes import Change
from fedlora.runs.outcomes import read_outcomes
from fedlora.runs.rundir import RunDir
from fedlora.tasks import Task, load_task

NOTHING_KNOWN = Provenance()
OWN_MODEL, SHARED_MODEL, ALONE = "each client's own", "shared", "trained alone"
"""Models that are measured on what each client keeps apart."""
CHANGED = "changed on the way"
"""Among the keys of a run: what was changed in its config when it was resumed."""


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Args:
        path: its folder.
        keys: its config as dotted keys.
        task: the task that was trained.
        records: the lines of metrics.jsonl, one for each round.
        test: identifies its test examples; "" where the run kept no outcomes.
        outcomes: name -> measurement of each test example after the round whose model was kept, [n].
        epsilon: the epsilon that it spent, or None.
        provenance: hashes of the base, tokenizer and data that it was made with, where known.
        changes: changes of its config when it was resumed.
        kept_round: whose model was kept; None: the last.
        alone: client -> figures of a model that it trained alone, where there are any (`--baselines`).
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
    kept_round: int | None = None
    alone: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

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

    def by_round(self, name: str) -> pd.Series:
        """A figure by round, such as "bytes_up", of the rounds that have it; NaN where it was not finite."""
        found = {int(record["round"]): record[name] for record in self.records if name in record}
        return pd.Series(found, dtype=float)

    @property
    def curve(self) -> pd.Series:
        """The main figure by round, of the rounds that were evaluated; NaN where it was not finite."""
        return self.by_round(self.metric)

    @property
    def final(self) -> float:
        """The main figure after the round whose model was kept: the last, or the best by validation examples."""
        curve = self.curve.sort_index()
        return float(curve.iloc[-1] if self.kept_round not in curve.index else curve[self.kept_round])

    @property
    def at_clients(self) -> dict[str, Fairness]:
        """How the main figure is spread over the clients, each on its own examples, at the end.

        Of `OWN_MODEL`, `SHARED_MODEL` and, for the same clients, `ALONE`, as far as they were measured and are finite.
        """
        measured = [record for record in self.records if "federated" in record]
        if not measured:
            return {}
        kept = next((record for record in measured if record["round"] == self.kept_round), measured[-1])["federated"]
        own, shared = kept["clients"], kept.get("shared", {}).get("clients")
        models = {SHARED_MODEL: own} if shared is None else {OWN_MODEL: own, SHARED_MODEL: shared}
        models |= {ALONE: {k: self.alone[k] for k in own if k in self.alone}}
        values = {
            name: np.asarray([row[self.metric] for row in rows.values()], dtype=float) for name, rows in models.items()
        }
        better = self.higher_is_better
        return {
            name: fairness(found.tolist(), higher_is_better=better)
            for name, found in values.items()
            if len(found) and np.isfinite(found).all()
        }

    @property
    def best(self) -> float:
        """The best of all evaluated rounds: optimistic, as the test examples choose the round."""
        return float(self.curve.max() if self.higher_is_better else self.curve.min())

    @property
    def worst_domain(self) -> float | None:
        """The main figure in the domain where it is worst, after the round that `final` is of; None without domains."""
        evaluated = [record for record in self.records if self.metric in record]
        last = next((record for record in evaluated if record["round"] == self.kept_round), evaluated[-1])
        known = [row[self.metric] for row in last.get("domains", {}).values() if row.get(self.metric) is not None]
        return (min if self.higher_is_better else max)(known, default=None)

    def reach(self, value: float) -> tuple[int, float] | None:
        """The first evaluated round in which the main figure is `value` or better, and the bytes sent and received
        until its end; None if it never was."""
        curve = self.curve
        there = curve.index[curve >= value if self.higher_is_better else curve <= value]
        if there.empty:
            return None
        traffic = [self.by_round(name) for name in ("bytes_up", "bytes_down")]
        return int(there[0]), float(sum(count[count.index <= there[0]].sum() for count in traffic))


def read_run(path: str | Path) -> Run:
    """Read a finished run.

    Raises:
        RunDirError: there is no run, it is not finished, or none of its rounds was evaluated.
    """
    folder = RunDir.open(path)
    if not folder.finished:
        raise RunDirError(
            f"{str(path)!r} is unfinished (round {folder.rounds_done} of {folder.config.rounds}): continue it with "
            f"fedlora run --resume {path}",
            code="run-unfinished",
        )
    task = load_task(folder.config.task)
    records = folder.read_metrics()
    if not any(task.metric in record for record in records):
        raise RunDirError(
            f"{str(path)!r} has no {task.metric} in any round: leave it out, or run it again with evaluation",
            code="no-evaluated-round",
        )
    test, outcomes = read_outcomes(folder.path, folder.kept_round) or ("", None)
    result = folder.read_json("result.json") or {}
    claim, kept = result.get("privacy") or {}, result.get("kept_round")
    made, changes = folder.provenance, folder.changes
    keys = flat_keys(folder.config)
    trained = ((folder.read_json("baselines.json") or {}).get("local_only") or {}).get("clients") or ()
    alone = {str(row["client"]): row["own"] for row in trained if "own" in row}
    if changes:  # a run that went on with other values is a setting of its own
        keys[CHANGED] = ", ".join(map(str, changes))
    return Run(
        Path(path),
        keys,
        task,
        records,
        made.test_data or test,
        outcomes,
        claim.get("epsilon"),
        made,
        changes,
        kept,
        alone,
    )


def read_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Read the finished runs among some folders; for each that cannot be compared, a line that says why.

    Args:
        paths: folders of runs; a folder that is no run but holds some (such as a sweep's) stands for those.

    Raises:
        RunDirError: a path is no run and holds none, or no run at all is left.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    unique: dict[Path, Path] = {}
    for path in _expand(paths):
        unique.setdefault(path.resolve(), path)
    for path in unique.values():
        try:
            runs.append(read_run(path))
        except FedloraError as error:
            left_out.append(" ".join(str(error).split()))
    if not runs:
        raise RunDirError(
            "there is no finished run to compare" + "".join(f"; {line}" for line in left_out[:2]),
            code="no-finished-run",
        )
    return runs, left_out


def _expand(paths: Iterable[str | Path]) -> list[Path]:
    out: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(found.parent for found in path.glob("[!.]*/config.toml"))
        if (path / "config.toml").is_file() or not inside:
            RunDir.open(path)  # says if there is no run
            out.append(path)
        else:
            out += inside
    return out
