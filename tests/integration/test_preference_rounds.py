"""Preference tuning goes through the rounds as any task does: rules of all kinds, processes, privacy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_federations import WORDS

from fedlora.adapter import ALL_PARTS
from fedlora.config import parse_config
from fedlora.federation.client_store import divided
from fedlora.rng import derive
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.state_io import unflatten_state, unpack
from fedlora.training.cohort import train
from fedlora.training.job import TrainJob
from fedlora.training.workspace import open_workspace

pytestmark = pytest.mark.nightly


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Who is asked for a word prefers it once more to another one."""
    rows = [
        {"prompt": [{"role": "user", "content": word}],
         "chosen": [{"role": "assistant", "content": word}],
         "rejected": [{"role": "assistant", "content": WORDS[(n + 3) % len(WORDS)]}], "person": f"p{n % 3}"}
        for n, word in enumerate(WORDS * 12)
    ]  # fmt: skip
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def metrics(llama: Path, pairs: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    config = parse_config(
        "",
        [
            f"output='{folder / 'runs'}'",
            f"model.name='{llama}'",
            "adapter.rank=8",
            "adapter.targets=all-linear",
            f"data.source='{pairs}'",
            "data.test_fraction=0.25",
            "task={name='preference', beta=1.0}",
            "partition={name='natural', column='person'}",
            "train.steps=8",
            "train.lr=0.01",
            "runtime.threads=1",
            "rounds=3",
            *overrides,
        ],
    )
    rundir = RunDir.create(config)
    run_simulation(config, rundir)
    return rundir.read_metrics()


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "flora", "fedex", "median"])
def test_rules_of_all_kinds_teach_it(rule: str, tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    before, *_, after = metrics(tiny_llama, pairs, tmp_path, f"strategy.name={rule}")
    assert after["ranking_accuracy"] > before["ranking_accuracy"] + 0.2
    assert after["loss"] < before["loss"]


def test_the_reference_of_a_clients_own_model_is_the_shared_one(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    """Ditto: v's loss in round 2 refers to w as it was sent, and not to v's own start."""
    own = ("train.personal=0.5", "evaluation={on='clients', min_examples=1}", "train.steps=2", "rounds=2")
    metrics(tiny_llama, pairs, tmp_path, *own, "runtime.cohort=1", "runtime.prefix_cache=off")
    (path,) = (tmp_path / "runs").iterdir()
    run = RunDir.open(path)
    workspace, config = open_workspace(run.config), run.config
    kept = [
        divided(unpack(file.read_bytes())[0])[0]
        for file in sorted((path / "clients" / "client-1").glob("*.safetensors"))
    ]
    shared = unflatten_state(*unpack((path / "checkpoints" / "000001.safetensors").read_bytes()))
    start, on = shared.adapter, (workspace.base, workspace.task, workspace.data.train)
    job = TrainJob(
        start.with_tensors(kept[0]), ALL_PARTS, workspace.data.clients[1], derive(config.seed, "train", 2, 1),
        toward=start, round=2, rounds=2, client_id=1,
    )  # fmt: skip
    how = config.train.model_copy(update={"proximal_mu": 0.5})
    found = train(*on, job, how).adapter.tensors()
    assert all(torch.equal(found[name], value) for name, value in kept[1].items())
    other = train(*on, replace(job, toward=None), how).adapter.tensors()
    assert not all(torch.equal(other[name], value) for name, value in kept[1].items())


def test_pairs_can_be_private(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    private = "privacy={unit='example', noise_multiplier=1.0, delta=1e-4, max_grad_norm=1.0, public_examples=24}"
    found = metrics(tiny_llama, pairs, tmp_path, private, "server.weighting=uniform", "rounds=1")
    assert [line["round"] for line in found] == [0, 1]
    assert found[1]["ranking_accuracy"] is not None
