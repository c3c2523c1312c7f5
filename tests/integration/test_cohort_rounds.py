"""A run comes to the same whether its clients train one by one or together, whatever rule, task and privacy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from support.states import gap
from support.tiny_federations import MakeConfig

from fedlora.aggregators import Claim, names_claiming, rules
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.federation.run import RunOutcome
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training import loop as together


def run(config: RunConfig) -> RunOutcome:
    return run_simulation(config, RunDir.create(config, overwrite=True), Callback())


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clients took each step."""
    seen: list[int] = []
    real = together.Loop._step

    def step(self: together.Loop, members: list[together.Client]) -> None:
        seen.append(len(members))
        real(self, members)

    monkeypatch.setattr(together.Loop, "_step", step)
    return seen


PRIVACY = {
    "none": ["train.clip_norm=1.0"],
    "example": [
        "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}",
        "server.weighting=uniform",
    ],
    "client": ["privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}"],
}
TEXTS = "text-classification"


def matrix() -> list[object]:
    """Rule, task, privacy; user-level privacy is for rules that need sums alone.

    A rule sees updates, not who trained beside whom: beyond four rules the matrix is nightly. So are two thirds of
    theirs: any rule meets any task and any privacy in the others, and any task any privacy.
    """
    linear, often = names_claiming(Claim.LINEAR), ("fedavg", "ffa", "flora", "fair")
    every_task, units = (TEXTS, "causal-lm", "image-classification"), tuple(PRIVACY)

    def is_often(rule: str, task: str, privacy: str) -> bool:
        return rule in often and (often.index(rule) + every_task.index(task) + units.index(privacy)) % 3 == 0

    return [
        pytest.param(*case, marks=() if is_often(*case) else pytest.mark.nightly)
        for case in product(sorted(rules), every_task, units)
        if (case[2] != "client" or case[0] in linear)
        and case[:2] not in product(("fedper", "fedrep", "keep"), ("causal-lm",))  # where there is no head to be kept
        and (case[0], case[2]) not in product(("afl", "fedrep", "qfedavg"), ("example",))  # refused
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "task", "privacy"), matrix())
def test_company_changes_nothing(
    tiny_config: MakeConfig,
    sizes: list[int],
    tasks: dict[str, list[str]],
    same_secrets: Callable[[], None],
    rule: str,
    task: str,
    privacy: str,
) -> None:
    hidden = ["server.aggregation_error=false"] if privacy != "none" else []
    common = [f"strategy.name={rule}", "model.dtype=float64", "rounds=2", *tasks[task], *PRIVACY[privacy], *hidden]
    if privacy == "none" and Claim.PERSONAL in rules.get(rule).claims:
        common += ["evaluation.on=clients"]
    if rule == "scaffold":
        common += ["train.optimizer=sgd", "train.clip_norm="]

    def seen(*overrides: str, name: str) -> RunOutcome:
        same_secrets()
        sizes.clear()
        return run(tiny_config(*common, *overrides, name=name))

    one = seen("runtime.cohort=1", name="one")
    assert set(sizes) == {1}
    all_at_once = seen(name="all")
    assert max(sizes) > 1
    for other in (all_at_once, seen("runtime.cohort=3", name="three")):
        assert gap(one.adapter, other.adapter) < 1e-9
        for first, second in zip(one.records[1:], other.records[1:], strict=True):
            if privacy == "none":  # the others tell no loss
                assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-9)
            for key in ("bytes_up", "bytes_down", "asked", "answered", "refused"):
                assert second[key] == first[key]


def test_the_size_of_the_cohort_is_recorded_and_kept(tiny_config: MakeConfig) -> None:
    outcome = run(tiny_config("rounds=1"))
    facts = outcome.rundir.read_json("environment.json")
    assert facts["cohort"] == 4
    assert "tokens a client, passes of" in facts["cohort_why"]
    outcome.rundir.note_environment(cohort=2)
    run_simulation(tiny_config("rounds=2"), outcome.rundir, Callback(), resume=True)
    again = outcome.rundir.read_json("environment.json")
    assert (again["cohort"], again["cohort_why"]) == (2, "asked for")
