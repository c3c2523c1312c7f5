"""The same config under several settings and seeds: a folder of run directories."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.compare import read_run, silently_changed
from fedlora.config import RunConfig, load_config
from fedlora.errors import ConfigError, RunDirError, nearest
from fedlora.files import locked, write_atomically
from fedlora.provenance import in_words
from fedlora.runs.rundir import Keep, RunDir
from fedlora.sweep._grid import Settings, plain
from fedlora.sweep._workers import run_all

SELECT = "select"
"""The folder, among the runs, of the runs by which alternatives were chosen."""


Pick = tuple[str | None, Mapping[str, float]]
"""The candidate whose run ended best (the first of equals), "" without a selection, None if none ended; and what each
reached."""


@dataclass(frozen=True)
class Selection:
    """Alternatives of which each setting takes its best, by one run each on a seed that is not reported.

    Args:
        candidates: name -> overrides, as `grid` makes them, in their order (ascending learning rates, say).
        seed: of the runs that decide.
        start: names of the candidates to begin with; where the best of those is the first or the last one tried, its
            neighbour beyond is tried too, and so on. (): all of them, at once.
    """

    candidates: Settings
    seed: int = 100
    start: Sequence[str] = ()


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Args:
        config: the TOML file that all runs share.
        out: the folder for the run directories.
        settings: name -> overrides, as `grid` makes them; or any names, such as "mixed ranks".
        seeds: of each setting; () to do no more than select.
        selection: alternatives to choose from first, setting by setting.
        processes: runs at once; more than 1 have one thread each.
        keep: how much of each finished run stays on disk.
    """

    config: Path
    out: Path
    settings: Mapping[str, Sequence[str]]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    selection: Selection | None = None
    processes: int = 1
    keep: Keep = "adapter"


@dataclass(frozen=True)
class Cell:
    """One setting's results.

    Args:
        overrides: all that makes the setting, with what was chosen.
        chosen: name of the candidate that was best; "" without a selection.
        tried: candidate -> its final figure, NaN where the run failed or diverged.
        runs: seed -> folder of a finished run.
    """

    overrides: tuple[str, ...]
    chosen: str = ""
    tried: Mapping[str, float] = field(default_factory=dict)
    runs: Mapping[int, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a sweep leaves.

    Args:
        cells: by the settings' names.
        failed: run's name -> why.
    """

    cells: Mapping[str, Cell]
    failed: Mapping[str, str]

    @property
    def runs(self) -> list[Path]:
        """All finished runs of the seeds that are reported."""
        return [path for cell in self.cells.values() for path in cell.runs.values()]


class Watcher:
    """Is told how a sweep goes on, and does nothing; a subclass overrides what it needs."""

    def begun(self, runs: int, rounds: int, runs_done: int, rounds_done: int) -> None:
        """So many runs with so many rounds in all, of which some were done before."""

    def more(self, runs: int, rounds: int) -> None:
        """So many more are to be done than was said: a selection goes on."""

    def round_ended(self, name: str, number: int) -> None:
        """A round of a run is over (0: the evaluation before training)."""

    def run_ended(self, name: str, why: str | None) -> None:
        """A run is finished, or failed and why."""

    def chosen(self, setting: str, candidate: str, tried: Mapping[str, float]) -> None:
        """A setting's best alternative was found."""


def run_sweep(sweep: Sweep, watcher: Watcher | None = None) -> Outcome:
    """Do every run of a sweep that is not done yet.

    What is finished is not repeated, and what was stopped goes on from its checkpoint. A run that fails is noted and
    the rest goes on. `sweep.json` in the folder says what was chosen and what failed.

    Raises:
        ConfigError: a key, value or name is wrong in any of the configs; nothing has been run.
        RunDirError: a run of that name is there with another config, or another sweep is at work in the folder.
    """
    watcher = watcher or Watcher()
    chooses, reports = plan(sweep)
    with _alone(sweep.out):
        picks, failed = _select(sweep, chooses, reports, watcher)
        final = {
            (name, seed): reports[name, choice, seed]
            for name, (choice, _) in picks.items()
            if choice is not None
            for seed in sweep.seeds
        }
        failed |= _run(sweep, list(final.values()), watcher)
        failed |= {
            name: "none of its alternatives could be run" for name, (choice, _) in picks.items() if choice is None
        }
        cells = {}
        for name, (choice, tried) in picks.items():
            runs = {seed: _path(final[name, seed]) for seed in sweep.seeds if (name, seed) in final}
            runs = {seed: path for seed, path in runs.items() if path.name not in failed}
            cells[name] = Cell(_overrides(sweep, name, choice or ""), choice or "", tried, runs)
        outcome = Outcome(cells, failed)
        _write(sweep, outcome)
    return outcome


def plan(sweep: Sweep) -> tuple[dict[tuple[str, str], RunConfig], dict[tuple[str, str, int], RunConfig]]:
    """The configs of a sweep, all checked.

    Returns:
        By setting and candidate the runs that choose (none without a selection), and by setting, candidate and seed
        all runs that may be reported.
    """
    if sweep.processes < 1 or not sweep.settings or not (sweep.seeds or sweep.selection):
        raise ConfigError(
            "a sweep needs at least one setting, one seed (or a selection) and one process", code="nothing-to-run"
        )
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigError("a seed is given twice: give each once", code="seed-given-twice")
    selection = sweep.selection
    if selection is not None and selection.seed in sweep.seeds:
        raise ConfigError(
            f"seed {selection.seed} would both select and be reported: select with another one, with --select-seed",
            code="seed-chooses-and-reports",
        )
    for name in selection.start if selection else ():
        if selection is not None and name not in selection.candidates:
            raise ConfigError(
                f"{name!r} is not a candidate; {nearest(name, selection.candidates)}", code="unknown-name"
            )
    candidates = list(selection.candidates) if selection else [""]
    chooses = {}
    if selection is not None:
        folder = sweep.out / SELECT
        chooses = {(n, c): _config(sweep, folder, n, c, selection.seed) for n in sweep.settings for c in candidates}
    reports = {
        (name, candidate, seed): _config(sweep, sweep.out, name, candidate, seed)
        for name in sweep.settings
        for candidate in candidates
        for seed in sweep.seeds
    }
    every = [*chooses.values(), *reports.values()]
    if len({_path(config) for config in every}) < len(every):
        raise ConfigError(
            "two settings would have the same folder name: give them names that differ in letters or digits",
            code="folder-name-taken",
        )
    for config in {config.digest("strategy", "partition", "task"): config for config in every}.values():
        _check_names(config)
    for config in every:
        _rounds_done(config)  # refuses a run of that name with another config
    return chooses, reports


def _check_names(config: RunConfig) -> None:
    from fedlora.aggregators import load_aggregator
    from fedlora.partition import load_partitioner
    from fedlora.tasks import load_task

    load_aggregator(config.strategy.name, config.strategy.fields)
    load_partitioner(config.partition.name, config.partition.fields)
    load_task(config.task)


def _overrides(sweep: Sweep, name: str, candidate: str) -> tuple[str, ...]:
    return (*sweep.settings[name], *(sweep.selection.candidates.get(candidate, ()) if sweep.selection else ()))


def _config(sweep: Sweep, folder: Path, name: str, candidate: str, seed: int) -> RunConfig:
    config = load_config(sweep.config, [*_overrides(sweep, name, candidate), f"seed={seed}"])
    runtime = config.runtime if sweep.processes == 1 else config.runtime.model_copy(update={"threads": 1})
    called = _join(plain(name) if name else "", candidate, f"seed={seed}")
    return config.model_copy(update={"name": called, "output": str(folder), "runtime": runtime})


def _join(*parts: str) -> str:
    return ",".join(part for part in parts if part)


def _path(config: RunConfig) -> Path:
    return Path(config.output) / config.name


def _is_finished(config: RunConfig) -> bool:
    path = _path(config)
    return (path / "config.toml").is_file() and RunDir.open(path, config, same=True).finished


def _rounds_done(config: RunConfig) -> int:
    path = _path(config)
    return RunDir.open(path, config, same=True).rounds_done if (path / "config.toml").is_file() else 0


def _select(
    sweep: Sweep,
    chooses: Mapping[tuple[str, str], RunConfig],
    reports: Mapping[tuple[str, str, int], RunConfig],
    watcher: Watcher,
) -> tuple[dict[str, Pick], dict[str, str]]:
    """Do the runs that choose; each setting's pick, and what failed."""
    selection = sweep.selection
    order = list(selection.candidates) if selection else []
    tried = {
        name: [c for c in order if c in ((selection.start or order) if selection else ())] for name in sweep.settings
    }
    todo = [chooses[name, candidate] for name, candidates in tried.items() for candidate in candidates]
    _say_where_it_stands(sweep, todo, reports, watcher)
    failed: dict[str, str] = {}
    while True:
        failed |= _run(sweep, todo, watcher)
        picks = {name: _pick({c: chooses[name, c] for c in tried[name]}, selection is not None) for name in tried}
        further = {name: _beyond(order, tried[name], picks[name][0]) for name in tried}
        todo = [chooses[name, candidate] for name, candidate in further.items() if candidate]
        if not todo:
            break
        watcher.more(len(todo), sum(config.rounds for config in todo))
        for name, candidate in further.items():
            if candidate:
                tried[name] = sorted([*tried[name], candidate], key=order.index)
    for name, (choice, found) in picks.items():
        if choice:
            watcher.chosen(name, choice, found)
    return picks, failed


def _beyond(order: Sequence[str], tried: Sequence[str], choice: str | None) -> str | None:
    """The neighbour of the best, where that is the first or the last one tried and has one."""
    if not choice:
        return None
    place = order.index(choice)
    if choice == tried[0] and place > 0:
        return order[place - 1]
    return order[place + 1] if choice == tried[-1] and place + 1 < len(order) else None


def _say_where_it_stands(
    sweep: Sweep, chooses: Sequence[RunConfig], reports: Mapping[tuple[str, str, int], RunConfig], watcher: Watcher
) -> None:
    """Of each run that is reported, only one of the candidates will be done; at most one was begun before."""
    runs = [(config.rounds, _rounds_done(config)) for config in chooses]
    for name in sweep.settings:
        for seed in sweep.seeds:
            same = [config for (n, _, s), config in reports.items() if (n, s) == (name, seed)]
            runs.append((same[0].rounds, max(_rounds_done(config) for config in same)))
    finished = sum(done >= rounds for rounds, done in runs)
    watcher.begun(len(runs), sum(rounds for rounds, _ in runs), finished, sum(done for _, done in runs))


def _run(sweep: Sweep, configs: Sequence[RunConfig], watcher: Watcher) -> dict[str, str]:
    todo = [config for config in configs if not _is_finished(config)]
    return run_all(todo, sweep.keep, sweep.processes, watcher.round_ended, watcher.run_ended)


def _pick(candidates: Mapping[str, RunConfig], selects: bool) -> Pick:
    if not selects:
        return "", {}
    tried = dict.fromkeys(candidates, math.nan)
    better, first = 1.0, None
    for candidate, config in candidates.items():
        if _is_finished(config):
            run = read_run(_path(config))
            first = first or run
            if changed := silently_changed((first, run)):
                raise RunDirError(
                    f"{in_words(changed)} changed between {str(first.path)!r} and {str(run.path)!r}, so that they "
                    "cannot be compared: remove the older one, or name another folder with -o",
                    code="provenance-mismatch",
                )
            better = 1.0 if run.higher_is_better else -1.0
            tried[candidate] = run.final
    known = [candidate for candidate, value in tried.items() if not math.isnan(value)]
    return max(known, key=lambda candidate: better * tried[candidate], default=None), tried


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            yield
    except BlockingIOError:
        raise RunDirError(
            f"another sweep is writing to {str(folder)!r}: wait for it, or name another folder with -o",
            code="folder-in-use",
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise RunDirError(f"{str(folder)!r} is not a folder: name another one with -o", code="not-a-folder") from None


def _write(sweep: Sweep, outcome: Outcome) -> None:
    cells = {
        name: {
            "overrides": list(cell.overrides),
            "chosen": cell.chosen,
            "tried": {key: None if math.isnan(value) else value for key, value in cell.tried.items()},
            "runs": {str(seed): path.name for seed, path in cell.runs.items()},
        }
        for name, cell in outcome.cells.items()
    }
    text = json.dumps({"config": str(sweep.config), "settings": cells, "failed": dict(outcome.failed)}, indent=2)
    write_atomically(sweep.out / "sweep.json", (text + "\n").encode())
