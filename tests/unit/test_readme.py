"""The files in configs/ and the sweep of docs/comparing.md are valid."""

from __future__ import annotations

import re
import shlex

import pytest
from support.pages import ROOT


def test_every_config_file_is_valid_and_opens_with_its_command() -> None:
    from fedlora.aggregators import load_aggregator
    from fedlora.config import load_config
    from fedlora.partition import load_partitioner
    from fedlora.tasks import load_task

    files = sorted((ROOT / "configs").glob("*.toml"))
    assert files
    for file in files:
        config = load_config(file)
        load_aggregator(config.strategy.name, config.strategy.fields)
        load_partitioner(config.partition.name, config.partition.fields)
        load_task(config.task)
        first = file.read_text().splitlines()[0]
        assert first.startswith("# fedlora "), file
        assert first.endswith(f"fedlora run configs/{file.name}"), file


def test_the_sweep_is_a_valid_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.command_line import succeeds

    import fedlora.sweep

    page = (ROOT / "docs" / "comparing.md").read_text()
    (command,) = re.findall(r"^fedlora sweep (?:\\\n|.)*", page, flags=re.MULTILINE)
    planned = []

    def plan(sweep: fedlora.sweep.Sweep, _watcher: object) -> fedlora.sweep.Outcome:
        chooses, reports = fedlora.sweep.plan(sweep)
        planned.append((len(chooses), len(reports), sweep.keep))
        return fedlora.sweep.Outcome({}, {})

    monkeypatch.setattr(fedlora.sweep, "run_sweep", plan)
    monkeypatch.chdir(ROOT)
    succeeds(*shlex.split(command.replace("\\\n", " "))[1:])
    assert planned == [(6, 30, "metrics")]  # of the 30, the 10 with a rule's best rate will be run
    assert "16 folders" in page
