"""`fedlora evaluate`, on one real run."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from support.command_line import PLAIN, invoke, succeeds
from support.tiny import write_tiny_toml

import fedlora
from fedlora.fairness import fairness
from fedlora.runs.rundir import RunDir

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_csv: Path) -> Path:
    """Of a rule that changes the base, with clients of several ranks: the exported adapter has another rank."""
    folder = tmp_path_factory.mktemp("runs")
    changes = ["name=flora", "strategy.name=flora", "adapter.rank=4", "clients.ranks=[4, 2, 1]", "train.steps=4"]
    words = [word for change in (*changes, "train.lr=0.02") for word in ("--set", change)]
    succeeds("run", write_tiny_toml(folder, tiny_bert, tiny_csv), "--quiet", *words)
    return folder / "runs" / "flora"


@pytest.fixture
def cli() -> Cli:
    def call(*words: object) -> Result:
        return invoke("evaluate", *words, env=PLAIN)

    return call


def rows(result: Result) -> list[dict[str, str]]:
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(io.StringIO(result.stdout.split("\n\n")[0])))


@pytest.mark.slow
def test_the_runs_own_test_set_gives_the_runs_own_figures(run: Path, cli: Cli) -> None:
    last = RunDir.open(run).read_metrics()[-1]
    found = {row["domain"]: row for row in rows(cli(run, "--format", "csv"))}
    assert float(found["all"]["accuracy"]) == pytest.approx(last["accuracy"])
    assert float(found["all"]["loss"]) == pytest.approx(last["loss"], rel=1e-5)
    for name, figures in last["domains"].items():
        assert float(found[name]["accuracy"]) == pytest.approx(figures["accuracy"])
    assert sum(int(found[name]["examples"]) for name in last["domains"]) == int(found["all"]["examples"])


@pytest.mark.slow
def test_an_adapter_without_its_run_says_the_same_of_a_file(
    run: Path, cli: Cli, tiny_csv: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    domain = ("--set", "data.domain=domain")
    with_run = rows(cli(run, "--data", tiny_csv, "--format", "csv"))
    assert rows(cli(alone, "--data", tiny_csv, *domain, "--format", "csv")) == with_run  # task and classes beside it
    assert rows(cli(run / "adapter", "--data", tiny_csv, "--format", "csv")) == with_run
    (alone / "fedlora.json").unlink()  # as another program leaves it
    told = ("--set", "task.labels=['negative','positive']")
    assert rows(cli(alone, "--data", tiny_csv, *domain, *told, "--format", "csv")) == with_run
    lines = tiny_csv.read_text().splitlines()
    few = tmp_path / "few.csv"  # one class and no domain: a node's file may be like that
    few.write_text("\n".join(line.rsplit(",", 2)[0] for line in lines if ",negative," in line or line is lines[0]))
    (row,) = rows(cli(run, "--data", few, "--format", "csv"))
    assert int(row["examples"]) == sum(",negative," in line for line in lines)


def test_clients_are_measured_one_by_one(run: Path, cli: Cli) -> None:
    result = cli(run, "--clients", "--format", "csv")
    found = rows(result)
    assert [row["client"] for row in found] == ["0", "1", "2", "3"]
    sizes = json.loads((run / "partition.json").read_text())["sizes"]
    assert [int(row["examples"]) for row in found] == sizes
    spread = fairness([float(row["accuracy"]) for row in found])
    (over,) = csv.DictReader(io.StringIO(result.stdout.split("\n\n")[1]))
    assert float(over["worst client"]) == spread.worst
    assert float(over["Gini"]) == spread.gini
    few = rows(cli(run, "--clients", "--examples", 3, "--format", "csv"))
    assert {row["examples"] for row in few} == {"3"}


@pytest.mark.slow
def test_clients_that_have_names_stand_by_them(tiny_toml: Path, cli: Cli) -> None:
    natural = {"name": "natural", "column": "domain"}
    named = fedlora.run(tiny_toml, name="named", partition=natural, rounds=1, quiet=True)
    found = rows(cli(named.path, "--clients", "--format", "csv"))
    assert [row["client"] for row in found] == ["films", "phones"]
    assert "domain" not in found[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--examples", "3"], "--clients"),
        (["RUN", "--clients", "--data", "x.csv"], "--data"),
        (["RUN", "--data", "x.csv"], "'x.csv'"),
        (["RUN", "--format", "html"], "'html'"),
        (["ALONE"], "--data"),
        (["ALONE", "--clients"], "--clients"),
        (["OTHERS", "--data", "CSV"], "task.labels"),
        (["ALONE", "--data", "CSV", "--set", "model={dtype='float64'}"], "add name, or set single keys"),
        (["CSV"], "neither a run nor an adapter"),
    ],
)
def test_a_mistake_is_said_in_one_line(
    run: Path, cli: Cli, tiny_csv: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"RUN": run, "CSV": tiny_csv, "ALONE": tmp_path / "alone", "OTHERS": tmp_path / "others"}
    for name in ("ALONE", "OTHERS"):
        shutil.copytree(run / "adapter", places[name])
    (places["OTHERS"] / "fedlora.json").unlink()
    result = cli(*(places.get(word, word) for word in words))
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_adapter_for_another_base_is_refused(run: Path, cli: Cli, tiny_csv: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run / "adapter", tmp_path / "other")
    facts = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**facts, "target_modules": ["no_such_layer"]}))
    result = cli(other, "--data", tiny_csv, "--set", "task.labels=['negative','positive']")
    assert result.exit_code == 1
    assert "does not fit" in result.stderr
    facts["task_type"] = None
    (other / "adapter_config.json").write_text(json.dumps(facts))
    said = json.loads((other / "fedlora.json").read_text())
    for task in ({"name": "my_module:MyTask"}, None):  # of which no code is loaded, and another program's
        (other / "fedlora.json").write_text(json.dumps({**said, "task": task}))
        assert "set task.name" in cli(other, "--data", tiny_csv).stderr


def test_the_spectrum_is_that_of_the_adapters_own_factors(run: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from fedlora.spectrum import effective_rank

    result = invoke("spectrum", run, "--format", "csv")
    found = {row["layer"]: row for row in rows(result)}
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    facts = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert len(found) == 4  # query and value of two layers
    for name, row in found.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert facts["rank_pattern"] == {}
        update = facts["lora_alpha"] / facts["r"] * B @ A
        assert float(row["effective rank"]) == pytest.approx(effective_rank(torch.linalg.svdvals(update)), rel=1e-6)
        assert float(row["|D| / |W0|"]) > 0
        assert 0 <= int(row["new of the first 10"]) <= 10
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    assert invoke("spectrum", alone, "--format", "csv").stdout == result.stdout
    (alone / "fedlora.json").unlink()
    assert "name them in task.labels" in invoke("spectrum", alone).stderr
    told = invoke("spectrum", alone, "--set", "task.labels=['no','yes']", "--format", "csv")
    assert told.stdout == result.stdout
    assert "--epsilon 2" in invoke("spectrum", run, "--epsilon", "2").stderr
