"""Every pool of clients comes to the same: the adapter to the byte, and the record but for what a clock measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import pytest
from support.federations import deploy, simulate, timeless, weights

from fedlora.aggregators import Claim, names_claiming, rules
from fedlora.config import RunConfig
from fedlora.federation.run import RunOutcome

RULES = ("fedavg", "ffa", "flora", "fair")
WIRES = ("float32", "int8")
PRIVACY = {
    "none": [],
    "example": [
        "privacy={unit='example', noise_multiplier=1.0, delta=1e-3, max_grad_norm=0.5, public_examples=40}",
        "server.weighting=uniform",
    ],
    "client": [
        "privacy={unit='client', noise_multiplier=1.0, delta=1e-3, clip_norm=0.1}",
        "server.aggregation_error=false",
    ],
}
TASKS = ("text-classification", "causal-lm")
Case = tuple[str, ...]
"""Rule, wire, privacy and task."""

QUICK = ("fedavg", "int8", "example", TASKS[0])


def cases(units: Iterable[str] = PRIVACY) -> list[object]:
    """Rule, wire, privacy, task; user-level privacy is for rules that need sums alone.

    One is quick, a third is slow, in which any two values of two of the four meet, and the others are nightly.
    """
    alternatives: tuple[Sequence[str], ...] = (RULES, WIRES, tuple(PRIVACY), TASKS)

    def tier(case: Case) -> tuple[pytest.MarkDecorator, ...]:
        if case == QUICK:
            return ()
        places = [values.index(value) for values, value in zip(alternatives, case, strict=True)]
        return (pytest.mark.nightly if sum(places) % 3 else pytest.mark.slow,)

    return [
        pytest.param(*case, marks=tier(case))
        for case in product(RULES, WIRES, units, TASKS)
        if case[2] != "client" or case[0] in ("fedavg", "ffa")
    ]


@pytest.fixture
def make(tiny_config: Callable[..., RunConfig], tasks: dict[str, list[str]]) -> Callable[..., RunConfig]:
    def made(rule: str, wire: str, privacy: str, task: str, name: str, *more: str) -> RunConfig:
        keys = [f"strategy.name={rule}", f"wire.up={wire}", *PRIVACY[privacy], *tasks[task], *more]
        alike = ["rounds=2", "train.steps=2", "runtime.cohort=1", "runtime.prefix_cache=off"]
        return tiny_config(*alike, *keys, name=name)

    return made


def require_same(one: RunOutcome, other: RunOutcome) -> None:
    assert weights(one) == weights(other)
    for mine, theirs in zip(timeless(one.records), timeless(other.records), strict=True):
        assert mine == theirs


@pytest.mark.parametrize(("rule", "wire", "privacy", "task"), cases())
def test_clients_on_a_grid_come_to_what_clients_here_do(
    make: Callable[..., RunConfig], same_secrets: Callable[[], None], rule: str, wire: str, privacy: str, task: str
) -> None:
    same_secrets()
    here = simulate(make(rule, wire, privacy, task, "here"))
    same_secrets()
    config = make(rule, wire, privacy, task, "grid")
    ledgers = here.rundir.path.parent / "ledgers" if privacy == "example" else None
    require_same(here, deploy(config, ledgers=ledgers))


@pytest.mark.nightly
@pytest.mark.parametrize(("rule", "wire", "privacy", "task"), cases(("none", "client")))
def test_clients_in_two_processes_come_to_what_clients_here_do(
    make: Callable[..., RunConfig], same_secrets: Callable[[], None], rule: str, wire: str, privacy: str, task: str
) -> None:
    """Under example-level privacy each process draws noise of its own, which nobody can repeat.

    The aggregation error is read off sums that each process keeps, so that its terms are added in another order.
    """
    same_secrets()
    here = simulate(make(rule, wire, privacy, task, "here"))
    same_secrets()
    two = simulate(make(rule, wire, privacy, task, "two", "runtime.processes=2"))
    assert two.rundir.read_json("environment.json")["processes"] == 2
    for mine, theirs in zip(here.records, two.records, strict=True):
        if "aggregation_error" in mine:
            assert theirs.pop("aggregation_error") == pytest.approx(mine.pop("aggregation_error"), rel=1e-12, abs=1e-14)
    require_same(here, two)


def all_rules() -> list[object]:
    """Every rule with its own fields, and rules around rules; all but one are nightly."""
    alone = [pytest.param(name, marks=() if name == "flora" else pytest.mark.nightly, id=name) for name in rules]
    around = [
        "{name='krum', keep=0.5, inner={name='flora'}}",
        "{name='fedadam', inner={name='ffa'}}",
        "{name='median', inner={name='rolora'}}",
    ]
    return [*alone, *(pytest.param(table, marks=pytest.mark.nightly) for table in around)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", all_rules())
def test_every_rule_comes_to_the_same_in_one_process_and_in_two(make: Callable[..., RunConfig], rule: str) -> None:
    table = rule if rule.startswith("{") else f"{{name='{rule}'}}"
    runs = []
    for name, more in (("one", ()), ("two", ("runtime.processes=2",))):
        at_clients = ("evaluation.on=clients",) if rule in names_claiming(Claim.PERSONAL) else ()
        by_sgd = ("train.optimizer=sgd",) if rule == "scaffold" else ()
        keys = ("rounds=3", *at_clients, *by_sgd, f"strategy={table}", *more)
        outcome = simulate(make("fedavg", "float32", "none", TASKS[0], name, *keys))
        assert [record["answered"] for record in outcome.records[1:]] == [[0, 1, 2, 3]] * 3
        runs.append(outcome)
    for mine, theirs in zip(*(outcome.records for outcome in runs), strict=True):
        if "aggregation_error" in mine:
            assert theirs.pop("aggregation_error") == pytest.approx(mine.pop("aggregation_error"), rel=1e-9, abs=1e-12)
    require_same(*runs)


@pytest.mark.slow
def test_the_comparison_sees_another_run(make: Callable[..., RunConfig]) -> None:
    one, other = (make("fedavg", "float32", "none", TASKS[0], name) for name in ("one", "other"))
    here = simulate(one)
    with pytest.raises(AssertionError):
        require_same(here, deploy(other.model_copy(update={"seed": 1})))
