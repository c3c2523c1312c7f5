"""The net below the errors that were foreseen: one line, a file with the traceback, and no folder in the way."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import invoke
from support.errors import raises

import fedlora.api  # noqa: F401  # before `load_config` is replaced
from fedlora.config import load_config
from fedlora.errors import RunDirError
from fedlora.federation import client_training, evaluator
from fedlora.runs.place import check_free
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.unexpected import KEPT_LOGS, describe_exception, keep_traceback


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the files with tracebacks."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "errors"


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


SYSTEM = [
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), r"'runs/a': No space left on device; free"),
    (OSError(errno.EROFS, "Read-only file system", "runs/a"), "can be written"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "permissions"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 2000), "shorter name"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "is a file and no folder"),
    (MemoryError(), "lower train.batch_size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "lower train.batch_size"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB"), r"CUDA out of memory\): lower train.batch_size"),
]


@pytest.mark.parametrize(("error", "words"), SYSTEM)
def test_the_systems_own_errors_say_what_to_do(error: Exception, words: str, logs: Path) -> None:
    line = describe_exception(error)
    assert re.search(words, line)
    assert len(line) < 600
    assert "unexpected" not in line
    assert not logs.exists()


def test_what_nobody_foresaw_is_one_line_and_a_file(logs: Path) -> None:
    def fail() -> None:
        raise TypeError("first\x1b[2J\nsecond")

    with pytest.raises(TypeError) as caught:
        fail()
    line = describe_exception(caught.value)
    (file,) = logs.glob("*.log")
    assert line.startswith("unexpected TypeError: first")
    assert str(file) in line
    assert "\n" not in line
    assert "\x1b" not in line
    assert "in fail" in file.read_text()


def test_old_files_are_removed_and_a_folder_that_cannot_be_made_is_no_second_error(logs: Path) -> None:
    logs.mkdir(parents=True)
    for number in range(KEPT_LOGS + 5):
        (logs / f"2000-{number:03d}.log").touch()
    kept = keep_traceback(ValueError("x"))
    assert kept is not None
    assert kept.is_file()
    assert len(list(logs.iterdir())) == KEPT_LOGS
    os.environ["FEDLORA_CACHE"] = str(kept)  # a file is in the way
    assert keep_traceback(ValueError("x")) is None
    assert "--debug" in describe_exception(ValueError("x"))


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (TypeError("boom"), 1, "error: unexpected TypeError: boom"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device; free"),
        (MemoryError(), 1, "error: memory ran out"),
        (KeyboardInterrupt(), 130, "stopped"),
        (BrokenPipeError(), 0, ""),
    ],
)
@pytest.mark.usefixtures("faults_are_fedloras")
def test_every_command_ends_in_one_line(
    error: BaseException, status: int, words: str, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedlora.config.load_config", fail)
    for command in ("run", "config", "partition", "audit", "sweep"):
        result = invoke(command, tiny_toml)
        assert result.exit_code == status
        assert result.stderr.startswith(words)
        assert len(result.stderr.splitlines()) == bool(words)
    if status == 1:
        debugged = invoke("run", tiny_toml, "--debug")
        assert debugged.exception is error


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    """`fedlora config | head -1`, with output that is short enough to wait in a buffer until the end."""
    child = subprocess.Popen(
        [sys.executable, "-m", "fedlora", "config", "rounds"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.close()
    _, said = child.communicate()
    assert (child.returncode, said) == (0, "")


@pytest.mark.parametrize("by_rich", [False, True])
def test_training_that_nobody_reads_any_more_has_not_succeeded(
    by_rich: bool, tiny_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fedlora run CONFIG | head -1`: rich makes an exit with status 1 of a pipe that is closed."""

    def train(*_: object, **__: object) -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            if by_rich:
                raise SystemExit(1)  # noqa: B904 as rich does: the context says why
            raise

    monkeypatch.setattr("fedlora.api.train", train)
    monkeypatch.setattr("fedlora.sweep.run_sweep", train)
    for command, words in (("run", "nothing was kept"), ("sweep", "the same command")):
        result = invoke(command, tiny_toml)
        assert result.exit_code == 141
        assert "nobody reads" in result.stderr
        assert words in result.stderr


# ------------------------------------------------------------------------------------------------ a run's folder


@pytest.fixture
def broken(tiny_toml: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A config whose clients run into a fault of the program."""

    def fail(*_: object, **__: object) -> None:
        raise IndexError("index out of range in self")

    with monkeypatch.context() as patch:
        patch.setattr(client_training, "train_cohort", fail)
        yield tiny_toml


@pytest.mark.usefixtures("faults_are_fedloras")
def test_a_fault_of_the_program_ends_a_simulation_and_frees_its_place(broken: Path, tmp_path: Path) -> None:
    """On real machines such a client is left out; here it would be left out of every round, and the run exit 0."""
    result = invoke("run", broken)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected IndexError: index out of range")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_run_that_has_trained_keeps_its_folder(tiny_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny_toml)
    run = RunDir.create(config)
    summarised = evaluator.summarised
    calls = []

    def fail_later(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return summarised(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluator, "summarised", fail_later)
    with pytest.raises(OSError, match="No space"):
        run_simulation(config, run)
    assert not run.discard_if_untrained()
    assert run.rounds_done == 1
    monkeypatch.undo()
    assert len(run_simulation(config, RunDir.open(run.path, config), resume=True).records) == 3


def test_a_privacy_ledger_is_never_discarded(tiny_toml: Path) -> None:
    run = RunDir.create(load_config(tiny_toml))
    run.privacy_dir.mkdir()
    (run.privacy_dir / "0.json").touch()
    assert not run.discard_if_untrained()
    (run.privacy_dir / "0.json").unlink()
    assert run.discard_if_untrained()
    assert not run.path.exists()


@pytest.mark.parametrize("place", ["afile", "afile/deeper", "/proc/x", "x" * 300])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_loaded(
    place: str, tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "afile").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config(tiny_toml, [f"output={place}"])
    with raises(RunDirError, "folder-not-writable", "--set output"):
        RunDir.create(config)
    with raises(RunDirError, "folder-not-writable", "--set output"):
        check_free(config)


def test_half_a_folder_is_no_run(tiny_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny_toml)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "write_json", full)
        with raises(RunDirError, "folder-not-writable", "No space"):
            RunDir.create(config)
    RunDir.create(config)


RULE = """
from dataclasses import dataclass
from fedlora.aggregators.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    def aggregate(self, state, updates):
        {line}
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("return state.no_such_thing", "AttributeError: 'GlobalState' object has no attribute 'no_such_thing'"),
        ("return super().aggregate(state, [1])", "AttributeError: 'int' object has no attribute"),  # below it
        ("return )", "SyntaxError: unmatched ')'"),
    ],
)
def test_a_fault_of_a_users_rule_is_named_by_its_file_and_line(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    name = f"own_rule_{abs(hash(line))}"
    (tmp_path / f"{name}.py").write_text(RULE.format(line=line))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = invoke("run", tiny_toml, "--set", f"strategy.name={name}:Mine")
    assert found.exit_code == 1
    (last,) = [row for row in found.stderr.splitlines() if row.startswith("error: ")]
    assert last.startswith(f"error: your code fails in {tmp_path / name}.py, line 8: {said}"), last
    assert "report" not in last
