"""A federation that measures an adapter and trains nothing: the figures of all clients' examples as in one place."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from integration.test_site_log import lines
from integration.test_site_policy import AT_CLIENTS as AT_SITES
from integration.test_site_policy import PRIVATE, ByNode, MakeSite, own, refusal, site
from support.command_line import invoke, succeeds
from support.errors import raises
from support.federations import Said, forget, simulate
from support.tiny_federations import MakeConfig

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, ModelError, PrivacyError, RoundError, RunDirError
from fedlora.flower import client_app, server_app
from fedlora.flower.task_identity import task_identity
from fedlora.model import save_adapter
from fedlora.model.adapter_files import read_adapter
from fedlora.node_worker.gated_app import GatedApp
from fedlora.simulation.run import evaluate_in_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import close_workspace, open_workspace

__all__ = ["own", "site"]  # fixtures
Measured = Callable[[RunConfig, Path], dict[str, Any]]
AT_CLIENTS = ("evaluation.on=clients", "evaluation.min_examples=2")
COUNTED = ("accuracy", "balanced_accuracy", "majority_share", "macro_f1", "weighted_f1", "mcc", "auroc")


def at_nodes(
    config: RunConfig, folder: Path, node: ClientApp = client_app.app, nodes: int | None = None
) -> dict[str, Any]:
    """By Flower messages to nodes in this process, as the coordinator's ServerApp sends them."""
    facts = [{"partition-id": k} for k in range(nodes or len(open_workspace(config).data.clients))]
    forget(config)
    grid = LoopbackGrid(node, facts if nodes is None else [{}] * nodes, {"toml": config.to_toml()})
    with task_identity(1):
        return dict(json.loads(server_app.evaluate(grid, config, folder).read_text()))


@pytest.mark.parametrize("rule", ["fedavg", "flora"])
@pytest.mark.parametrize("measured", [evaluate_in_simulation, at_nodes])
@pytest.mark.slow
def test_figures_are_those_of_all_examples_in_one_place(tiny_config: MakeConfig, measured: Measured, rule: str) -> None:
    config = tiny_config(*AT_CLIENTS, f"strategy.name={rule}", "rounds=2")
    outcome = simulate(config)  # flora's adapter is exported at a higher rank than the config's
    before = outcome.rundir.read_metrics()
    found = measured(config, outcome.rundir.adapter_dir)
    workspace = open_workspace(config)
    workspace.base.rebase(0, ())
    workspace.base.write(read_adapter(workspace.base, outcome.rundir.adapter_dir))
    apart = workspace.data.apart["test"]
    pooled = evaluate(workspace.base, workspace.task, apart.examples, indices=np.concatenate(apart.clients)).overall
    figures = found["figures"]
    assert {name: figures[name] for name in COUNTED} == {name: pooled[name] for name in COUNTED}
    assert figures["loss"] == pytest.approx(pooled["loss"], rel=1e-5)
    assert figures["loss"] == pytest.approx(before[-1]["loss"], rel=1e-4)
    assert sum(row["examples"] for row in found["clients"].values()) == sum(map(len, apart.clients))
    assert outcome.rundir.read_metrics() == before


@pytest.mark.slow
@pytest.mark.parametrize("measured", [evaluate_in_simulation, at_nodes])
def test_whatever_the_rule_lets_clients_keep_the_adapter_is_measured_as_it_is(
    tiny_config: MakeConfig, measured: Measured, tmp_path: Path
) -> None:
    plain, keeping = tiny_config(*AT_CLIENTS), tiny_config(*AT_CLIENTS, "strategy.name=fedsa")
    base = open_workspace(plain).base
    save_adapter(base, base.initial_adapter(plain.seed), tmp_path / "adapter", {})
    assert measured(keeping, tmp_path / "adapter")["figures"] == measured(plain, tmp_path / "adapter")["figures"]


def test_all_clients_are_asked_whatever_share_a_run_asks(tiny_config: MakeConfig) -> None:
    config = tiny_config(*AT_CLIENTS, "rounds=1", "evaluation.clients_fraction=0.25")
    found = evaluate_in_simulation(config, simulate(config).rundir.adapter_dir)
    assert list(found["clients"]) == ["0", "1", "2", "3"]


@pytest.mark.nightly
def test_processes_measure_the_same(tiny_config: MakeConfig) -> None:
    config = tiny_config(*AT_CLIENTS, "rounds=1")
    folder = simulate(config).rundir.adapter_dir
    here = evaluate_in_simulation(config, folder)
    two = evaluate_in_simulation(tiny_config(*AT_CLIENTS, "rounds=1", "runtime.processes=2"), folder)
    assert {name: two["figures"][name] for name in COUNTED} == {name: here["figures"][name] for name in COUNTED}


@pytest.mark.slow
def test_each_gate_has_its_say_and_writes_the_request_down(own: MakeConfig, site: MakeSite, tmp_path: Path) -> None:
    config = own(*AT_SITES, "server.node_timeout_s=1")
    base = open_workspace(config).base
    save_adapter(base, base.initial_adapter(config.seed), tmp_path / "adapter", {})
    closed = site(1, metrics=False)

    def gates(*folders: Path) -> ClientApp:
        return ByNode({k: GatedApp(folder) for k, folder in enumerate(folders, start=2)})

    found = at_nodes(config, tmp_path / "adapter", gates(site(0), closed), 2)
    assert list(found["clients"]) == ["0"]
    assert refusal("metrics") in found["left_out"]["1"]
    for folder in (tmp_path / "site-0", closed):
        assert [line["type"] for line in lines(folder) if line["event"] == "request"] == ["query.hello", "evaluate"]
    assert lines(closed)[-1]["refused"] == "metrics"
    with raises(RoundError, "nobody-reports", refusal("losses")):
        at_nodes(config, tmp_path / "adapter", gates(site(0, losses=False), closed), 2)


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused_before_a_client_is_asked(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tiny_config(*AT_CLIENTS, "rounds=1")
    folder = simulate(config).rundir.adapter_dir
    with raises(ConfigError, "clients-do-not-evaluate", "evaluation.on = 'clients'"):
        evaluate_in_simulation(tiny_config("rounds=1"), folder)
    with raises(PrivacyError, "evaluation-not-private"):
        evaluate_in_simulation(tiny_config("evaluation.on=off", *PRIVATE), folder)
    with raises(ModelError, "tensors-missing", "key.lora_A"):
        evaluate_in_simulation(tiny_config(*AT_CLIENTS, "adapter.targets=['query','value','key']"), folder)
    with raises(ModelError, "tensors-differ", "value.lora_A"):
        evaluate_in_simulation(tiny_config(*AT_CLIENTS, "adapter.targets=['query']"), folder)
    with raises(ModelError, "method-differs", "use_dora"):
        evaluate_in_simulation(tiny_config(*AT_CLIENTS, "adapter.method=dora"), folder)
    with raises(RunDirError, "provenance-mismatch"):
        evaluate_in_simulation(tiny_config(*AT_CLIENTS, "task.labels=['positive','negative']"), folder)
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    with raises(ModelError, "adapter-not-loadable"):
        evaluate_in_simulation(config, broken)


@pytest.mark.slow
def test_the_command_takes_a_run_and_its_federation(tiny_config: MakeConfig, tiny_csv: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(tiny_csv, tmp_path / "own.csv"))
    outcome = simulate(tiny_config(*AT_CLIENTS, "rounds=1", f"data.source='{source}'"))
    run = str(outcome.rundir.path)
    done = succeeds("evaluate", run, "--federation", run, "--format", "csv")
    whole, each = (list(csv.DictReader(io.StringIO(text))) for text in done.stdout.split("\n\n"))
    assert float(whole[0]["accuracy"]) == outcome.records[-1]["accuracy"]
    assert [row["client"] for row in each] == ["0", "1", "2", "3"]
    assert sum(int(row["examples"]) for row in each) == int(whole[0]["examples"])
    refused = invoke("evaluate", run, "--federation", run, "--clients")
    assert refused.stderr.startswith("error: --federation measures on what the clients keep apart")
    close_workspace()
    source.write_text(source.read_text() + source.read_text().splitlines()[1] + "\n")
    changed = invoke("evaluate", run, "--federation", run)
    assert changed.exit_code == 1
    assert "put back what it was made with" in changed.stderr


def test_nobody_is_told_twice(tiny_config: MakeConfig) -> None:
    keys = (
        "evaluation.on=clients",
        "partition.name=quantity",
        "partition.alpha=0.3",
        "partition.clients=6",
        "rounds=1",
    )
    config, heard = tiny_config(*keys, "evaluation.min_examples=8"), Said()
    found = evaluate_in_simulation(config, simulate(config).rundir.adapter_dir, heard)
    assert found["left_out"]
    assert len(heard.lines) == len(found["left_out"])
