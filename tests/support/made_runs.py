"""Folders of finished runs that nobody trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import parse_config
from fedlora.runs.outcomes import write_outcomes
from fedlora.runs.rundir import RunDir


def make_run(
    folder: Path,
    curve: Sequence[float],
    *overrides: str,
    metric: str = "accuracy",
    domains: Mapping[str, float] | None = None,
    correct: Sequence[float] | None = None,
    test: str = "the same",
    finished: bool = True,
    **more: Any,
) -> Path:
    """A run whose main figure took the values of `curve` after rounds 0, 1, ...; 100 bytes up and 50 down each round.

    Args:
        folder: of the run.
        curve: NaN for a round that was not evaluated.
        overrides: of the config.
        metric: name of the main figure.
        domains: the figure by domain after the last round.
        correct: outcomes of the test examples, 0 or 1.
        test: names the test examples.
        finished: whether it has a result.
        more: figures of each round.
    """
    config = parse_config("", [f"name={folder.name}", f"rounds={len(curve) - 1}", *overrides])
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    lines = []
    for number, value in enumerate(curve):
        line: dict[str, Any] = {"round": number}
        if not np.isnan(value):
            line |= {metric: value, "loss": 1 - value, "domains": {}}
        if number:
            line |= {"bytes_up": 100, "bytes_down": 50, "seconds": 2.0, **more}
        lines.append(line)
    lines[-1] |= {"domains": {name: {metric: value} for name, value in (domains or {}).items()}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunDir(folder, config)
    if correct is not None:
        values = np.asarray(correct, dtype=np.float64)
        label = np.arange(len(values)) % 2
        predicted = np.where(values > 0, label, 1 - label)
        measures = {"loss": 1 - values, "label": label, "predicted": predicted, "probabilities": np.eye(2)[predicted]}
        write_outcomes(folder, len(curve) - 1, test, measures)
    if finished:
        run.write_json("result.json", {"rounds": len(curve) - 1})
    return folder
