"""fedlora's rules behind Flower's own strategy interface, and fedlora's client under Flower's own strategies."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Result
from support.errors import raises
from support.tiny_federations import MakeConfig

from fedlora.aggregators import load_aggregator
from fedlora.config import RunConfig
from fedlora.errors import RuleError
from fedlora.flower import FedLoraStrategy, client_app, evaluate_fn, initial_arrays
from fedlora.flower.flower_strategy import TRAINS
from fedlora.flower.peft_records import own_name
from fedlora.flower.task_identity import task_identity
from fedlora.model.export import peft_name
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training import open_workspace

plain = ClientApp()
"""Somebody else's client: it moves every tensor by a step of its own, and knows nothing of fedlora."""


@plain.train()
def step(message: Message, context: Context) -> Message:
    k = int(context.node_config["partition-id"])
    arrays = message.content.array_records["arrays"].to_torch_state_dict()
    frozen = "A" not in str(message.content["config"].get(TRAINS, "A"))
    moved = {
        name: value + (0.0 if frozen and "lora_A" in name else 0.01 * (k + 1) * torch.ones_like(value))
        for name, value in arrays.items()
    }
    bad = context.run_config.get("bad") if k == 0 else None
    if bad == "nan":
        moved = {name: value * float("nan") for name, value in moved.items()}
    elif bad == "shape":
        moved = {name: value[:1] for name, value in moved.items()}
    elif bad == "keys":
        moved.pop(min(moved))
    weight = {"none": {}, "zero": {"num-examples": 0}}.get(str(bad), {"num-examples": 10 * (k + 1)})
    reply = RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({**weight, "loss": 1.0})})
    return Message(reply, reply_to=message)


def start(strategy: FedAvg, app: ClientApp, config: RunConfig, rounds: int = 2, **run_config: Any) -> Result:
    nodes = [{"partition-id": k, "num-partitions": 4} for k in range(4)]
    with task_identity(run_id=1):
        grid = LoopbackGrid(app, nodes, {"toml": config.to_toml(), **run_config})
        return strategy.start(grid, initial_arrays(config), num_rounds=rounds, evaluate_fn=evaluate_fn(config))


def final(result: Result) -> dict[str, torch.Tensor]:
    assert result.arrays is not None
    return {own_name(name): value for name, value in result.arrays.to_torch_state_dict().items()}


@pytest.fixture
def config(tiny_config: MakeConfig) -> RunConfig:
    return tiny_config("runtime.cohort=1", "rounds=2")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", "fair", "ffa"])
def test_our_strategy_and_our_client_reach_what_a_run_reaches(config: RunConfig, rule: str) -> None:
    config = config.model_copy(update={"strategy": config.strategy.model_copy(update={"name": rule})})
    run = run_simulation(config, RunDir.create(config))
    result = start(FedLoraStrategy(rule, alpha=config.adapter.alpha, fraction_evaluate=0.0), client_app.app, config)
    expected = run.state.adapter.tensors()
    found = final(result)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == run.records[-1]["accuracy"]
    assert set(result.train_metrics_clientapp[1]) == {"train_loss"}


@pytest.mark.parametrize("schedule", [pytest.param("constant", marks=pytest.mark.slow), "linear"])
def test_flowers_fedavg_with_our_client_is_our_fedavg(config: RunConfig, schedule: str) -> None:
    config = config.model_copy(update={"train": config.train.model_copy(update={"schedule": schedule})})
    run = run_simulation(config, RunDir.create(config))
    found = final(start(FedAvg(fraction_evaluate=0.0), client_app.app, config))
    for name, value in run.state.adapter.tensors().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_flowers_fedadam_takes_our_client(config: RunConfig) -> None:
    result = start(FedAdam(fraction_evaluate=0.0, eta=0.01), client_app.app, config)
    first = open_workspace(config).base.initial_adapter(config.seed).tensors()
    moved = {name: float((value - first[name]).abs().max()) for name, value in final(result).items()}
    assert all(0 < size <= 0.05 for size in moved.values()), moved  # two steps of at most about eta


@pytest.mark.parametrize("rule", ["fedavg", "fair", "ffa"])
def test_our_strategy_with_a_plain_flower_client(config: RunConfig, rule: str) -> None:
    strategy = FedLoraStrategy(rule, alpha=config.adapter.alpha, fraction_evaluate=0.0)
    found = final(start(strategy, plain, config, rounds=1))
    first = open_workspace(config).base.initial_adapter(config.seed).tensors()
    mean = sum(0.01 * (k + 1) * 10 * (k + 1) for k in range(4)) / 100
    for name, value in found.items():
        step = 0.0 if rule == "ffa" and name.endswith(":A") else mean
        if rule != "fair" or not name.endswith((":A", ":B")):  # which corrects the factors
            torch.testing.assert_close(value, first[name] + step, rtol=1e-5, atol=1e-6, msg=name)
    result = start(FedAvg(fraction_evaluate=0.0), plain, config, rounds=1)
    if rule == "fedavg":
        for name, value in final(result).items():
            torch.testing.assert_close(value, found[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", ["nan", "shape", "keys", "none", "zero"])
def test_a_reply_that_does_not_fit_is_left_out_and_named(
    config: RunConfig, bad: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    caplog.set_level(logging.WARNING, "flwr")  # which the command line, in another test, may have raised
    strategy = FedLoraStrategy("fedavg", alpha=16, fraction_evaluate=0.0)
    found = final(start(strategy, plain, config, rounds=1, bad=bad))
    first = open_workspace(config).base.initial_adapter(config.seed).tensors()
    mean = sum(0.01 * (k + 1) * 10 * (k + 1) for k in range(1, 4)) / 90
    for name, value in found.items():
        torch.testing.assert_close(value, first[name] + mean, rtol=1e-5, atol=1e-6)
    assert "node 2 left out" in caplog.text


def test_what_plain_tensors_cannot_carry_is_refused(config: RunConfig, tiny_config: MakeConfig) -> None:
    with raises(RuleError, "changes-base"):
        FedLoraStrategy(load_aggregator("flora", {}), alpha=16)
    private = tiny_config(
        "server.weighting=uniform", "privacy={epsilon=8, delta=1e-3, max_grad_norm=1, public_examples=40}"
    )
    result = start(FedAvg(fraction_evaluate=0.0), client_app.app, private, rounds=1)
    assert not result.train_metrics_clientapp, "a private client answered a server that accounts for nothing"
    for way in ("up", "down"):
        result = start(FedAvg(fraction_evaluate=0.0), client_app.app, tiny_config(f"wire.{way}=int8"), rounds=1)
        assert not result.train_metrics_clientapp, "a client answered a server that knows no formats"


def test_the_messages_config_is_heeded(config: RunConfig) -> None:
    from flwr.app import ConfigRecord

    nodes = [{"partition-id": k, "num-partitions": 4} for k in range(4)]
    with task_identity(run_id=1):
        grid = LoopbackGrid(client_app.app, nodes, {"toml": config.to_toml()})
        strategy = FedAvg(fraction_evaluate=0.0)
        arrays = initial_arrays(config)
        still = strategy.start(grid, arrays, num_rounds=1, train_config=ConfigRecord({"lr": 1e-12}))
    first = {own_name(name): value for name, value in arrays.to_torch_state_dict().items()}
    for name, value in final(still).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=1e-7)


def test_names_go_there_and_back() -> None:
    for own in ("encoder.layer.0.query:A", "encoder.layer.0.query:B", "classifier.weight"):
        assert own_name(peft_name(own)) == own
    assert own_name("base_model.model.score.modules_to_save.default.weight") == "score.weight"
    assert own_name("base_model.model.q.lora_B.default.weight") == "q:B"
    assert isinstance(ArrayRecord({"x": torch.zeros(1)})["x"], Array)
