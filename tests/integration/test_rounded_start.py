"""`[wire] down`: clients start from rounded values, and the server's own are not rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from support.errors import raises
from support.federations import deploy, simulate, timeless, weights
from support.interrupted import cut_and_resumed
from support.tiny_federations import MakeConfig
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientPlan, GlobalState, load_aggregator
from fedlora.callbacks import Callback
from fedlora.config import WireConfig
from fedlora.errors import ConfigError
from fedlora.evaluation.traffic import measure_traffic
from fedlora.federation import client_training
from fedlora.federation.client_pool import ClientInfo, RoundRequest
from fedlora.federation.initial_state import first_state
from fedlora.federation.load_rule import load_rule
from fedlora.federation.planner import Held, Planner
from fedlora.federation.protocol import TrainRequest
from fedlora.training.job import TrainJob
from fedlora.training.workspace import open_workspace
from fedlora.wire_formats import as_sent

DOWN = ("wire.down=int8", "runtime.cohort=1", "runtime.prefix_cache=off", "train.steps=2")
ROUNDED = ("bfloat16", "int8")


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def sent(state: AdapterState, wire: str) -> dict[str, Tensor]:
    return {name: as_sent(wire, value) for name, value in state.tensors().items()}


# ------------------------------------------------------------------------------------------------ one round


def request(own: AdapterState, down: str, up: str = "float32") -> TrainRequest:
    plan = ClientPlan(own.with_tensors(sent(own, down)))
    return TrainRequest(plan, 1, 0, wire=up, down=down, exact=own)


@pytest.mark.parametrize("up", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("down", ROUNDED)
def test_steps_that_rounding_would_swallow_add_up_in_the_servers_own_values(down: str, up: str) -> None:
    first = AdapterState({}, {"w": torch.linspace(0.5, 1.0, 60).reshape(2, 30)})
    own, naive = first, first.tensors()
    for _ in range(40):
        asked = request(own, down, up)
        own = asked.updated(asked.as_received({"w": asked.starts["w"] + 1e-4}, 0))
        naive = {"w": as_sent(down, naive["w"]) + 1e-4}
    torch.testing.assert_close(own.dense["w"], first.dense["w"] + 40e-4, rtol=0, atol=1e-5)
    assert float((naive["w"] - first.dense["w"]).mean()) < 10e-4, "or these steps were none that rounding swallows"


def test_what_a_client_did_not_change_stays_as_the_server_has_it() -> None:
    own = AdapterState({}, {"w": torch.randn(4, 9), "v": torch.randn(7)})
    asked = request(own, "int8", "int8")
    assert not torch.equal(asked.starts["w"], own.dense["w"])
    assert same(asked.updated(asked.as_received(asked.starts, 0)).tensors(), own.tensors())


def test_a_start_is_planned_as_it_is_decoded_and_one_from_elsewhere_as_it_is(tiny_config: MakeConfig) -> None:
    config = tiny_config(*DOWN, "strategy.name=ffa")
    workspace, rule = open_workspace(config), load_rule(config)
    state = first_state(rule, workspace.base, 0)
    state = GlobalState(state.adapter.with_tensors({k: v + 0.1 for k, v in state.adapter.tensors().items()}))
    planner, held = Planner(config, rule, workspace), Held()
    asked = RoundRequest(1, (0, 1), state)
    planned = [planner.request(asked, ClientInfo(k), held) for k in (0, 1)]
    for one in planned:
        assert same(one.plan.adapter.tensors(), sent(state.adapter, "int8"))
        assert one.exact is not None
        assert same(one.exact.tensors(), state.adapter.tensors())
    assert planned[0].digests == planned[1].digests
    held.receive(planned[0])
    later = planner.request(RoundRequest(2, (0,), state), ClientInfo(0), held)
    assert later.held == {"A", "B", "dense"}, "what did not change is not sent again"
    foreign = planner.evaluation(RoundRequest(1, (0,), state, of_run=False), ClientInfo(0), Held())
    assert same(foreign.plan.adapter.tensors(), state.adapter.tensors())
    assert (foreign.down, foreign.exact) == ("float32", None)


@pytest.mark.parametrize("strategy", ["{name='flora'}", "{name='frlora'}", "{name='krum', inner={name='fedex'}}"])
def test_a_rule_that_changes_the_base_is_refused(tiny_config: MakeConfig, strategy: str) -> None:
    with raises(ConfigError, "base-not-rounded", "remove wire.down"):
        load_rule(tiny_config("wire.down=bfloat16", f"strategy={strategy}"))
    load_rule(tiny_config("wire.down=bfloat16", "strategy={name='krum', inner={name='flexlora'}}"))


# ------------------------------------------------------------------------------------------------ whole runs


class States(Callback):
    """The state after each round."""

    def __init__(self) -> None:
        self.adapters: list[AdapterState] = []

    def state_reached(self, state: GlobalState) -> None:
        self.adapters.append(state.adapter)


def test_clients_train_from_what_they_decode_and_the_state_is_not_rounded(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[TrainJob] = []
    real = client_training.train_cohort

    def seen(base: object, task: object, data: object, asked: Sequence[TrainJob], configs: object) -> object:
        jobs.extend(asked)
        return real(base, task, data, asked, configs)  # type: ignore[arg-type]

    monkeypatch.setattr(client_training, "train_cohort", seen)
    states = States()
    simulate(tiny_config(*DOWN, "rounds=2", "evaluation.every=2"), states)
    assert len(jobs) == 8
    for number, job in enumerate(jobs):
        before = states.adapters[number // 4]
        assert same(job.adapter.tensors(), sent(before, "int8"))
    last = states.adapters[-1]
    assert not same(last.tensors(), sent(last, "int8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("fedavg", ("wire.up=int8",)),
        pytest.param("rolora", ("wire={up='topk', down='int8', fraction=0.2}",), marks=pytest.mark.nightly),
        pytest.param("scaffold", ("train.optimizer=sgd",), marks=pytest.mark.nightly),
        pytest.param("fedavg", ("train.personal=0.5", "evaluation.on=both"), marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_was_killed_or_is_replayed_ends_with_the_same_bytes(
    tiny_config: MakeConfig, rule: str, more: tuple[str, ...]
) -> None:
    keys = (*DOWN, f"strategy.name={rule}", *more, "server.fraction=0.5", "evaluation.every=3")
    whole = simulate(tiny_config(*keys, name="whole"))
    resumed = cut_and_resumed(tiny_config(*keys, name="cut"), 3)
    replayed = simulate(tiny_config(*keys, name="replayed"), replay=whole.records)
    assert weights(whole) == weights(resumed) == weights(replayed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("ffa", ("wire.up=int8", "evaluation.on=both", "evaluation.min_examples=2")),
        *(
            pytest.param(rule, more, marks=pytest.mark.nightly, id=rule)
            for rule, more in {
                "fedsa": ("evaluation.on=clients", "evaluation.min_examples=2"),
                "rolora": ("wire={up='topk', down='int8'}",),
                "flexlora": ("clients.ranks=[1, 2]", "adapter.rank=2"),
                "fedsvd": ("wire.down=bfloat16",),
                "feddyn": (),
            }.items()
        ),
    ],
)
def test_a_deployment_comes_to_what_clients_here_do(
    tiny_config: MakeConfig, tmp_path: Path, rule: str, more: tuple[str, ...]
) -> None:
    keys = (*DOWN, f"strategy.name={rule}", *more, "rounds=3")
    here = simulate(tiny_config(*keys, name="here"))
    grid = deploy(tiny_config(*keys, name="grid"), ledgers=tmp_path)
    assert weights(grid) == weights(here)
    records = [timeless(outcome.records) for outcome in (grid, here)]
    for record in (*records[0], *records[1]):
        for way in ("bytes_up", "bytes_down"):  # of evaluation: a simulation does not count its heads
            record.get("federated", {}).pop(way, None)
    assert records[0] == records[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "down"),
    [
        ("ffa", "int8"),
        pytest.param("fedsvd", "bfloat16", marks=pytest.mark.nightly),
        pytest.param("fedavg", "int8", marks=pytest.mark.nightly),
    ],
)
def test_it_learns_as_well_with_the_bytes_that_were_announced(tiny_config: MakeConfig, rule: str, down: str) -> None:
    settings = (f"strategy.name={rule}", "evaluation.every=3")
    exact, config = simulate(tiny_config(*settings, name="exact")), tiny_config(*settings, f"wire.down={down}")
    rounded = simulate(config)
    workspace = open_workspace(config)
    initial, layouts = workspace.base.initial_adapter(0), [workspace.base.layout()] * 4
    found = [
        measure_traffic(load_aggregator(rule), initial, layouts, WireConfig(down=wire)) for wire in ("float32", down)
    ]
    assert found[1].down < {"bfloat16": 0.51, "int8": 0.45}[down] * found[0].down  # ranks of 2, short rows
    for number, field in ((1, "first_down"), (2, "down")):
        saved = exact.records[number]["bytes_down"] - rounded.records[number]["bytes_down"]
        announced = 4 * (getattr(found[0], field) - getattr(found[1], field))
        assert saved == pytest.approx(announced, abs=4 * 16 * (1 + len(initial.tensors())))  # the formats' names
    assert exact.records[2]["bytes_up"] == pytest.approx(rounded.records[2]["bytes_up"], abs=64)
    assert rounded.records[-1]["loss"] == pytest.approx(exact.records[-1]["loss"], abs=0.01)
    assert weights(exact) != weights(rounded)
    if rule != "fedavg":
        assert max(record["aggregation_error"] for record in rounded.records[1:]) < 1e-6, "it is exact for the server"
