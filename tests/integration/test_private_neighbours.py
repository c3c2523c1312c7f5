"""Two private runs on data sets that differ in one example: all that they write and send is the same, to the byte.

The updates differ by nature: what a client trained is replaced by fixed tensors, and the server's noise is fixed. What
is left depends on the config alone, or is a leak. Random ids are drawn from a counter, so that the ledgers are compared
too. Nothing is left out of the comparison but the clients' own logs, which are theirs.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message

from fedlora.adapter import AdapterState
from fedlora.callbacks import Callback
from fedlora.config import RunConfig, parse_config
from fedlora.federation import client, private_client
from fedlora.federation.protocol import TrainRequest
from fedlora.flower import client_app
from fedlora.flower.server_app import serve
from fedlora.flower.task_identity import task_identity
from fedlora.privacy import server_dp as central
from fedlora.rng import derive
from fedlora.runs import environment
from fedlora.runs.rundir import RunDir
from fedlora.simulation import capacity as sizing
from fedlora.simulation.run import run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.job import TrainResult
from fedlora.training.workspace import close_workspace, open_workspace

Rows = list[dict[str, str]]
OWN_LOGS = (
    "fedlora.federation.client",
    "fedlora.federation.private_client",
    "fedlora.flower.client_app",
    "fedlora.flower.kept_answers",
    "fedlora.federation.discretion",
    "fedlora.federation.client_ledger",
    "fedlora.data",
    "fedlora.training",
    "fedlora.activity",
)
"""Loggers of the clients, and of what is shown to whoever watches a process at work; the others are the server's."""

EXAMPLE = [
    "server.weighting=uniform",
    "privacy.noise_multiplier=1.5",
    "privacy.delta=1e-3",
    "privacy.max_grad_norm=0.5",
    "privacy.public_examples=40",
    "privacy.accountant=rdp",
]
CLIENT = [
    "server.weighting=uniform",
    "server.aggregation_error=false",
    "privacy.unit=client",
    "privacy.noise_multiplier=1.5",
    "privacy.delta=1e-3",
    "privacy.clip_norm=0.5",
    "privacy.accountant=rdp",
]
DEVICES = [
    'clients.profiles=[{name="slow", examples_per_s=10}, {name="fast", examples_per_s=1000, dropout=0.2}]',
    "server.simulated_deadline_s=2.5",
]


# ------------------------------------------------------------------------------------------------ odd examples


def longer(rows: Rows) -> Rows:
    return [*rows[:-1], {**rows[-1], "text": "superb story " * 400}]


def relabelled(rows: Rows) -> Rows:
    other = "negative" if rows[-1]["label"] == "positive" else "positive"
    return [*rows[:-1], {**rows[-1], "label": other}]


def strange(rows: Rows) -> Rows:
    return [*rows[:-1], {**rows[-1], "text": "\u202egnp.exe \x1b[2J \U0001f9ff\u0000 caf\u00e9 \ufeff"}]


def removed(rows: Rows) -> Rows:
    return rows[:-1]


def added(rows: Rows) -> Rows:
    return [*rows, {**rows[-1], "text": "a b c d e f g h"}]


WHOLE = (longer, relabelled, strange, removed, added)


def table(rows: Sequence[dict[str, str]], names: Sequence[str] = ()) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(names or rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def bad_label(data: bytes) -> bytes:
    return data + b"patient John Doe,hivpositive\r\n"


def bad_bytes(data: bytes) -> bytes:
    return data + b"caf\xe9 \xff\xfe,positive\r\n"


def bad_fields(data: bytes) -> bytes:
    return data + b"only one field\r\nthree,of,them\r\n"


def empty_text(data: bytes) -> bytes:
    return data + b"  ,positive\r\n"


BROKEN = (bad_label, bad_bytes, bad_fields, empty_text)


# ------------------------------------------------------------------------------------------------ the two runs


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients train is trained, and replaced by fixed tensors; the server's noise is fixed."""

    trained, unchanged = client.train_requests, client._unchanged

    def fixed_trained(workspace: Any, requests: Any, *how: Any) -> list[Any]:
        return [
            replace(found, adapter=fixed_adapter(one)) if isinstance(found, TrainResult) else found
            for one, found in zip(requests, trained(workspace, requests, *how), strict=True)
        ]

    def fixed_unchanged(workspace: Any, request: Any, *how: Any) -> TrainResult:
        return replace(unchanged(workspace, request, *how), adapter=fixed_adapter(request))

    for module in (client, private_client):
        monkeypatch.setattr(module, "train_requests", fixed_trained)
    monkeypatch.setattr(client, "_unchanged", fixed_unchanged)

    def noise(like: torch.Tensor, std: float, _generator: torch.Generator) -> torch.Tensor:
        drawn = torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        return drawn * std

    monkeypatch.setattr(central, "_noise", noise)
    monkeypatch.setattr(environment, "_commit", lambda: "some")  # with "+changes" once somebody edits a file


def fixed_adapter(request: TrainRequest) -> AdapterState:
    """The start of a plan, moved by numbers that follow from round, client and name alone."""
    start, moved = request.plan.adapter, {}
    for name, tensor in start.tensors(request.plan.trains).items():
        seed = derive(0, "fixed", request.round, request.client_id, name)
        moved[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return start.with_tensors(moved)


class Told(Callback):
    """All that is told while a run goes on."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def started(self, config: RunConfig, clients: int, rounds: int) -> None:
        self.lines.append(("started", clients, rounds))

    def round_started(self, number: int, asked: Any) -> None:
        self.lines.append(("asked", number, list(asked)))

    def reply(self, number: int, client_id: int, ok: bool, note: str) -> None:
        self.lines.append(("reply", number, client_id, ok, note))

    def round_ended(self, record: Any) -> None:
        self.lines.append(("ended", json.dumps(record, default=str)))

    def message(self, text: str) -> None:
        self.lines.append(("message", text))


class Everything:
    """Runs a federation, and gives all that it wrote, sent and told, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self._patch, self._log = monkeypatch, caplog

    def __call__(self, config: RunConfig, run: Callable[[RunDir, Told], Any]) -> dict[str, Any]:
        close_workspace()
        numbers, told = count(1), Told()
        found: dict[str, Any] = {}
        real = LoopbackGrid._pull

        def pull(grid: LoopbackGrid, key: str) -> Message:
            message = real(grid, key)
            found[f"message {len(found)}"] = (
                str(message.error)
                if message.has_error()
                else {
                    name: [(k, a.dtype, a.shape, a.data) for k, a in record.items()]
                    if isinstance(record, ArrayRecord)
                    else dict(record)
                    for name, record in message.content.items()
                }
            )
            return message

        folder = Path(config.output) / config.name
        shutil.rmtree(folder, ignore_errors=True)
        self._log.clear()
        with self._patch.context() as patch, self._log.at_level(logging.INFO):
            patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=next(numbers)))
            patch.setattr(LoopbackGrid, "_pull", pull)
            run(RunDir.create(config), told)
        found |= {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        elsewhere = (*OWN_LOGS, "bitsandbytes")  # which tells at its import, once a process, what the machine lacks
        server = [r.getMessage() for r in self._log.records if not r.name.startswith(elsewhere)]
        return {**found, "told": told.lines, "log": server}


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Everything:
    return Everything(monkeypatch, caplog)


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == other[name], name


@pytest.fixture(scope="session")
def reviews(tiny_csv: Path) -> Rows:
    return list(csv.DictReader(tiny_csv.open(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------ simulations


@pytest.fixture
def simulated(
    tiny_bert: Path, tiny_llama: Path, reviews: Rows, tmp_path: Path
) -> Callable[..., tuple[RunConfig, Callable[[Rows], None]]]:
    """A config whose clients are sites of one file, with test data of its own, and what writes that file."""

    def make(task: str, *overrides: str) -> tuple[RunConfig, Callable[[Rows], None]]:
        model = tiny_bert if task == "text-classification" else tiny_llama
        more = ["task.labels=['negative','positive']"] if model is tiny_bert else ["task.format=text"]
        targets = "['query','value']" if model is tiny_bert else "['q_proj','v_proj']"
        (tmp_path / "test.csv").write_bytes(table(reviews[:40]))
        config = parse_config(
            "",
            [
                f"output='{tmp_path / 'runs'}'",
                f"model.name='{model}'",
                "adapter.rank=2",
                f"adapter.targets={targets}",
                f"data.source='{tmp_path / 'train.csv'}'",
                f"data.test='{tmp_path / 'test.csv'}'",
                f"task.name={task}",
                *more,
                "partition.name=natural",
                "partition.column=site",
                "train.steps=2",
                "train.batch_size=8",
                "runtime.threads=1",
                "runtime.kernels=off",
                "runtime.processes=1",
                "rounds=2",
                *overrides,
            ],
            name="run",
        )

        def write(rows: Rows) -> None:
            others = [{**row, "site": f"site {number % 2}"} for number, row in enumerate(reviews[40:100])]
            (tmp_path / "train.csv").write_bytes(table([*others, *({**row, "site": "site 2"} for row in rows)]))

        return config, write

    return make


def simulate(config: RunConfig) -> Callable[[RunDir, Told], Any]:
    return lambda rundir, told: run_simulation(config, rundir, told)


def _cases() -> Iterator[Any]:
    nightly = pytest.mark.nightly
    prefix = ["adapter.layers=top:1", "model.dropout=0"]
    for unit, name in ((EXAMPLE, "example"), (CLIENT, "client")):
        yield pytest.param("text-classification", [*unit, *DEVICES], (longer,), id=f"{name}-devices")
        yield pytest.param("text-classification", unit, WHOLE, id=f"{name}-all")
        yield pytest.param("text-classification", [*unit, *DEVICES], WHOLE, id=f"{name}-devices-all", marks=nightly)
        yield pytest.param("text-classification", [*unit, *prefix], (longer,), id=f"{name}-prefix")
        yield pytest.param("text-classification", [*unit, "runtime.cohort=1"], WHOLE, id=f"{name}-alone", marks=nightly)
        yield pytest.param("text-classification", [*unit, "strategy.name=ffa"], WHOLE, id=f"{name}-ffa")
        cores = [*unit, "strategy={name='ravan', heads=2}"]
        yield pytest.param("text-classification", cores, WHOLE, id=f"{name}-ravan")
        kept = [*unit, "strategy.name=fedsa"]
        yield pytest.param("text-classification", kept, WHOLE, id=f"{name}-fedsa", marks=nightly)
        yield pytest.param("causal-lm", unit, (longer, removed), id=f"{name}-causal")
        yield pytest.param("causal-lm", [*unit, *prefix], (longer,), id=f"{name}-causal-prefix", marks=nightly)
    counted = [*CLIENT, "server.weighting=examples"]  # who has how many counts as public
    yield pytest.param("text-classification", [*counted, *DEVICES], (longer, relabelled), id="counted")
    yield pytest.param("text-classification", [*EXAMPLE, "strategy.name=flora"], WHOLE, id="flora")
    yield pytest.param("text-classification", [*EXAMPLE, "strategy.name=fedsb"], WHOLE, id="fedsb")
    yield pytest.param("text-classification", [*EXAMPLE, "wire.up=int8"], WHOLE, id="int8")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "overrides", "changes"), list(_cases()))
def test_a_simulation_writes_the_same_whatever_one_example_is(
    simulated: Any, everything: Everything, reviews: Rows, task: str, overrides: list[str], changes: Sequence[Any]
) -> None:
    config, write = simulated(task, *overrides)
    rows = reviews[100:130]
    write(rows)
    before = everything(config, simulate(config))
    assert b"<html" in before["report.html"]
    for change in changes:
        write(change(rows))
        require_same(before, everything(config, simulate(config)))


@pytest.mark.slow
@pytest.mark.parametrize("unit", [EXAMPLE, CLIENT], ids=["example", "client"])
def test_what_is_chosen_automatically_does_not_go_by_training_examples(
    simulated: Any, reviews: Rows, monkeypatch: pytest.MonkeyPatch, unit: list[str]
) -> None:
    """Processes, their shares of the clients, clients at once: on a machine with cores to choose about."""
    monkeypatch.setattr(sizing, "usable_cores", lambda: 8)
    monkeypatch.setattr(sizing, "own_cores", lambda: 8)
    monkeypatch.setattr(sizing, "WORTH_PROCESSES", 0.0)
    overrides = [*unit, "runtime.processes=auto", "adapter.layers=top:1", "model.dropout=0"]
    config, write = simulated("text-classification", *overrides)
    found = []
    for change in (lambda rows: rows, longer, lambda rows: rows[:5], lambda rows: added(longer(rows))):
        write(change(reviews[100:130]))
        close_workspace()
        workspace = open_workspace(config)
        choice = sizing.process_count(workspace, 3)
        assert choice.processes > 1
        found.append(
            (choice, sizing.cohort_size(workspace, 3, 2), sizing.expected_tokens(workspace), workspace.speedups.choices)
        )
    assert all(other == found[0] for other in found)


def test_the_comparison_sees_a_leak(simulated: Any, everything: Everything, reviews: Rows) -> None:
    config, write = simulated("text-classification")
    write(reviews[100:130])
    before = everything(config, simulate(config))
    write(longer(reviews[100:130]))
    with pytest.raises(AssertionError):
        require_same(before, everything(config, simulate(config)))


# ------------------------------------------------------------------------------------------------ nodes with own data


@pytest.fixture
def federated(tiny_bert: Path, reviews: Rows, tmp_path: Path) -> Callable[..., tuple[RunConfig, list[dict[str, Any]]]]:
    def make(*overrides: str) -> tuple[RunConfig, list[dict[str, Any]]]:
        two = [{"text": row["text"], "label": row["label"]} for row in reviews]
        (tmp_path / "test.csv").write_bytes(table(two[:40]))
        (tmp_path / "other.csv").write_bytes(table(two[40:80]))
        config = parse_config(
            "",
            [
                f"output='{tmp_path / 'runs'}'",
                f"model.name='{tiny_bert}'",
                "adapter.rank=2",
                "adapter.targets=['query','value']",
                "task.name=text-classification",
                "task.labels=['negative','positive']",
                "data.source=nodes",
                "model.dtype=float32",
                f"data.test='{tmp_path / 'test.csv'}'",
                "partition.name=nodes",
                "partition.clients=2",
                "train.steps=2",
                "train.batch_size=8",
                "runtime.threads=1",
                "runtime.kernels=off",
                "server.node_timeout_s=0.05",
                "rounds=2",
                *overrides,
            ],
            name="run",
        )
        nodes = [
            {"partition-id": k, "data": str(tmp_path / f"{name}.csv"), "ledger": str(tmp_path / f"ledger-{k}.jsonl")}
            for k, name in enumerate(("mine", "other"))
        ]
        return config, nodes

    return make


def deploy(config: RunConfig, nodes: list[dict[str, Any]]) -> Callable[[RunDir, Told], Any]:
    def run(rundir: RunDir, told: Told) -> None:
        for node in nodes:
            Path(node["ledger"]).unlink(missing_ok=True)
            Path(node["ledger"] + ".answer").unlink(missing_ok=True)
        with task_identity(1):
            grid = LoopbackGrid(client_app.app, nodes, {"toml": config.to_toml()})
            serve(grid, config, rundir, told, resume=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [pytest.param(EXAMPLE, id="example"), pytest.param(CLIENT, id="client")],
)
@pytest.mark.parametrize("some", ["few", pytest.param("all", marks=pytest.mark.nightly)])
def test_a_node_answers_as_any_other_whatever_its_own_file_holds(
    federated: Any, everything: Everything, reviews: Rows, tmp_path: Path, unit: list[str], some: str
) -> None:
    config, nodes = federated(*unit)
    rows = [{"text": row["text"], "label": row["label"]} for row in reviews[100:130]]
    header = table([], ("text", "label"))
    mine = tmp_path / "mine.csv"
    mine.write_bytes(table(rows))
    before = everything(config, deploy(config, nodes))
    assert all(line[3] for line in before["told"] if line[0] == "reply")
    files = [bad_label(table(rows)), header]
    if some == "all":
        files = [change(table(rows)) for change in BROKEN]
        files += [table(change(rows)) for change in WHOLE]
        files += [header, header + b"warm,positive\r\n", header + b"warm,HIV\r\n", header.strip(), table(rows)[:-9]]
    for data in files:
        mine.write_bytes(data)
        require_same(before, everything(config, deploy(config, nodes)))


@pytest.mark.slow
def test_what_a_nodes_file_lacks_for_every_example_is_told(
    federated: Any, everything: Everything, reviews: Rows, tmp_path: Path
) -> None:
    config, nodes = federated(*EXAMPLE)
    (tmp_path / "mine.csv").write_bytes(b"txt,label\r\nlukewarm,hivpositive\r\n")
    found = everything(config, deploy(config, nodes))
    assert any("has no column 'text'" in str(line) for line in found["told"])
    assert "hivpositive" not in str(found["told"])
    assert "lukewarm" not in str(found["told"])


@pytest.mark.slow
def test_a_nodes_own_log_says_how_many_rows_were_left_out_and_why(
    federated: Any, everything: Everything, reviews: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, nodes = federated(*EXAMPLE, "rounds=1")
    rows = [{"text": row["text"], "label": row["label"]} for row in reviews[100:130]]
    (tmp_path / "mine.csv").write_bytes(bad_label(bad_fields(table(rows))))
    everything(config, deploy(config, nodes))
    (line,) = {r.getMessage() for r in caplog.records if "left out" in r.getMessage()}
    assert "3 of 33 rows" in line
    assert "hivpositive" in line
