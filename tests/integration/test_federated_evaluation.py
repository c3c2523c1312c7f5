"""Evaluation where the data are: figures of all clients' own examples as in one place, and the round that is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import invoke
from support.errors import raises
from support.federations import Said, deploy, require_alike, simulate, timeless
from support.interrupted import cut_and_resumed
from support.tiny_federations import MakeConfig

from fedlora.api import load_run
from fedlora.config import parse_config
from fedlora.errors import ConfigError, PrivacyError
from fedlora.federation.run import RunOutcome
from fedlora.federation.selection import Selection
from fedlora.tasks._classification import Classification
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import Workspace, open_workspace

AT_CLIENTS = ("evaluation.on=clients", "evaluation.min_examples=2")
OVERFITS = (*AT_CLIENTS, "selection.metric=loss", "data.validation_fraction=0.3", "train.lr=0.05", "train.steps=6")


def same_adapter(one: RunOutcome, other: RunOutcome) -> bool:
    mine, theirs = one.state.adapter.tensors(), other.state.adapter.tensors()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def on_all_own_examples(workspace: Workspace, outcome: RunOutcome, part: str) -> dict[str, float]:
    """Figures of the last state over what all clients keep apart, in one place."""
    workspace.base.rebase(outcome.state.base_version, outcome.state.base_updates)
    workspace.base.write(outcome.state.adapter)
    apart = workspace.data.apart[part]
    rows = np.concatenate(apart.clients)
    return evaluate(workspace.base, workspace.task, apart.examples, indices=rows).overall


@pytest.mark.parametrize(
    ("run", "rule"),
    [
        pytest.param(run, rule, marks=pytest.mark.slow if often else pytest.mark.nightly)
        for rule, here in (("fedavg", True), ("ffa", False), ("flora", True))
        for run, often in ((simulate, here), (deploy, not here))
    ],
)
def test_federated_figures_are_those_of_all_examples_in_one_place(
    tiny_config: MakeConfig, run: Callable[..., RunOutcome], rule: str
) -> None:
    config = tiny_config(*AT_CLIENTS, f"strategy.name={rule}")
    outcome = run(config)
    pooled = on_all_own_examples(open_workspace(config), outcome, "test")
    last = outcome.records[-1]
    counted = ("accuracy", "balanced_accuracy", "majority_share", "macro_f1", "weighted_f1", "mcc")
    assert {name: last[name] for name in counted} == {name: pooled[name] for name in counted}
    f1 = [row["f1"] for row in last["classes"].values()]
    assert last["classes"].keys() == {"negative", "positive"}
    assert np.mean(f1) == pytest.approx(last["macro_f1"])
    assert last["loss"] == pytest.approx(pooled["loss"], rel=1e-5)
    federated = last["federated"]
    assert federated["figures"] == {name: last[name] for name in federated["figures"]}
    own = [row["accuracy"] for row in federated["clients"].values()]
    assert len(own) == 4
    assert federated["macro"]["accuracy"] == pytest.approx(np.mean(own))
    assert federated["worst_tenth"]["accuracy"] == min(own)
    assert federated["bytes_up"] > 0
    assert federated["bytes_down"] > 0
    assert "federated" in outcome.records[0]  # before training


METRICS = """
import numpy as np
def margin(measures):
    own = np.take_along_axis(measures["probabilities"], measures["label"].astype(int)[:, None], axis=1)[:, 0]
    return own - 0.5
def recall_of_first(sums):
    return sums["confusion"][0, 0] / max(sums["confusion"][0].sum(), 1.0)
"""


@pytest.mark.parametrize("run", [simulate, deploy])
@pytest.mark.parametrize("name", ["margin", "recall_of_first"])
@pytest.mark.slow
def test_a_figure_of_ones_own_is_that_of_all_examples_in_one_place(
    tiny_config: MakeConfig, run: Callable[..., RunOutcome], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tiny_config(*AT_CLIENTS, f"evaluation.metric=own_metrics:{name}", "rounds=1")
    outcome = run(config)
    pooled = on_all_own_examples(open_workspace(config), outcome, "test")
    last = outcome.records[-1]
    assert last[name] == last["federated"]["figures"][name] == pytest.approx(pooled[name], rel=1e-5)
    assert name == "margin" or last[name] == pooled[name]  # whole numbers add up exactly
    plain = run(tiny_config(*AT_CLIENTS, "rounds=1", name="plain"))
    assert plain.records[-1]["accuracy"] == last["accuracy"]
    assert name not in plain.records[-1]


@pytest.mark.parametrize("run", [simulate, deploy])
@pytest.mark.slow
def test_a_state_that_clients_have_measured_is_not_sent_again(
    tiny_config: MakeConfig, run: Callable[..., RunOutcome]
) -> None:
    measured = run(tiny_config(*AT_CLIENTS))
    unmeasured = run(tiny_config(*AT_CLIENTS, "evaluation.every=1000", name="unmeasured"))
    assert same_adapter(measured, unmeasured)
    downs = [[record["bytes_down"] for record in outcome.records[2:]] for outcome in (unmeasured, measured)]
    saved = [full - short for full, short in zip(*downs, strict=True)]  # before round 1 both were measured
    assert all(nbytes > 4 * measured.state.adapter.nbytes() for nbytes in saved)


def test_what_clients_keep_apart_is_in_whole_groups_and_nobody_trains_on_it(tiny_config: MakeConfig) -> None:
    data = open_workspace(tiny_config(*AT_CLIENTS, "selection.patience=9", "data.group=document")).data
    documents = data.train.columns["document"]
    apart = data.apart["test"].examples.columns["document"]
    for k, rows in enumerate(data.clients):
        parts = [set(documents[rows]), *(set(apart[data.apart[part].clients[k]]) for part in ("test", "validation"))]
        assert all(parts)
        assert len(set.union(*parts)) == sum(map(len, parts))
    assert data.test is not None
    assert sorted(data.test.columns["document"]) == sorted(apart[np.concatenate(data.apart["test"].clients)])
    total = sum(len(rows) for held in (data.clients, *(a.clients for a in data.apart.values())) for rows in held)
    assert total + len(data.dropped) == len(data.train)


@pytest.mark.nightly
def test_processes_and_clients_here_report_the_same(tiny_config: MakeConfig) -> None:
    alike = ("runtime.cohort=1", "runtime.prefix_cache=off")
    keys = (*AT_CLIENTS, *alike, "selection.patience=9", "evaluation.clients_fraction=0.75")
    here = simulate(tiny_config(*keys, name="here"))
    two = simulate(tiny_config(*keys, "runtime.processes=2", name="two"))
    for mine, theirs in zip(timeless(here.records), timeless(two.records), strict=True):
        require_alike(mine["federated"], theirs["federated"])
        require_alike(mine["validation"], theirs["validation"])
        assert len(mine["federated"]["clients"]) == 3


@pytest.mark.slow
def test_on_both_the_servers_figures_stand_first(tiny_config: MakeConfig) -> None:
    outcome = simulate(tiny_config("evaluation.on=both", "evaluation.min_examples=2"))
    server = simulate(tiny_config(name="server")).records[0]
    first = outcome.records[0]
    assert {name: first[name] for name in server["domains"]["films"]} == {
        name: server[name] for name in server["domains"]["films"]
    }
    assert first["domains"] == server["domains"]
    assert len(first["federated"]["clients"]) == 4


def test_a_client_reports_nothing_of_a_few_examples(tiny_config: MakeConfig) -> None:
    keys = ("evaluation.on=clients", "partition.name=quantity", "partition.alpha=0.3", "partition.clients=6")
    outcome = simulate(tiny_config(*keys, "evaluation.min_examples=8"), said := Said())
    federated = outcome.records[-1]["federated"]
    assert federated["left_out"]
    assert federated["clients"]
    assert not federated["left_out"].keys() & federated["clients"].keys()
    for client_id in federated["left_out"]:
        assert sum(text.startswith(f"client {client_id} is left out of the evaluation") for text in said.lines) == 1
    nobody = simulate(tiny_config(*keys, "evaluation.min_examples=5000", name="nobody"))
    assert nobody.records[-1]["federated"]["clients"] == {}
    assert "accuracy" not in nobody.records[-1]
    assert nobody.rundir.finished


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("examples", 1e9, "server.max_examples"),
        ("examples", 0.5, "whole number"),
        ("loss", np.nan, "not finite"),
        ("confusion", -1.0, "negative"),
    ],
)
def test_sums_that_no_examples_give_are_left_out_by_name(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: float, said: str
) -> None:
    real = Classification.sums
    lied: list[int] = []

    def lying(self: Classification, measures: Any) -> dict[str, np.ndarray]:
        sums = real(self, measures)
        lied.append(1)
        return sums if len(lied) % 4 else sums | {name: np.full_like(sums[name], value)}  # the last of four clients

    config = tiny_config(*AT_CLIENTS, "rounds=1")
    honest = simulate(config)
    monkeypatch.setattr(Classification, "sums", lying)
    federated = simulate(tiny_config(*AT_CLIENTS, "rounds=1", name="lied")).records[-1]["federated"]
    assert list(federated["left_out"]) == ["3"]
    assert said in federated["left_out"]["3"]
    true = honest.records[-1]["federated"]["clients"]
    assert federated["clients"] == {k: row for k, row in true.items() if k != "3"}


def test_a_replay_has_the_figures_of_the_clients_that_reported_then(tiny_config: MakeConfig) -> None:
    def reported_by(records: list[dict[str, Any]], who: set[str]) -> list[dict[str, Any]]:
        rows = [record["federated"]["clients"] for record in records]
        return [{k: row for k, row in clients.items() if k in who} for clients in rows]

    # Replayed clients may be in other cohorts, which shows in rounding: here each is one of its own.
    how = (*AT_CLIENTS, "rounds=1", "train.steps=2", "selection.metric=loss", "runtime.cohort=1")
    run = simulate(tiny_config(*how))
    lines = json.loads(json.dumps(run.records))
    for line in lines:
        del line["federated"]["clients"]["1"]
    again = simulate(tiny_config(*how, name="again"), replay=lines)
    assert [record["federated"]["clients"] for record in again.records] == reported_by(run.records, {"0", "2", "3"})
    assert again.records[-1]["validation"] != run.records[-1]["validation"]


def test_nothing_is_measured_where_evaluation_is_off(tiny_config: MakeConfig) -> None:
    outcome = simulate(tiny_config("evaluation.on=off"))
    assert all("accuracy" not in record for record in outcome.records)
    assert outcome.rundir.report.is_file()


# ------------------------------------------------------------------------------------------------ selection


@pytest.mark.slow
def test_the_best_round_by_validation_is_kept_and_the_last_beside_it(tiny_config: MakeConfig) -> None:
    outcome = simulate(tiny_config(*OVERFITS, "rounds=8", name="whole"))
    losses = {record["round"]: record["validation"]["loss"] for record in outcome.records[1:]}
    best = min(losses, key=lambda number: losses[number])
    assert best < 8  # it overfits
    result = outcome.rundir.read_json("result.json")
    assert (result["kept_round"], result["best"]["round"], result["stopped"]) == (best, best, None)
    assert result["best"]["value"] == losses[best]
    short = simulate(tiny_config(*OVERFITS, f"rounds={best}", name="short"))
    last = simulate(tiny_config(*OVERFITS, "rounds=8", "selection.keep=last", name="last"))
    assert weights(outcome.rundir.adapter_dir) == weights(short.rundir.adapter_dir)
    assert weights(outcome.rundir.last_adapter_dir) == weights(last.rundir.adapter_dir)
    assert not last.rundir.last_adapter_dir.exists()
    assert weights(outcome.rundir.adapter_dir) != weights(last.rundir.adapter_dir)


@pytest.mark.slow
def test_an_exported_model_is_that_of_the_round_that_was_kept(tiny_config: MakeConfig, tmp_path: Path) -> None:
    outcome = simulate(tiny_config(*OVERFITS, "rounds=3"))  # the third is far behind the second
    kept = outcome.rundir.read_json("result.json")["kept_round"]
    assert kept < 3
    for flags, folder in (([], "adapter"), (["--format", "merged"], "model")):
        words = ["export", str(outcome.rundir.path), str(tmp_path / folder), *flags]
        said = invoke(*words)
        assert f"of round {kept} is in" in said.output
    assert weights(tmp_path / "adapter") == weights(outcome.rundir.adapter_dir)
    best = outcome.rundir.kept_checkpoint()
    assert best is not None
    assert best.round == kept


@pytest.mark.slow
def test_a_run_ends_early_and_says_so(tiny_config: MakeConfig) -> None:
    outcome = simulate(tiny_config(*OVERFITS, "rounds=30", "selection.patience=2"), said := Said())
    result = outcome.rundir.read_json("result.json")
    assert outcome.state.round == result["kept_round"] + 2 < 30
    assert result["stopped"] in next(text for text in said.lines if text.startswith("the run ends after round"))
    assert outcome.rundir.finished
    assert "ended early" in outcome.rundir.report.read_text()
    assert load_run(outcome.rundir.path).finished


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 4])
def test_a_resumed_run_keeps_the_same_round(tiny_config: MakeConfig, cut: int) -> None:
    whole = simulate(tiny_config(*OVERFITS, "rounds=6", "selection.patience=3", name="whole"))
    resumed = cut_and_resumed(tiny_config(*OVERFITS, "rounds=6", "selection.patience=3", name="cut"), cut)
    assert weights(resumed.rundir.adapter_dir) == weights(whole.rundir.adapter_dir)
    one, other = (outcome.rundir.read_json("result.json") for outcome in (whole, resumed))
    assert (one["kept_round"], one["best"], one["stopped"]) == (other["kept_round"], other["best"], other["stopped"])


def test_the_server_selects_by_examples_that_it_does_not_test_on(tiny_config: MakeConfig) -> None:
    config = tiny_config("selection.patience=9", "data.validation_fraction=0.2", "data.group=document")
    data = open_workspace(config).data
    assert data.test is not None
    assert data.validation is not None
    parts = [set(part.columns["document"]) for part in (data.train, data.test, data.validation)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    outcome = simulate(config)
    assert all("accuracy" in record["validation"] for record in outcome.records)


@pytest.mark.parametrize(
    ("values", "keys", "best", "stopped"),
    [
        ([0.5, 0.7, 0.6, 0.65], ["selection.patience=2"], 2, True),
        ([0.5, 0.7, 0.6, 0.8], ["selection.patience=2"], 4, False),
        ([0.5, 0.505, 0.51], ["selection.min_delta=0.05", "selection.patience=2"], 1, True),
        ([0.5, 0.4, 0.45], ["selection.metric=loss"], 2, False),
        ([0.5, 0.4, 0.45], ["selection.metric=loss", "selection.mode=max"], 1, False),
        ([None, 0.4, None], ["selection.patience=1"], 2, True),
    ],
)
def test_rounds_are_compared_as_asked(
    values: list[float | None], keys: list[str], best: int, stopped: bool, tiny_config: MakeConfig
) -> None:
    config = parse_config("", keys)
    assert config.selection is not None
    task = open_workspace(tiny_config()).task
    figures = [{"accuracy": value, "loss": value} for value in values]
    history = [{"round": 0, "validation": {"accuracy": 1.0, "loss": 0.0}}]
    history += [{"round": number, "validation": row} for number, row in enumerate(figures, 1)]
    selection = Selection(config, task, history)
    assert selection.best is not None
    assert selection.best.round == best  # never that before training
    assert (selection.stopped is not None) == stopped


def test_a_lost_round_is_neither_the_best_nor_one_without_a_better(tiny_config: MakeConfig) -> None:
    """Its model is that of the round before it; before the first that is not lost there is none that was trained."""
    lost, others = {1, 3, 4, 6}, {2: 0.5, 5: 0.4}
    history = [{"round": k, "validation": {"accuracy": others.get(k, 0.9 if k < 2 else 0.5)}} for k in range(8)]
    history = [{**line, "lost": True} if line["round"] in lost else line for line in history]
    task, config = open_workspace(tiny_config()).task, parse_config("", ["selection.patience=2"])
    selections = [Selection(config, task, history[:ended]) for ended in (2, 7, 8)]
    assert [selection.best and selection.best.round for selection in selections] == [None, 2, 2]
    assert [selection.stopped is not None for selection in selections] == [False, False, True]


def test_rounds_are_compared_that_are_of_the_same_clients(tiny_config: MakeConfig) -> None:
    config = parse_config("", ["evaluation.on=clients", "selection.patience=9"])
    task = open_workspace(tiny_config()).task
    sizes = {"0": 50.0, "1": 60.0, "2": 5.0}

    def selected(*rounds: tuple[float, str], sampled: bool = False) -> tuple[int | None, list[str]]:
        """The best round by (accuracy, the clients that report), and what is said."""
        table = config.evaluation.model_copy(update={"clients_fraction": 0.5 if sampled else 1.0})
        selection, said = Selection(config.model_copy(update={"evaluation": table}), task, []), []
        for number, (value, there) in enumerate(rounds):
            clients = {k: {"examples": sizes[k]} for k in there}
            left_out = {} if sampled else {k: "away" for k in sizes if k not in there}
            found = {"clients": clients, "left_out": left_out}
            selection.see({"round": number, "validation": {"accuracy": value}, "federated": found})
            said += [selection.said] if selection.said else []
        return selection.best and selection.best.round, said

    all_there = (0.1, "012"), (0.5, "012")
    assert selected(*all_there, (0.9, "012")) == (2, [])
    best, said = selected(*all_there, (0.9, "02"), (0.6, "012"))  # who holds half of the examples is away
    assert best == 3
    assert [line.split(" ")[1] for line in said] == ["2"]
    assert "client 1 " in said[0]
    assert selected(*all_there, (0.9, "01")) == (2, [])  # who holds few of them
    away = [(0.3 + number / 100, "02") for number in range(4)]
    assert selected(*all_there, *away)[0] == 5  # rounds 4 and 5 are compared with each other
    assert selected(*all_there, *away, (0.2, "012"), (0.25, "012"))[0] == 7  # and again with who is back
    assert selected((0.1, "0"), (0.9, "0"), (0.3, "01"))[0] == 2  # a client that has joined
    assert selected((0.1, "0"), (0.9, "1"), (0.3, "2"), sampled=True)[0] == 1  # other clients are asked by chance


@pytest.mark.parametrize(
    ("keys", "kind", "code", "names"),
    [
        (["evaluation.on=off", "selection.patience=2"], ConfigError, "selection-without-evaluation", "[selection]"),
        (["evaluation.min_examples=3"], ConfigError, "key-without-effect", "evaluation.on = 'clients'"),
        (["data.validation_fraction=0.3"], ConfigError, "key-without-effect", "[selection]"),
        (["evaluation.on=clients", "data.test=x.csv"], ConfigError, "key-without-effect", "data.test"),
        (
            ["evaluation.on=clients", "privacy={unit='client', epsilon=3.0, delta=1e-3, clip_norm=1}"],
            PrivacyError,
            "evaluation-not-private",
            "evaluation.on = 'server'",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_line(
    keys: list[str], kind: type[Exception], code: str, names: str
) -> None:
    with raises(kind, code, names):
        parse_config("", keys)


def test_an_unknown_figure_is_named(tiny_config: MakeConfig) -> None:
    with raises(ConfigError, "unknown-metric", "selection.metric", "macro_f1"):
        simulate(tiny_config("selection.metric=macrof1"))


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_compare_takes_the_round_that_was_kept(tiny_config: MakeConfig) -> None:
    from fedlora.compare._runs import read_run

    outcome = simulate(tiny_config(*OVERFITS, "rounds=6"))
    run = read_run(outcome.rundir.path)
    kept = outcome.rundir.read_json("result.json")["kept_round"]
    assert run.final == outcome.records[kept]["accuracy"]
    assert json.loads((outcome.rundir.path / "result.json").read_text())["last"]["round"] == kept
