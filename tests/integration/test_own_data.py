"""Nodes that bring their own files: the same bytes as one file that was divided, and nothing on the server."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from support.errors import raises
from support.federations import deploy, require_alike, weights
from support.tiny_federations import MakeConfig

from fedlora.api import train
from fedlora.callbacks import Callback
from fedlora.config import RunConfig, parse_config
from fedlora.data import load_data
from fedlora.errors import ConfigError, DataError, FedloraError, RoundError, RunDirError
from fedlora.federation.run import RunOutcome
from fedlora.flower.app_config import NODE_KEYS, config_of
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import refuse_early, run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.workspace import open_workspace

LABELS = "task.labels=['negative','positive']"


@pytest.fixture(scope="module")
def files(tiny_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with test.csv, a file for each of two sites, and all sites' examples in one with a column "site"."""
    folder = tmp_path_factory.mktemp("sites")
    rows = list(csv.DictReader(tiny_csv.open(encoding="utf-8")))
    test, rest = rows[:60], rows[60:]
    sites = {
        "a": [r for r in rest if r["domain"] == "films"][:70],
        "b": [r for r in rest if r["domain"] == "phones"][:50],
    }
    everybody = [{**row, "site": site} for site, mine in sites.items() for row in mine]
    for name, table in {**sites, "test": test, "all": everybody}.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return folder


@pytest.fixture
def configs(tiny_bert: Path, files: Path, tmp_path: Path) -> Callable[..., tuple[RunConfig, RunConfig]]:
    """The config of a federation whose nodes bring their data, and of its simulation."""

    def make(*overrides: str) -> tuple[RunConfig, RunConfig]:
        shared = [
            f"output='{tmp_path / 'runs'}'",
            f"model.name='{tiny_bert}'",
            "adapter.targets=['query','value']",
            "task.name=text-classification",
            LABELS,
            f"data.test='{files / 'test.csv'}'",
            "train.steps=3",
            "train.lr=0.01",
            "runtime.threads=1",
            "runtime.cohort=1",
            "runtime.kernels=off",
            "model.dtype=float32",
            "rounds=2",
            *overrides,
        ]
        own = parse_config(
            "", [*shared, "data.source=nodes", "partition.name=nodes", "partition.clients=2"], name="own"
        )
        natural = ["partition.name=natural", "partition.column=site"]
        one = parse_config("", [*shared, f"data.source='{files / 'all.csv'}'", *natural], name="one")
        return own, one

    return make


def federate(config: RunConfig, nodes: list[dict[str, Any]]) -> RunOutcome:
    return deploy(config, nodes=nodes)


@pytest.mark.slow
def test_files_of_their_own_give_the_bytes_of_one_file_that_was_divided(configs: Any, files: Path) -> None:
    own, one = configs()
    nodes = [{"partition-id": k, "data": str(files / f"{site}.csv")} for k, site in enumerate("ab")]
    deployed = federate(own, nodes)
    simulated = run_simulation(one, RunDir.create(one), Callback())
    assert [row["num_examples"] for row in deployed.records[1]["clients"].values()] == [70, 50]
    assert weights(deployed) == weights(simulated)
    assert deployed.records[-1]["accuracy"] == simulated.records[-1]["accuracy"]
    assert not (deployed.rundir.path / "partition.json").exists()


@pytest.mark.slow
def test_a_server_without_data_has_the_figures_of_its_nodes(configs: Any, files: Path) -> None:
    more = ("evaluation.min_examples=2", "data.test_fraction=0.3", "selection.patience=9", "data.group=document")
    own, one = configs("data.test=", "evaluation.on=clients", *more)
    nodes = [{"partition-id": k, "data": str(files / f"{site}.csv")} for k, site in enumerate("ab")]
    deployed = federate(own, nodes)
    simulated = run_simulation(one, RunDir.create(one), Callback())
    assert weights(deployed) == weights(simulated)
    for mine, theirs in zip(deployed.records, simulated.records, strict=True):
        require_alike(mine["validation"], theirs["validation"])
        for key in ("figures", "clients", "macro", "worst_tenth"):
            require_alike(mine["federated"][key], theirs["federated"][key])
    assert open_workspace(own).data.test is None
    assert deployed.rundir.report.is_file()
    assert not (deployed.rundir.path / "outcomes.safetensors").exists()


@pytest.mark.slow
def test_a_node_may_name_a_file_to_be_tested_on(configs: Any, files: Path) -> None:
    own, _ = configs("data.test=", "evaluation.on=clients")
    nodes = [{"partition-id": k, "data": str(files / f"{site}.csv")} for k, site in enumerate("ab")]
    nodes[0]["test"] = str(files / "test.csv")
    last = federate(own, nodes).records[-1]
    assert last["clients"]["0"]["num_examples"] == 70  # all of the first file is trained on
    assert last["federated"]["clients"]["0"]["examples"] == 60
    nodes[0]["test"] = "/no/such.csv"
    refused = federate(own.model_copy(update={"name": "refused"}), nodes)
    assert "no data file '/no/such.csv'" in next(iter(refused.records[-1]["turned_away"].values()))


def test_a_node_whose_groups_are_not_known_is_refused(configs: Any, files: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader((files / "a.csv").open(encoding="utf-8")))
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    own, _ = configs("data.test=", "evaluation.on=clients", "data.group=document")
    with raises(DataError, "no-group-column", "data.group", "document"):
        load_data(own.model_copy(update={"data": own.data.model_copy(update={"own": str(tmp_path / "a.csv")})}))


@pytest.mark.slow
def test_a_node_more_may_join_when_a_run_goes_on(configs: Any, files: Path) -> None:
    own, _ = configs("rounds=1")
    nodes = [{"partition-id": k, "data": str(files / f"{site}.csv")} for k, site in enumerate("aba")]
    first = federate(own, nodes[:2])
    three = own.partition.model_copy(update={"clients": 3})
    more = own.model_copy(update={"rounds": 2, "partition": three})
    outcome = deploy(more, nodes=nodes, rundir=first.rundir)
    assert [record.get("answered") for record in outcome.records] == [None, [0, 1], [0, 1, 2]]
    (change,) = RunDir.open(first.rundir.path).changes
    assert str(change) == "partition.clients from 2 to 3 at round 2"
    with raises(RunDirError, "config-differs", "partition.clients", 3, 2):
        RunDir.open(first.rundir.path, own.model_copy(update={"rounds": 3}))


def test_the_server_has_test_data_alone(configs: Any) -> None:
    own, _ = configs()
    data = load_data(own)
    assert len(data.test) == 60
    assert [len(rows) for rows in data.clients] == [0, 0]
    assert data.label_names == ("negative", "positive")


def test_a_node_trains_on_all_of_its_file_and_on_nothing_else(configs: Any, files: Path) -> None:
    own, _ = configs()
    context = context_of(own, {"partition-id": 1, "data": str(files / "b.csv"), "device": "cpu"})
    config = config_of(context)
    assert config.runtime.device == "cpu"
    data = load_data(config)
    assert [len(rows) for rows in data.clients] == [50, 50]
    assert len(data.train) == 50
    assert open_workspace(config).data is data or len(open_workspace(config).data.train) == 50


def context_of(config: RunConfig, node_config: dict[str, Any]) -> Context:
    return Context(1, 2, UserConfig(node_config), RecordDict(), UserConfig({"toml": config.to_toml()}))


@pytest.mark.parametrize(
    ("node_config", "code", "named"),
    [
        ({"partition-id": 0}, "no-own-data", "--node-config 'data="),
        ({"partition-id": 0, "dta": "/x.csv"}, "unknown-key", "did you mean 'data'"),
        ({"partition-id": 0, "data": 3}, "wrong-type", "data"),
        ({"partition-id": "0", "data": "/x.csv"}, "wrong-type", "partition-id"),
        ({"partition-id": True, "data": "/x.csv"}, "wrong-type", "partition-id"),
    ],
)
def test_a_node_config_that_cannot_be_meant_is_refused(
    configs: Any, node_config: dict[str, Any], code: str, named: str
) -> None:
    with raises(ConfigError, code, named):
        config_of(context_of(configs()[0], node_config))


@pytest.mark.slow
def test_a_file_that_is_not_there_costs_its_node_the_run_and_nobody_else(configs: Any, files: Path) -> None:
    own, _ = configs("server.node_timeout_s=0.02")
    outcome = federate(
        own, [{"partition-id": 0, "data": str(files / "a.csv")}, {"partition-id": 1, "data": "/no/b.csv"}]
    )
    assert outcome.records[1]["answered"] == [0]


@pytest.mark.parametrize(
    ("change", "error", "code", "named"),
    [
        ("task.labels=[]", ConfigError, "classes-unknown", "task.labels"),
        ("partition.clients=0", ConfigError, "bad-value", "partition.clients"),
        ("partition.alpha=1", ConfigError, "unknown-key", "'alpha'"),
        ("partition.name=iid", ConfigError, "nodes-in-one-table-only", "partition.name = 'nodes'"),
        ("data.test='/no/test.csv'", DataError, "no-such-file", "'/no/test.csv'"),
    ],
)
def test_a_config_that_lacks_what_all_must_agree_on_is_refused(
    configs: Any, change: str, error: type[FedloraError], code: str, named: str
) -> None:
    own, _ = configs()
    with raises(error, code, named):
        load_data(parse_config(own.to_toml(), [change]))


def test_data_of_its_own_is_never_left_unused(configs: Any, files: Path) -> None:
    _, one = configs()
    with raises(ConfigError, "node-data-unused", "data.source"):
        load_data(config_of(context_of(one, {"partition-id": 0, "data": str(files / "a.csv")})))


def test_a_run_config_cannot_name_a_nodes_file(configs: Any, files: Path) -> None:
    own, _ = configs()
    named = parse_config(own.to_toml(), [f"data.own='{files / 'a.csv'}'"])
    with raises(ConfigError, "own-data-in-run-config", "data.own"):
        config_of(context_of(named, {"partition-id": 0}))


def test_what_the_nodes_keep_cannot_be_simulated_from_nothing(configs: Any) -> None:
    own, _ = configs()
    with raises(ConfigError, "nodes-bring-data", "flwr run"):
        refuse_early(own, open_workspace(own))


def test_every_key_of_a_node_config_is_in_the_deployment_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
    for key in NODE_KEYS:
        assert f"`{key}`" in page, key


# ------------------------------------------------------------------------------------------------ replays


@pytest.mark.slow
def test_a_replay_has_the_updates_of_the_run_and_its_bytes(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=3", "runtime.cohort=1")
    run = run_simulation(config, RunDir.create(config), Callback())
    records = [dict(record) for record in run.records]
    again = tiny_config("rounds=3", "runtime.cohort=1", name="again")
    assert weights(run) == weights(run_simulation(again, RunDir.create(again), Callback(), replay=records))
    records[2]["answered"] = [0, 2, 3]
    other = tiny_config("rounds=3", "runtime.cohort=1", name="other")
    replayed = run_simulation(other, RunDir.create(other), Callback(), replay=records)
    assert [record["answered"] for record in replayed.records[1:]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert "did not answer in the run that is replayed" in replayed.records[2]["refused"]["1"]
    assert weights(run) != weights(replayed)


def test_a_replay_that_cannot_be_the_run_says_so(tiny_config: MakeConfig) -> None:
    config = tiny_config("rounds=1")
    records = [{"round": 0}, {"round": 1, "answered": [0, 2, 9]}]
    with raises(RoundError, "replay-differs", "round 1", [0, 2], [0, 2, 9]):
        run_simulation(config, RunDir.create(config), Callback(), replay=records)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "code", "cure"),
    [
        ("rounds=1", "replay-rounds-differ", "--set rounds=2"),
        ("rounds=3", "replay-rounds-differ", "--set rounds=2"),
        ("seed=5", "replay-clients-differ", "--set seed=0"),
        ("partition.clients=6", "replay-clients-differ", "had 4"),
        ("server.clients_per_round=2", "replay-clients-differ", "--set server.clients_per_round="),
        ("partition={name='natural', column='document'}", "replay-clients-differ", "had 4"),
    ],
)
def test_a_replay_with_other_rounds_or_clients_trains_and_removes_nothing(
    change: str, code: str, cure: str, tiny_config: MakeConfig
) -> None:
    config = tiny_config("rounds=2")
    folder = RunDir.create(config)
    run_simulation(config, folder, Callback())
    before = folder.read_metrics()
    again = tiny_config("rounds=2", change)
    with raises(ConfigError, code, cure):
        train(again, Callback(), overwrite=True, replay=folder.path)
    assert folder.read_metrics() == before


@pytest.mark.slow
@pytest.mark.parametrize("lie", [False, True])
def test_no_node_weighs_more_than_its_claim_beside_the_others(
    lie: bool, configs: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten million claimed examples beside 70 and 50 weigh as ten times 70; what honest nodes have counts in full."""
    real = LoopbackGrid._answer

    def answer(self: LoopbackGrid, message: Message) -> Message:
        reply = real(self, message)
        if lie and message.metadata.dst_node_id == 4 and "metrics" in reply.content:
            reply.content.metric_records["metrics"]["num_examples"] = 10_000_000
        return reply

    monkeypatch.setattr(LoopbackGrid, "_answer", answer)
    own = parse_config(configs("rounds=1")[0].to_toml(), ["partition.clients=3"])
    nodes = [{"partition-id": k, "data": str(files / f"{site}.csv")} for k, site in enumerate("aba")]
    clients = federate(own, nodes).records[1]["clients"]
    assert [row["num_examples"] for row in clients.values()] == [70, 50, 10_000_000 if lie else 70]
    assert [row.get("weight") for row in clients.values()] == [None, None, 700.0 if lie else None]


@pytest.mark.slow
def test_a_replay_leaves_out_the_devices_that_dropped_out_or_were_late(tiny_config: MakeConfig) -> None:
    devices = [
        "clients.profiles=[{name='slow',dropout=0.5,examples_per_s=10},{name='fast',examples_per_s=1000}]",
        *("server.simulated_deadline_s=1.0", "server.quorum=0.9", "server.max_failed_rounds=0", "rounds=3"),
    ]
    config = tiny_config(*devices)
    run = run_simulation(config, RunDir.create(config))
    assert any(record["dropped"] or record["late"] for record in run.records[1:])
    again = tiny_config(*devices, name="again")
    replayed = run_simulation(again, RunDir.create(again), replay=run.records)
    assert weights(replayed) == weights(run)
    for name in ("answered", "dropped", "late", "refused", "lost", "simulated_seconds"):
        assert [record.get(name) for record in replayed.records[1:]] == [r.get(name) for r in run.records[1:]], name
