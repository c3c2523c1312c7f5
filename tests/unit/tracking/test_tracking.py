"""Trackers: what they are told, by the real packages where those are installed, without a network."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.errors import raises
from support.report_runs import records

import fedlora.tracking
from fedlora.callbacks import Callbacks
from fedlora.config import parse_config
from fedlora.errors import ConfigError
from fedlora.progress import PlainProgress
from fedlora.runs.rundir import RunDir
from fedlora.tracking import TRACKERS, Tracker, figures_of, require_tracker, tracked

Points = dict[str, list[tuple[int, float]]]


class Told(Tracker):
    """Keeps what it is told."""

    package = "json"
    made: list[Told] = []  # noqa: RUF012
    breaks: str = ""

    def __init__(self, config: Any, folder: Path, run_id: str | None) -> None:
        self.given, self.run_id, self.where = run_id, "id-1", "here"
        self.points: dict[int, Mapping[str, float]] = {}
        self.ok: bool | None = None
        self.made.append(self)
        if self.breaks == "open":
            raise OSError("the server is gone")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if self.breaks == "log":
            raise OSError("the disk is full")
        self.points[step] = figures

    def close(self, *, ok: bool) -> None:
        self.ok = ok


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    monkeypatch.setattr(fedlora.tracking, "_class", lambda name: Told)
    monkeypatch.setattr(Told, "made", [])
    monkeypatch.setattr(Told, "breaks", "")
    return Told


def make(tmp_path: Path, name: str) -> RunDir:
    return RunDir.create(parse_config(f'name = "seen"\ntracking.name = "{name}"'), tmp_path)


def play(run: RunDir, rounds: range, lines: list[str] | None = None) -> None:
    """What a run tells in these rounds."""
    progress = PlainProgress([].append if lines is None else lines.append)
    with tracked(progress, run.config, run) as trackers:
        both = Callbacks(progress, *trackers)
        both.started(run.config, 6, 4)
        for record in records()[rounds.start : rounds.stop]:
            both.round_started(record["round"], record.get("asked", []))
            both.reply(record["round"], 0, False, "a note")
            both.round_ended(record)


# ---------------------------------------------------------------------------------------------- any tracker


def test_a_tracker_sees_every_round_and_the_end(tmp_path: Path, told: type[Told]) -> None:
    lines: list[str] = []
    play(make(tmp_path, "wandb"), range(5), lines)
    (one,) = told.made
    assert list(one.points) == [0, 1, 2, 3, 4]
    assert one.points[4]["accuracy"] == pytest.approx(0.9)
    assert one.ok is True
    assert "tracking: here" in lines
    assert sum("a note" in line for line in lines) == 5  # the other callback still hears all


def test_a_failed_run_is_closed_as_one(tmp_path: Path, told: type[Told]) -> None:
    run = make(tmp_path, "wandb")
    with pytest.raises(ZeroDivisionError), tracked(PlainProgress([].append), run.config, run):
        1 / 0  # noqa: B018
    assert told.made[0].ok is False


@pytest.mark.parametrize("breaks", ["open", "log"])
def test_a_tracker_that_breaks_ends_the_tracking_and_not_the_run(
    tmp_path: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    monkeypatch.setattr(told, "breaks", breaks)
    lines: list[str] = []
    play(make(tmp_path, "wandb"), range(5), lines)
    assert sum(line.startswith("tracking stopped: OSError") for line in lines) == 1
    assert sum("a note" in line for line in lines) == 5


def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path, told: type[Told]) -> None:
    run = make(tmp_path, "wandb")
    play(run, range(3))
    play(run, range(3, 5))
    assert [one.given for one in told.made] == [None, "id-1"]
    assert json.loads((run.path / "tracking.json").read_text()) == {"wandb": "id-1"}


def test_without_the_key_nothing_is_tracked(tmp_path: Path, told: type[Told]) -> None:
    run = RunDir.create(parse_config('name = "seen"'), tmp_path)
    play(run, range(5))
    assert told.made == []
    assert not (run.path / "tracking.json").exists()


def test_figures_are_numbers_and_tell_of_no_single_client() -> None:
    record = {**records()[1], "rule": {"fair/objective": 2}, "epsilon": None, "lost": False, "loss": float("inf")}
    record["domains"] = {"fil\nms:é": {"accuracy": 0.25}}
    record["validation"] = {"loss": 0.75}
    clients = {"7": {"accuracy": 0.125, "loss": 1.0, "examples": 3.0}}
    record["federated"] = {"figures": {"accuracy": 0.5}, "macro": {"accuracy": 0.625}, "clients": clients}
    figures = figures_of(record)
    assert figures["validation/loss"] == 0.75
    assert (figures["federated/figures/accuracy"], figures["federated/macro/accuracy"]) == (0.5, 0.625)
    assert 0.125 not in figures.values()
    assert figures["domains/fil_ms__/accuracy"] == 0.25
    assert figures["rule/fair/objective"] == 2.0
    assert figures["clients/answered"] == 3.0
    assert figures["clients/refused"] == 1.0
    assert not {"round", "epsilon", "loss", "clients/clients"} & set(figures)
    assert not any("num_examples" in name for name in figures)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_line_that_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedlora.tracking, "find_spec", lambda package: None)
    with raises(ConfigError, "package-not-installed", f"pip install 'fedlora[{name}]'"):
        require_tracker(parse_config(f'tracking.name = "{name}"'))


def test_every_tracker_has_an_extra_and_a_place_in_the_config() -> None:
    import tomllib
    from typing import get_args

    from fedlora.config import TrackingConfig

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert set(TRACKERS) <= set(project["optional-dependencies"])
    assert get_args(TrackingConfig.model_fields["name"].annotation) == tuple(TRACKERS)


# ---------------------------------------------------------------------------------------------- the real packages


def read_tensorboard(run: RunDir) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def read_mlflow(run: RunDir) -> Points:
    import mlflow

    client = mlflow.MlflowClient()
    found = client.get_run(run.read_json("tracking.json")["mlflow"])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.001"
    names = found.data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)] for name in names}


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Of a log as LevelDB writes it: blocks of 32 KiB, of chunks with checksum (4), length (2) and kind (1)."""
    place, whole = 7, b""  # after W&B's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def read_wandb(run: RunDir) -> Points:
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = {}
    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        assert path.stem == f"run-{run.read_json('tracking.json')['wandb']}"
        found: list[Any] = []
        for _ in range(100):  # a process of its own writes the file, and ends it after the run
            found = [Record.FromString(data) for data in leveldb_records(path.read_bytes())]
            if found and found[-1].WhichOneof("record_type") == "exit":
                break
            time.sleep(0.1)
        for record in found:
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            for name, value in row.items():
                if not name.startswith("_"):
                    points.setdefault(name, []).append((int(row["_step"]), value))
    return points


def read_trackio(run: RunDir) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("fedlora", run.read_json("tracking.json")["trackio"])
    points: Points = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                points.setdefault(name, []).append((row["step"], value))
    return points


READERS: dict[str, Callable[[RunDir], Points]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.filterwarnings("ignore")  # the trackers' own
def test_the_real_tracker_holds_the_figures_of_a_run_and_of_its_resume(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'fedlora[{name}]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    run = make(tmp_path / "runs", name)
    lines: list[str] = []
    play(run, range(3), lines)
    play(run, range(3, 5), lines)
    assert not [line for line in lines if "tracking stopped" in line]
    assert sum(line.startswith("tracking: ") for line in lines) == 2
    points = READERS[name](run)
    for figure, value in (("accuracy", 0.9), ("domains/films/accuracy", 0.8), ("clients/answered", 3.0)):
        assert [step for step, _ in points[figure]] == list(range(figure == "clients/answered", 5))
        assert points[figure][-1][1] == pytest.approx(value)
