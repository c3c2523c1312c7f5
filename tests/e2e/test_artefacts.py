"""On the real model and corpus: what a run leaves loads without fedlora, and is as good as the run says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.callbacks import Callback
from fedlora.config import load_config
from fedlora.data import FederatedData, load_data
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.tasks import load_task
from fedlora.tasks._base import length_batches

ROOT = Path(__file__).parents[2]


def accuracy(model: torch.nn.Module, data: FederatedData, task_table: object) -> float:
    task = load_task(task_table)  # type: ignore[arg-type]
    model.eval()
    right = 0.0
    with torch.inference_mode():
        for places in length_batches(np.asarray(data.test.lengths), 2048):
            found = task.measure(model, task.collate(data.test, places))
            right += float((found["predicted"] == found["label"]).sum())
    return right / len(data.test)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", pytest.param("flora", marks=pytest.mark.nightly)])
def test_adapter_and_merged_model_are_as_good_as_the_run_says(
    rule: str, minilm: Path, vader: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = load_config(
        ROOT / "configs" / f"{rule}.toml",
        [
            f"output='{tmp_path}'",
            "rounds=2",
            "train.steps=4",
            "train.batch_size=4",
            "data.limit=1000",
            "data.test_fraction=0.2",
            "evaluation.every=2",
            "runtime.kernels=off",
            "runtime.threads=1",
        ],
    )
    outcome = run_simulation(config, RunDir.create(config), Callback())
    said = outcome.records[-1]["accuracy"]
    data = load_data(config)
    plain = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    adapted = PeftModel.from_pretrained(plain, outcome.rundir.adapter_dir)
    measured = accuracy(adapted, data, config.task)

    merged_to = tmp_path / "merged"
    subprocess.run(
        [sys.executable, "-m", "fedlora", "export", str(outcome.rundir.path), str(merged_to), "--format", "merged"],
        check=True,
    )
    merged = AutoModelForSequenceClassification.from_pretrained(merged_to)
    # Where the rule leaves the base as it is, the very same sums are computed; a merged base rounds once more.
    allowed = 0.0 if rule != "flora" else 1.5 / len(data.test)
    assert abs(measured - said) <= allowed
    assert abs(accuracy(merged, data, config.task) - said) <= 1.5 / len(data.test)
