"""A federation goes on from an adapter in PEFT's format: what another one left, or plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.errors import raises
from support.federations import simulate as run

from fedlora.config import RunConfig
from fedlora.errors import FedloraError, ModelError, RuleError
from fedlora.federation.run import RunOutcome
from fedlora.simulation.run import refuse_early
from fedlora.training.workspace import open_workspace

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def first(tiny_config: MakeConfig) -> RunOutcome:
    """A run that has learnt something."""
    return run(tiny_config("rounds=2", name="first"))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", "ffa", "fedex", "flora"])
def test_a_run_begins_where_the_other_ended(rule: str, first: RunOutcome, tiny_config: MakeConfig) -> None:
    start = f"adapter.start='{first.rundir.adapter_dir}'"
    second = run(tiny_config(start, "rounds=1", f"strategy.name={rule}", name=rule))
    before, after = first.records[-1], second.records[0]
    assert (after["accuracy"], after["loss"]) == (before["accuracy"], pytest.approx(before["loss"], rel=1e-6))
    assert before["loss"] < first.records[0]["loss"] - 0.01, "and not where it began"
    if rule == "ffa":  # whose A nobody trains
        for name, value in first.adapter.tensors(("A",)).items():
            assert torch.equal(second.adapter.tensors()[name], value)


@pytest.mark.slow
def test_what_is_no_start_is_refused(first: RunOutcome, tiny_config: MakeConfig, tmp_path: Path) -> None:
    folder = first.rundir.adapter_dir
    wrong: dict[str, tuple[type[FedloraError], str, str, str]] = {
        "adapter.rank=3": (ModelError, str(folder), "shape-mismatch", "set adapter.rank"),
        "adapter.alpha=3.5": (ModelError, str(folder), "shape-mismatch", "scale"),
        "adapter.method=pissa": (ModelError, str(folder), "two-starts", "remove adapter.start"),
        "adapter.targets=['key']": (ModelError, str(folder), "tensors-missing", "key"),
        "strategy.name=fedsb": (RuleError, str(folder), "rule-method-mismatch", "remove adapter.start"),
        "rounds=1": (ModelError, str(tmp_path), "adapter-not-loadable", str(tmp_path)),
    }
    for key, (kind, start, code, word) in wrong.items():
        config = tiny_config(f"adapter.start='{start}'", key, name="wrong")
        with raises(kind, code, word):
            refuse_early(config, open_workspace(config))
