"""What the global model says to a few held-out prompts, before and after: the same ones, chosen by the seed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fedlora.assets import Checkpoint
from fedlora.rng import derive
from fedlora.runs.rundir import RunDir
from fedlora.training.workspace import Workspace

FILE = "samples.json"
NUMBER = 4


def write_samples(rundir: RunDir, workspace: Workspace, when: Literal["before", "after"]) -> None:
    """Let the model answer, and write it beside what it said at the other time; nothing for a task that says nothing.

    Args:
        rundir: gets `samples.json`: entries with "prompt", "reference", "before" and "after".
        workspace: with the test examples that are asked; the adapter last written to its base answers.
        when: before training or after it.
    """
    test, base = workspace.data.require_test(), workspace.base
    generator = np.random.default_rng(derive(workspace.config.seed, "samples"))
    chosen = np.sort(generator.permutation(len(test))[:NUMBER])
    base.train_mode(False)
    said = workspace.task.samples(base.model, test, chosen, Checkpoint.of(base.config))
    if not said:
        return
    known: list[dict[str, Any]] = rundir.read_json(FILE) or []
    rows = [{"prompt": sample.prompt, "reference": sample.reference, "before": "", "after": ""} for sample in said]
    for row, sample, old in zip(rows, said, known or rows, strict=True):
        row |= {"before": old["before"], "after": old["after"], when: sample.generated}
    rundir.write_json(FILE, rows)
