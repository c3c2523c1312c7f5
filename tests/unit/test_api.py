"""The Python entry point does what the command line does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import invoke, succeeds
from support.errors import raises

import fedlora
from fedlora.api import resolve_config

NAMES = {
    *(
        "AdapterState",
        "Aggregator",
        "Callback",
        "Claim",
        "ClientPlan",
        "ClientUpdate",
        "FedloraError",
        "GlobalState",
        "LoraPair",
    ),
    *("Run", "RunConfig", "evaluate", "load_config", "load_run", "partition_table", "run"),
}


def test_the_exported_names_are_these_and_are_there() -> None:
    assert set(fedlora.__all__) == NAMES <= set(dir(fedlora))
    assert all(getattr(fedlora, name).__name__ == name for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedlora.nothing  # type: ignore[attr-defined]


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "import sys, fedlora; print([m for m in ('torch', 'transformers', 'flwr', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_run_is_the_command_lines_run(tiny_toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = fedlora.run(tiny_toml, name="mine", rounds=1, train={"lr": 0.01}, quiet=True)
    assert capsys.readouterr().out == ""
    words = ["run", str(tiny_toml), "--set", "name=theirs", "--set", "rounds=1", "--set", "train.lr=0.01", "-q"]
    succeeds(*words)
    theirs = fedlora.load_run(mine.path.parent / "theirs")
    assert mine.finished
    assert mine.config.train.lr == 0.01
    same = ["accuracy", "loss", "train_loss", "bytes_up"]
    assert mine.metrics[same].equals(theirs.metrics[same])
    assert (mine.adapter / "adapter_model.safetensors").read_bytes() == (
        theirs.adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert mine.report.is_file()
    assert (mine.path / "accuracy.png").is_file()
    assert mine.result["rounds"] == 1


@pytest.mark.slow
def test_what_a_run_left_is_looked_at_and_used(tiny_toml: Path) -> None:
    run = fedlora.run(tiny_toml, quiet=True)
    metrics = run.metrics
    assert metrics.index.tolist() == [0, 1, 2]
    assert {"accuracy", "domains.films.accuracy", "train_loss"} <= set(metrics.columns)
    assert "accuracy" in run._repr_html_()
    table = fedlora.evaluate(run)
    assert table.loc["all", "accuracy"] == pytest.approx(metrics["accuracy"].iloc[-1])
    assert table.loc["films", "examples"] + table.loc["phones", "examples"] == table.loc["all", "examples"]
    model = run.model()
    assert type(model).__name__.startswith("PeftModel")
    assert not model.training
    inputs = {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    assert model(**inputs).logits.shape == (1, 2)


@pytest.mark.slow
def test_the_partition_is_the_one_that_a_run_has(tiny_toml: Path) -> None:
    two = {"name": "dirichlet", "clients": 3, "alpha": 0.3}
    table = fedlora.partition_table(tiny_toml, partition=two)
    run = fedlora.run(tiny_toml, partition=two, rounds=1, quiet=True)
    facts = json.loads((run.path / "partition.json").read_text())
    assert table.index.name == "client"
    assert table["examples"].tolist() == facts["sizes"]
    counts = table[[f"labels.{label}" for label in ("negative", "positive")]]
    assert counts.to_numpy().tolist() == facts["label_counts"]
    assert counts.sum(axis=1).tolist() == facts["sizes"]
    assert table["label_entropy"].tolist() == facts["label_entropy"]
    assert set(table["domain"]) <= {"films", "phones"}
    with raises(fedlora.FedloraError, "unknown-key", "'alpha'"):
        fedlora.partition_table(tiny_toml, partition={"name": "iid", "alpha": 0.3})


def test_natural_clients_have_their_names_in_the_partition(tiny_toml: Path) -> None:
    table = fedlora.partition_table(tiny_toml, partition={"name": "natural", "column": "domain"})
    assert dict(zip(table["name"], table["examples"], strict=True)).keys() == {"films", "phones"}
    assert "domain" not in table  # the name says it


@pytest.mark.slow
def test_a_run_is_gone_on_with(tiny_toml: Path) -> None:
    fedlora.run(tiny_toml, rounds=1, quiet=True)
    with raises(fedlora.FedloraError, "run-exists", "--overwrite"):
        fedlora.run(tiny_toml, rounds=2, quiet=True)
    longer = fedlora.run(tiny_toml, rounds=2, resume=True, quiet=True)
    whole = fedlora.run(tiny_toml, name="whole", quiet=True)
    assert longer.metrics["accuracy"].tolist() == whole.metrics["accuracy"].tolist()
    config = fedlora.load_config(tiny_toml, ["name=again", "rounds=1"])
    assert fedlora.run(config, strategy={"name": "ffa"}, quiet=True).config.strategy.name == "ffa"


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"round": 2}, "unknown-key", "'rounds'"),
        ({"train": {"lrr": 0.1}}, "unknown-key", "'lr'"),
        ({"rounds": None}, "bad-value", "rounds cannot be None: leave it out, or give its default, 10"),
        ({"train": {"lr": None}}, "bad-value", "train.lr cannot be None: leave it out, or give its default, 0.001"),
        ({"strategy": {"name": "fedavgg"}}, "unknown-name", "'fedavg'"),
        ({"strategy": {"name": "fedprox"}}, "unknown-name", "FedProx is train.proximal_mu, with any rule"),
        ({"callbacks": [print]}, "bad-object", "fedlora.Callback"),
        ({"callbacks": [fedlora.Callback]}, "bad-object", "fedlora.Callback"),
        ({"callbacks": fedlora.Callback()}, "bad-object", "list of instances"),
    ],
)
def test_a_wrong_key_is_one_line(tiny_toml: Path, changes: dict[str, object], code: str, named: str) -> None:
    with raises(fedlora.FedloraError, code, named):
        fedlora.run(tiny_toml, quiet=True, **changes)
    assert not (tiny_toml.parent / "runs").exists()


@pytest.mark.parametrize("config", [None, {"rounds": 2}, ["quickstart"]])
def test_what_is_no_config_is_one_line(config: Any) -> None:
    with raises(fedlora.FedloraError, "bad-object", f"config is a {type(config).__name__}", "keyword arguments"):
        fedlora.run(config, rounds=1)


def test_the_command_line_says_its_version() -> None:
    done = invoke("--version")
    assert (done.exit_code, done.stdout) == (0, f"fedlora {fedlora.__version__}\n")


@pytest.mark.slow
def test_callbacks_are_told_what_happens_when_it_is_on_the_disk(tiny_toml: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Sees(fedlora.Callback):
        def started(self, config: fedlora.RunConfig, clients: int, rounds: int) -> None:
            seen.append(("started", clients))
            self.metrics = Path(config.output) / config.name / "metrics.jsonl"

        def round_started(self, number: int, asked: Sequence[int]) -> None:
            seen.append(("asked", len(asked)))

        def state_reached(self, state: fedlora.GlobalState) -> None:
            seen.append(("state", state.round))

        def round_ended(self, record: Mapping[str, Any]) -> None:
            seen.append(("lines", len(self.metrics.read_text().splitlines())))

        def ended(self, state: fedlora.GlobalState) -> None:
            seen.append(("ended", state.round))

    fedlora.run(tiny_toml, callbacks=[Sees()], quiet=True)
    assert seen == [
        *(("started", 4), ("state", 0), ("lines", 1), ("asked", 4), ("state", 1), ("lines", 2)),
        *(("asked", 4), ("state", 2), ("lines", 3), ("ended", 2)),
    ]


def test_a_text_that_is_set_keeps_its_spaces(tiny_toml: Path) -> None:
    labels = ["a  b", "c\n\td", "e"]
    found = resolve_config(tiny_toml, {"task": {"name": "text-classification", "labels": labels}})
    assert found.task.fields["labels"] == labels
