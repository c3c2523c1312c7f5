from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import invoke, succeeds
from support.errors import raises
from support.made_runs import make_run
from support.waiting import until

from fedlora.cli.sweep import _what
from fedlora.config import RunConfig, parse_config, split_override
from fedlora.errors import ConfigError, RunDirError, TrainingError
from fedlora.runs.checkpoints import Checkpoints
from fedlora.runs.outcomes import read_outcomes
from fedlora.runs.rundir import RunDir
from fedlora.sweep import Selection, Sweep, _workers, grid, run_sweep
from fedlora.sweep._grid import alternatives, plain

# ---------------------------------------------------------------------------------------------- grids


def test_a_grid_is_every_combination() -> None:
    found = grid(["strategy.name=fedavg,ffa", "rounds=3", "train.lr=0.1, 0.2"])
    assert list(found) == [
        *("strategy=fedavg,lr=0.1", "strategy=fedavg,lr=0.2"),
        *("strategy=ffa,lr=0.1", "strategy=ffa,lr=0.2"),
    ]
    assert found["strategy=ffa,lr=0.1"] == ("strategy.name=ffa", "rounds=3", "train.lr=0.1")
    assert grid([]) == {"": ()}


def test_keys_of_one_short_name_keep_their_long_one() -> None:
    assert next(iter(grid(["train.epochs=1,2", "x.epochs=3,4"]))) == "train.epochs=1,x.epochs=3"


@pytest.mark.parametrize(
    ("key", "written", "name"),
    [
        ("adapter.rank_pattern.'a=b'", 'adapter.rank_pattern."a=b"', "a=b"),
        ('adapter.rank_pattern."layer.0.attention"', 'adapter.rank_pattern."layer.0.attention"', "layer.0.attention"),
        ("adapter.rank_pattern.'of/two \"parts\"'", 'adapter.rank_pattern."of/two \\"parts\\""', "of-two-parts"),
        ("adapter.rank_pattern.query", "adapter.rank_pattern.query", "query"),
    ],
)
def test_keys_in_quotes_are_keys_of_a_grid(key: str, written: str, name: str) -> None:
    found = grid([f"{key}=4,8"])
    assert found == {f"{name}=4": (f"{written}=4",), f"{name}=8": (f"{written}=8",)}
    (one,) = parse_config("", found[f"{name}=4"]).adapter.rank_pattern.items()
    assert one == (split_override(f"{key}=4")[0][-1], 4)
    with raises(ConfigError, "key-given-twice", "rank_pattern"):
        grid([f"{key}=4", f"{written}=8"])


def test_a_selected_key_is_one_of_those_set_however_it_is_quoted(toml: Path) -> None:
    sets = ["train.lr=0.1,0.2", "adapter.rank_pattern.'a.b'=4,8"]
    what = _what(toml, sets, "1", ['adapter.rank_pattern."a.b"'], 100, 1, None, "adapter")
    assert what.selection is not None
    assert (list(what.settings), list(what.selection.candidates)) == (["lr=0.1", "lr=0.2"], ["a.b=4", "a.b=8"])
    for key, cure in (("train.lr=0.1", "did you mean 'train.lr'"), ("a.b", 'adapter.rank_pattern."a.b"')):
        with raises(ConfigError, "no-alternatives", cure):
            _what(toml, sets, "1", [key], 100, 1, None, "adapter")


def test_commas_in_brackets_and_quotes_do_not_separate() -> None:
    text = "['a,b', \"c]\"],{x=1, y=[2, 3]}, 'it, too'"
    assert list(alternatives(text)) == ["['a,b', \"c]\"]", "{x=1, y=[2, 3]}", "'it, too'"]


@settings(deadline=None)
@given(st.lists(st.text("ab12.'\"[]{}_ ", min_size=1), min_size=1, max_size=5))
def test_nothing_is_lost_between_commas(parts: list[str]) -> None:
    text = ",".join(parts)
    assert "".join(alternatives(text)).replace(" ", "").replace(",", "") == text.replace(" ", "").replace(",", "")


@settings(deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters=",[]{}()'\""), min_size=1), unique_by=str.strip)
)
def test_names_are_folders_and_differ(values: list[str]) -> None:
    values = [value for value in values if value.strip()]
    if not values:
        return
    found = grid(["task.system=" + ",".join(values)])
    assert len(found) == len(values)
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9._+=,-]*", name)
        assert (plain(name) if name else "") == name or len(name) > 48


@pytest.mark.parametrize(
    ("sets", "code", "named"),
    [
        (["train.lr"], "not-key-value", "'train.lr'"),
        (["train.lr=0.1,,0.2"], "bad-alternatives", "'train.lr=0.1,,0.2'"),
        (["train.lr=0.1,0.1"], "bad-alternatives", "'0.1'"),
        (["train.lr=0.1", "train.lr=0.2"], "key-given-twice", "train.lr"),
        (["seed=1,2"], "reserved-key", "--seeds"),
        (["name=a"], "reserved-key", "-o"),
    ],
)
def test_a_wrong_grid_is_refused(sets: list[str], code: str, named: str) -> None:
    with raises(ConfigError, code, named):
        grid(sets)


# ---------------------------------------------------------------------------------------------- sweeps


class Watch:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.start: tuple[int, ...] = ()
        self.rounds: list[tuple[str, int]] = []
        self.ended: dict[str, str | None] = {}
        self.picks: dict[str, str] = {}

    def begun(self, *numbers: int) -> None:
        self.start = numbers

    def round_ended(self, name: str, number: int) -> None:
        self.rounds.append((name, number))

    def more(self, runs: int, rounds: int) -> None:
        self.start = (self.start[0] + runs, self.start[1] + rounds, *self.start[2:])

    def run_ended(self, name: str, why: str | None) -> None:
        self.ended[name] = why

    def chosen(self, setting: str, candidate: str, tried: Mapping[str, float]) -> None:
        self.picks[setting] = candidate


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "base.toml"
    path.write_text("rounds = 1\n")
    return path


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs end at once, with an accuracy of 1 - 10 |lr - 0.02|; the names of those that were asked for."""
    asked: list[str] = []

    def complete(config: RunConfig, keep: str, on_round: Callable[[int], None]) -> None:
        asked.append(config.name)
        if config.train.lr > 1:
            raise TrainingError("the loss is\nnot finite: lower train.lr")
        rate = config.train.lr
        overrides = [f"train.lr={rate}", f"strategy.name={config.strategy.name}", f"seed={config.seed}"]
        path = make_run(Path(config.output) / config.name, [0.1, 1 - 10 * abs(rate - 0.02)], *overrides)
        (path / "config.toml").write_text(config.to_toml())
        on_round(1)

    monkeypatch.setattr(_workers, "complete", complete)
    return asked


def test_what_is_finished_is_not_repeated(toml: Path, tmp_path: Path, pretend: list[str]) -> None:
    settings = grid(["strategy.name=fedavg,ffa"])
    watch = Watch()
    first = run_sweep(Sweep(toml, tmp_path / "out", settings, seeds=(0, 1)), watch)
    assert pretend == [f"strategy={name},seed={seed}" for name in ("fedavg", "ffa") for seed in (0, 1)]
    assert watch.start == (4, 4, 0, 0)
    assert [path.name for path in first.runs] == pretend
    pretend.clear()
    again = run_sweep(Sweep(toml, tmp_path / "out", settings, seeds=(0, 1, 2)), watch)
    assert pretend == ["strategy=fedavg,seed=2", "strategy=ffa,seed=2"]
    assert watch.start == (6, 6, 4, 4)
    assert len(again.runs) == 6
    assert RunDir.open(again.cells["strategy=ffa"].runs[2]).config.seed == 2


def test_the_best_alternative_is_chosen_on_another_seed(toml: Path, tmp_path: Path, pretend: list[str]) -> None:
    rates = Selection(grid(["train.lr=0.01,0.02,0.05,7"]), seed=9)
    watch = Watch()
    outcome = run_sweep(
        Sweep(toml, tmp_path / "out", {"plain text": (), "ffa": ("strategy.name=ffa",)}, (0, 1), rates), watch
    )
    assert watch.picks == {"plain text": "lr=0.02", "ffa": "lr=0.02"}
    assert outcome.cells["ffa"].overrides == ("strategy.name=ffa", "train.lr=0.02")
    assert [path.name for path in outcome.cells["plain text"].runs.values()] == [
        *("plain-text,lr=0.02,seed=0", "plain-text,lr=0.02,seed=1")
    ]
    assert {path.parent.name for path in outcome.runs} == {"out"}
    assert sum("seed=9" in name for name in pretend) == 8
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert written["settings"]["ffa"]["chosen"] == "lr=0.02"
    assert written["settings"]["ffa"]["tried"] == pytest.approx(
        {"lr=0.01": 0.9, "lr=0.02": 1.0, "lr=0.05": 0.7, "lr=7": None}
    )
    assert outcome.failed["ffa,lr=7,seed=9"] == "the loss is not finite: lower train.lr"
    run_sweep(Sweep(toml, tmp_path / "out", {"plain text": (), "ffa": ("strategy.name=ffa",)}, (0, 1), rates), watch)
    assert watch.start == (12, 12, 10, 10)  # the two that failed are tried again


def test_nothing_is_chosen_among_runs_on_different_bases_of_one_name(
    toml: Path, tmp_path: Path, pretend: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = _workers.complete

    def swapped(config: RunConfig, keep: Any, on_round: Any) -> None:
        complete(config, keep, on_round)
        base = {"base": "one" if config.train.lr < 0.05 else "another"}
        (Path(config.output) / config.name / "provenance.json").write_text(json.dumps(base))

    monkeypatch.setattr(_workers, "complete", swapped)
    sweep = Sweep(toml, tmp_path / "out", {"plain": ()}, (0,), Selection(grid(["train.lr=0.01,0.02,0.05"]), seed=9))
    with raises(RunDirError, "provenance-mismatch", "the base model", "lr=0.01", "lr=0.05"):
        run_sweep(sweep)
    assert not any("seed=0" in name for name in pretend)


def test_a_sweep_may_do_no_more_than_select(toml: Path, tmp_path: Path, pretend: list[str]) -> None:
    rates = Selection(grid(["train.lr=0.01,0.02"]), seed=9)
    outcome = run_sweep(Sweep(toml, tmp_path / "out", {"plain, text": ()}, (), rates))
    assert (outcome.cells["plain, text"].chosen, outcome.runs) == ("lr=0.02", [])
    assert pretend == ["plain,text,lr=0.01,seed=9", "plain,text,lr=0.02,seed=9"]


def test_beyond_the_best_at_an_edge_the_next_one_is_tried(toml: Path, tmp_path: Path, pretend: list[str]) -> None:
    rates = Selection(grid(["train.lr=0.001,0.005,0.02,0.05,0.06"]), seed=9, start=("lr=0.001", "lr=0.005"))
    watch = Watch()
    outcome = run_sweep(Sweep(toml, tmp_path / "out", {"a": ()}, (0,), rates), watch)
    assert [name for name in pretend if "seed=9" in name] == [
        f"a,lr={rate},seed=9" for rate in (0.001, 0.005, 0.02, 0.05)
    ]
    assert watch.picks == {"a": "lr=0.02"}
    assert list(outcome.cells["a"].tried) == ["lr=0.001", "lr=0.005", "lr=0.02", "lr=0.05"]
    assert watch.start[0] == 5
    pretend.clear()
    down = Selection(grid(["train.lr=0.001,0.019,0.03,0.05"]), seed=9, start=("lr=0.03", "lr=0.05"))
    run_sweep(Sweep(toml, tmp_path / "down", {"a": ()}, (0,), down), watch)
    assert [name[2:] for name in pretend] == [f"lr={rate},seed=9" for rate in (0.03, 0.05, 0.019, 0.001)] + [
        "lr=0.019,seed=0"
    ]
    with raises(ConfigError, "unknown-name", "'lr=3'"):
        run_sweep(Sweep(toml, tmp_path / "x", {"a": ()}, (0,), Selection(grid(["train.lr=1,2"]), start=("lr=3",))))


def test_a_run_that_fails_stops_no_other(toml: Path, tmp_path: Path, pretend: list[str]) -> None:
    outcome = run_sweep(Sweep(toml, tmp_path / "out", grid(["train.lr=2,0.01"]), seeds=(0,)))
    assert outcome.failed == {"lr=2,seed=0": "the loss is not finite: lower train.lr"}
    assert [path.name for path in outcome.runs] == ["lr=0.01,seed=0"]
    nothing = run_sweep(Sweep(toml, tmp_path / "out2", {"a": ()}, (0,), Selection(grid(["train.lr=2,3"]))))
    assert nothing.runs == []
    assert nothing.failed["a"] == "none of its alternatives could be run"


@pytest.mark.usefixtures("faults_are_fedloras")
def test_a_bug_in_one_run_is_kept_in_a_file(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(_workers, "complete", lambda *_: 1 / 0)
    outcome = run_sweep(Sweep(toml, tmp_path / "out", {"": ()}, seeds=(0,)))
    (file,) = (tmp_path / "errors").glob("*.log")
    assert "unexpected ZeroDivisionError: division by zero" in outcome.failed["seed=0"]
    assert str(file) in outcome.failed["seed=0"]
    assert "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"settings": {"a": ("train.lrr=1",)}}, "unknown-key", "'train.lrr'"),
        ({"settings": {"a": (), "b": ("train.lr=x",)}}, "bad-value", "train.lr"),
        ({"settings": {"a": (), "b": ("strategy.name=ffaa",)}}, "unknown-name", "'ffa'"),
        ({"settings": {"a": (), "b": ("strategy.nu=1",)}}, "unknown-key", "'nu'"),
        ({"settings": {"a": (), "b": ("partition.name=iidd",)}}, "unknown-name", "'iidd'"),
        ({"settings": {"a/b": (), "a b": ()}}, "folder-name-taken", ""),
        ({"settings": {}}, "nothing-to-run", ""),
        ({"seeds": (1, 1)}, "seed-given-twice", ""),
        ({"selection": Selection(grid(["train.lr=1,2"]), seed=1)}, "seed-chooses-and-reports", "seed 1"),
    ],
)
def test_a_mistake_is_said_before_the_first_run(
    toml: Path, tmp_path: Path, pretend: list[str], change: dict[str, Any], code: str, named: str
) -> None:
    what: dict[str, Any] = {"settings": {"a": ()}, "seeds": (0, 1), **change}
    with raises(ConfigError, code, named):
        run_sweep(Sweep(toml, tmp_path / "out", **what))
    assert pretend == []
    assert not (tmp_path / "out").exists()


def test_another_sweeps_runs_are_not_mixed_in(toml: Path, tmp_path: Path, pretend: list[str]) -> None:
    run_sweep(Sweep(toml, tmp_path / "out", {"a": ()}, seeds=(0,)))
    toml.write_text("rounds = 1\n[train]\nlr = 0.5\n")
    with raises(RunDirError, "config-differs", "train.lr", 0.001, 0.5):
        run_sweep(Sweep(toml, tmp_path / "out", {"a": ()}, seeds=(0,)))


def test_two_sweeps_do_not_share_a_folder(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def complete(*_: object) -> None:
        with raises(RunDirError, "folder-in-use", tmp_path / "out"):
            run_sweep(Sweep(toml, tmp_path / "out", {"": ()}, seeds=(0,)))
        found.append("refused")

    monkeypatch.setattr(_workers, "complete", complete)
    run_sweep(Sweep(toml, tmp_path / "out", {"": ()}, seeds=(0,)))
    assert found == ["refused"]


# ---------------------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bytes(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(out: Path) -> list[str]:
        return ["sweep", str(tiny_toml), "--set", "strategy.name=fedavg,ffa", "-o", str(out)]

    save = Checkpoints.save

    def interrupted(self: Checkpoints, state: Any) -> Path:
        if state.round == 2 and len(list(cut.glob("*/result.json"))) == 1:
            raise KeyboardInterrupt
        return save(self, state)

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    monkeypatch.setattr(Checkpoints, "save", interrupted)
    stopped = invoke(*words(cut))
    monkeypatch.undo()
    assert (stopped.exit_code, stopped.stderr) == (130, "stopped; the same command goes on\n")
    before = (cut / "strategy=fedavg,seed=0" / "result.json").stat().st_mtime_ns
    done = succeeds(*words(cut))
    assert "2 runs, 1 of them done before" in done.stdout
    assert "undecided" in done.stdout
    assert (cut / "curves.png").is_file()
    assert (cut / "strategy=fedavg,seed=0" / "result.json").stat().st_mtime_ns == before
    assert invoke(*words(whole)).exit_code == 0
    for name in ("strategy=fedavg,seed=0", "strategy=ffa,seed=0"):
        file = "adapter/adapter_model.safetensors"
        assert (cut / name / file).read_bytes() == (whole / name / file).read_bytes()
        (one, mine), (other, yours) = (read_outcomes(out / name, 2) or ("", {}) for out in (cut, whole))
        assert one == other
        assert {key: values.tolist() for key, values in mine.items()} == {k: v.tolist() for k, v in yours.items()}
        assert not (cut / name / "checkpoints").exists()  # of finished runs only what was asked for stays
    run = RunDir.open(cut / "strategy=ffa,seed=0")
    test, outcomes = read_outcomes(run.path, run.kept_round) or ("", {})
    last = run.read_metrics()[-1]
    assert (outcomes["predicted"] == outcomes["label"]).mean() == pytest.approx(last["accuracy"])
    assert len(test) == 32
    with raises(RunDirError, "checkpoints-removed", run.path):
        run.resume()
    assert run.finished  # nothing was lost by trying


@pytest.mark.nightly
def test_processes_end_with_the_sweep_and_a_killed_one_is_noted(tiny_toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fedlora", "sweep", str(tiny_toml), "--seeds", "4", "-j", "2", "-o", str(out)]
    command += ["--set", "rounds=20"]

    def lines() -> int:
        return sum(path.read_text().count("\n") for path in out.glob("*/metrics.jsonl"))

    def begin() -> subprocess.Popen[str]:
        """A sweep whose processes are both at work."""
        before = lines()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: process.poll() is not None or (len(children(process)) == 2 and lines() >= before + 4))
        assert process.poll() is None, process.communicate()
        return process

    def children(process: subprocess.Popen[str]) -> list[int]:
        task = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(k) for k in task if b"spawn_main" in Path(f"/proc/{k}/cmdline").read_bytes()]

    first = begin()
    workers = children(first)
    assert len(workers) == 2
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))

    second = begin()
    os.kill(children(second)[0], signal.SIGKILL)
    stdout, stderr = second.communicate(timeout=300)
    assert second.returncode == 1
    assert "its process ended with status -9" in stdout
    assert "1 failed; the same command tries them again" in stderr
    third = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert third.returncode == 0, third.stderr
    assert "4 runs, 3 of them done before" in third.stdout
    assert all(RunDir.open(out / f"seed={seed}").config.runtime.threads == 1 for seed in range(4))
