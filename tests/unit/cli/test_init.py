from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import invoke, succeeds

from fedlora.adapter import AdapterState, PairShape, fresh_pairs
from fedlora.aggregators import ClientUpdate, load_aggregator
from fedlora.config import load_config
from fedlora.testing import broken_laws


@pytest.fixture
def project(tmp_path: Path) -> Path:
    succeeds("init", tmp_path / "mine")
    return tmp_path / "mine"


def test_it_writes_a_project_and_says_what(project: Path) -> None:
    names = {path.name for path in project.iterdir()}
    assert names == {"README.md", "config.toml", "my_rule.py", "test_my_rule.py", "texts.csv"}


def test_it_touches_nothing_that_is_there(project: Path) -> None:
    (project / "config.toml").write_text("mine")
    done = invoke("init", project)
    assert done.exit_code == 1
    assert str(project) in done.stderr
    assert (project / "config.toml").read_text() == "mine"


def test_its_texts_are_balanced(project: Path) -> None:
    with (project / "texts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120
    assert set(Counter((row["domain"], row["label"]) for row in rows).values()) == {20}
    assert len({row["text"] for row in rows}) == 120


@pytest.fixture
def my_rule(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class of the rule that the project's config names."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = load_config("config.toml")
    yield type(load_aggregator(config.strategy.name, config.strategy.fields))
    del sys.modules["my_rule"]


def test_its_rule_obeys_every_law(my_rule: Any) -> None:
    assert broken_laws(my_rule()) == []
    # Only part of the way, what all clients agree on is not reached: the laws that say that it is.
    assert broken_laws(my_rule(step=0.25)) == [
        "test_dense_parts_are_averaged_as_themselves",
        "test_identical_updates_come_back_unchanged",
        "test_one_client_alone_gives_back_that_client",
    ]


def test_its_rule_at_step_one_is_fedavg_and_below_goes_part_of_the_way(my_rule: Any) -> None:
    layout = {"q": PairShape(4, 6, 2, 2.0)}
    start = AdapterState(fresh_pairs(layout, 0), {"head": torch.zeros(3)})
    there = AdapterState(fresh_pairs(layout, 1), {"head": torch.ones(3)})
    merged = {}
    for name, rule in (
        ("fedavg", load_aggregator("fedavg")),
        ("all", my_rule()),
        ("half", my_rule(step=0.5)),
    ):
        state = rule.init(start, seed=0)
        merged[name] = rule.aggregate(state, [ClientUpdate(0, there, 10, 0, {})]).adapter.tensors()
    for name, value in start.tensors().items():
        torch.testing.assert_close(merged["all"][name], merged["fedavg"][name])
        torch.testing.assert_close(merged["half"][name], (value + there.tensors()[name]) / 2)


@pytest.mark.nightly
def test_the_commands_of_its_readme_work(project: Path, minilm: Path) -> None:
    (block,) = re.findall(r"```\n(.*?)```", (project / "README.md").read_text(), flags=re.DOTALL)
    commands = [line.split("#")[0].split() for line in block.splitlines()]
    assert [words[0] for words in commands] == ["fedlora", "fedlora", "pytest"]
    path = str(Path(__file__).parents[3])
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=project,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "runs" / "first" / "report.html").is_file()
    records = (project / "runs" / "first" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 6


def test_the_shell_completes_commands_and_options() -> None:
    def complete(*words: str) -> list[str]:
        environment = os.environ | {
            "_FEDLORA_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("fedlora", *words)),
            "COMP_CWORD": str(len(words)),
        }
        code = "from fedlora.cli import app; app(prog_name='fedlora')"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return done.stdout.split()

    assert complete("re") == ["report"]
    assert complete("run", "--res") == ["--resume"]
