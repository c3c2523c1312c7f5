"""A causal language model's run shows what the model says before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig, parse_config
from fedlora.federation.generations import NUMBER
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation


@pytest.fixture
def echo(tiny_llama: Path, tiny_chat: Path, tmp_path: Path) -> Any:
    """A federation that learns to answer each word with itself."""

    def make(*overrides: str, name: str = "echo") -> RunConfig:
        return parse_config(
            "",
            [
                f"output='{tmp_path / 'runs'}'",
                f"model.name='{tiny_llama}'",
                "adapter.rank=16",
                "adapter.targets=all-linear",
                f"data.source='{tiny_chat}'",
                "data.test_fraction=0.2",
                "task={name='causal-lm', max_length=32}",
                "partition={name='natural', column='person'}",
                "train.steps=12",
                "train.lr=0.01",
                "runtime.threads=1",
                "runtime.kernels=off",
                "rounds=6",
                *overrides,
            ],
            name=name,
        )

    return make


def said(rundir: RunDir) -> list[dict[str, str]]:
    found: list[dict[str, str]] = rundir.read_json("samples.json")
    return found


@pytest.mark.slow
def test_the_same_prompts_before_and_after(echo: Any) -> None:
    config = echo()
    rundir = RunDir.create(config)
    run_simulation(config, rundir)
    rows = said(rundir)
    assert len(rows) == NUMBER
    assert all(row["prompt"] == f"you : {row['reference'].split()[0]} <end> me :" for row in rows)

    def right(when: str) -> int:
        return sum(row[when].split()[:1] == row["reference"].split()[:1] for row in rows)

    assert right("after") > right("before")


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_said_before(echo: Any) -> None:
    whole = RunDir.create(echo(name="whole"))
    run_simulation(echo(name="whole"), whole)
    rundir = RunDir.create(echo("rounds=3", name="cut"))
    run_simulation(echo("rounds=3", name="cut"), rundir)
    between = said(rundir)
    longer = echo(name="cut")
    run_simulation(longer, RunDir.open(rundir.path, longer), resume=True)
    assert said(rundir) == said(whole)
    assert [row["before"] for row in between] == [row["before"] for row in said(whole)]


def test_a_classifier_says_nothing(tiny_config: Any) -> None:
    config = tiny_config("rounds=1")
    rundir = RunDir.create(config)
    run_simulation(config, rundir)
    assert rundir.read_json("samples.json") is None
