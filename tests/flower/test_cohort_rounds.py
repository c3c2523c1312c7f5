"""A run comes to the same whether its clients train one by one or together, whatever the rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedlora.adapter import AdapterState
from fedlora.aggregators import rules
from fedlora.config import RunConfig
from fedlora.flower import run_local
from fedlora.flower.server_app import RunOutcome
from fedlora.progress import NoProgress
from fedlora.rundir import RunDir
from fedlora.training import together

MakeConfig = Callable[..., RunConfig]


def run(config: RunConfig) -> RunOutcome:
    return run_local(config, RunDir.create(config, overwrite=True), NoProgress())


def gap(one: AdapterState, other: AdapterState) -> float:
    two = other.tensors()
    return max(float((value - two[name]).abs().max()) for name, value in one.tensors().items())


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients took each step."""
    seen: list[int] = []
    real = together.Together._step

    def step(self: together.Together, members: list[together.Client]) -> None:
        seen.append(len(members))
        real(self, members)

    monkeypatch.setattr(together.Together, "_step", step)
    return seen


@pytest.mark.parametrize("rule", sorted(rules()))
def test_every_rule_takes_clients_together(tiny_config: MakeConfig, rule: str, sizes: list[int]) -> None:
    common = [f"strategy.name={rule}", "model.dtype=float64", "rounds=2", "train.clip_norm=1.0"]
    one = run(tiny_config(*common, "runtime.cohort=1", name="one"))
    assert set(sizes) == {1}
    sizes.clear()
    all_at_once = run(tiny_config(*common, name="all"))
    assert max(sizes) > 1
    for other in (all_at_once, run(tiny_config(*common, "runtime.cohort=3", name="three"))):
        assert gap(one.adapter, other.adapter) < 1e-9
        for first, second in zip(one.records[1:], other.records[1:], strict=True):
            assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-9)
            for key in ("bytes_up", "bytes_down", "asked", "answered", "refused"):
                assert second[key] == first[key]


def test_the_size_of_the_cohort_is_recorded_and_kept(tiny_config: MakeConfig) -> None:
    outcome = run(tiny_config("rounds=1"))
    facts = outcome.rundir.read_json("environment.json")
    assert facts["cohort"] == 4
    assert "tokens in a step of" in facts["cohort_why"]
    outcome.rundir.note_environment(cohort=2)
    run_local(tiny_config("rounds=2"), outcome.rundir, NoProgress(), resume=True)
    again = outcome.rundir.read_json("environment.json")
    assert (again["cohort"], again["cohort_why"]) == (2, "asked for")
