"""Whole private federations: what leaves a client, what is spent, and what a crash costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from support.errors import raises
from support.federations import Said, deploy
from support.federations import simulate as run
from support.interrupted import cut, cut_before_checkpoint
from support.tiny_federations import MakeConfig

from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import DataError, PrivacyError, ReplyError, RoundError, RunDirError
from fedlora.federation import client_training, private_client
from fedlora.federation.client_ledger import ledger_path
from fedlora.federation.example_level_account import ExampleLevelAccount
from fedlora.federation.run import RunOutcome
from fedlora.flower import client_app
from fedlora.flower.task_identity import task_identity
from fedlora.privacy.accounting import Entry
from fedlora.privacy.disclosure import WITHHELD, Disclosure
from fedlora.privacy.ledger import Ledger
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.terminal import totals
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.dp_settings import private_settings

Q, SIGMA, STEPS, ROUNDS, DELTA = 0.25, 1.5, 2, 3, 1e-3


@pytest.fixture
def private(tiny_config: MakeConfig) -> MakeConfig:
    def make(*overrides: str, name: str = "private", noise: str = f"noise_multiplier={SIGMA}") -> RunConfig:
        batch = 40 if noise.startswith("epsilon") else 10  # with q = 1 the calibration is a matter of milliseconds
        return tiny_config(
            "server.weighting=uniform",
            f"train.steps={STEPS}",
            f"train.batch_size={batch}",
            "privacy.public_examples=40",
            f"privacy.delta={DELTA}",
            "privacy.max_grad_norm=0.5",
            "privacy.accountant=rdp",
            f"evaluation.every={ROUNDS}",
            f"privacy.{noise}",
            f"rounds={ROUNDS}",
            *overrides,
            name=name,
        )

    return make


def resume(rundir: RunDir, progress: Callback | None = None) -> RunOutcome:
    return run_simulation(rundir.config, RunDir.open(rundir.path), progress or Callback(), resume=True)


def claim(outcome: RunOutcome) -> dict[str, Any]:
    return outcome.rundir.read_json("result.json")["privacy"]


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Everything that the clients send, as it leaves them."""
    sent: list[Message] = []
    real = LoopbackGrid._pull

    def pull(self: LoopbackGrid, key: str) -> Message:
        sent.append(real(self, key))
        return sent[-1]

    monkeypatch.setattr(LoopbackGrid, "_pull", pull)
    return sent


# ------------------------------------------------------------------------------------------------ the claim


@pytest.mark.slow
def test_the_claim_is_that_of_another_library_and_names_its_unit(private: MakeConfig) -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    says = Said()
    outcome = run(private("privacy.accountant=prv"), says)
    accountant = PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(Q, dp_accounting.GaussianDpEvent(SIGMA))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, STEPS * ROUNDS))
    truth = accountant.get_epsilon(DELTA)
    found = claim(outcome)
    assert truth * 0.9999 <= found["epsilon"] <= truth * 1.01
    assert (found["delta"], found["unit"], found["accountant"], found["source"]) == (DELTA, "example", "prv", "ledgers")
    assert says.lines[-1] == found["statement"]
    assert "one example of one client" in found["statement"]
    assert f"{DELTA:g}" in found["statement"]
    assert totals(outcome.records, found["statement"]).endswith("\n" + found["statement"])
    spent = [record["epsilon"] for record in outcome.records[1:]]
    assert spent == sorted(spent)
    assert spent[-1] == found["epsilon"]


@pytest.mark.slow
def test_a_calibrated_run_ends_just_below_its_epsilon(private: MakeConfig) -> None:
    found = claim(run(private(noise="epsilon=4")))
    assert 3.99 < found["epsilon"] <= 4


def test_the_largest_client_counts_and_clients_that_were_not_asked_spend_nothing(private: MakeConfig) -> None:
    config = private("privacy.public_examples=[40,400]", "server.clients_per_round=1")
    outcome = run(config)
    asked = [record["asked"][0] for record in outcome.records[1:]]
    folder = outcome.rundir.privacy_dir
    for k in range(4):
        ledger = Ledger(ledger_path(folder, k))
        steps = STEPS * asked.count(k)
        q = 10 / (400 if k % 2 else 40)
        assert ledger.entries() == ((Entry(q, SIGMA, steps),) if steps else ())
    largest = max(Ledger(ledger_path(folder, k)).epsilon(DELTA, "rdp") for k in range(4))
    assert claim(outcome)["epsilon"] == largest
    # A server without the ledgers adds up what it asked, and says so.
    summary = ExampleLevelAccount(config, outcome.rundir).summary(outcome.records)
    assert summary["epsilon"] == largest
    assert summary["source"] == "plan"
    assert "each client's own ledger has the last word" in summary["statement"]


def test_two_runs_of_one_seed_differ_by_the_noise(private: MakeConfig) -> None:
    one, other = run(private("rounds=1", name="a")), run(private("rounds=1", name="b"))
    first, second = one.state.adapter.tensors(), other.state.adapter.tensors()
    assert all(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_without_noise_a_private_federation_learns(private: MakeConfig) -> None:
    quiet = private("rounds=6", "train.steps=8", "train.batch_size=20", noise="noise_multiplier=1e-6")
    records = run(quiet).records
    assert records[-1]["accuracy"] > records[0]["accuracy"] + 0.2


SLOW = [pytest.param(rule, marks=pytest.mark.slow) for rule in ("ffa", "fair")]


@pytest.mark.parametrize("rule", ["flora", *SLOW])
def test_every_rule_takes_noised_updates(private: MakeConfig, rule: str) -> None:
    outcome = run(private(f"strategy.name={rule}", "rounds=2", "evaluation.every=2"))
    assert outcome.records[-1]["answered"] == [0, 1, 2, 3]
    assert "aggregation_error" in outcome.records[-1]  # computed from noised updates: post-processing


# ------------------------------------------------------------------------------------------------ leaks


@pytest.mark.slow
def test_nothing_leaves_a_client_but_noised_tensors_and_public_figures(
    private: MakeConfig, replies: list[Message], tmp_path: Path
) -> None:
    outcome = deploy(private(), ledgers=tmp_path / "ledgers")
    require_public_figures_alone(outcome)
    notes = [json.loads(str(reply.content.config_records["reply"]["json"])) for reply in replies]
    hellos = [note for note in notes if note["kind"] == "hello"]
    assert len(hellos) == 4
    assert all(note.keys() == {"protocol", "kind", "client_id", "fedlora", "fingerprint"} for note in hellos)
    updates = [(reply, note) for reply, note in zip(replies, notes, strict=True) if note["kind"] == "update"]
    assert len(updates) == 4 * ROUNDS
    heads = [set(note) for _, note in updates]
    assert all(head == {"protocol", "kind", "round", "base_digest", "layout", "ledger"} for head in heads)
    # Hashes over what was asked for and random names: the line of each ledger that says that this very update left.
    lines = [json.loads(line) for k in range(4) for line in ledger_path(tmp_path / "ledgers", k).open()]
    assert {note["ledger"] for _, note in updates} == {line["hash"] for line in lines if line["event"] == "released"}
    assert len({note["layout"] for _, note in updates}) == 1  # of the tensors that were asked for, whoever answers
    for reply, note in updates:
        assert set(reply.content) == {"reply", "update", "metrics"}
        assert dict(reply.content.metric_records["metrics"]) == {
            "num_examples": 1,
            "steps": float(STEPS),
            "sample_rate": Q,
            "noise_multiplier": SIGMA,
            "max_grad_norm": 0.5,
            "attempts": float(note["round"]),
        }


def test_nothing_of_a_simulation_is_written_but_public_figures(private: MakeConfig) -> None:
    require_public_figures_alone(run(private()))


def require_public_figures_alone(outcome: RunOutcome) -> None:
    public = {"num_examples", "steps", "sample_rate", "noise_multiplier", "max_grad_norm", "attempts"}
    for record in outcome.records[1:]:
        assert record["train_loss"] is None
        assert all(row.keys() == public and row["num_examples"] == 1 for row in record["clients"].values())
    names = {path.name for path in outcome.rundir.path.iterdir()}
    assert not names & {"partition.json", "labels.png"}


def test_simulated_time_is_that_of_the_declared_number(private: MakeConfig) -> None:
    profile = 'clients.profiles=[{name="slow", examples_per_s=10}]'
    outcome = run(private("rounds=1", profile))
    seconds = {row["simulated_seconds"] for row in outcome.records[1]["clients"].values()}
    assert seconds == {STEPS * 10 / 10}


@pytest.mark.parametrize("error", [ValueError("label 7 of text 'x'"), DataError("row 13 is bad")])
def test_errors_tell_nothing_of_the_data(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, replies: list[Message], tmp_path: Path, error: Exception
) -> None:
    def breaks(*args: object) -> None:
        raise error

    monkeypatch.setattr(client_training, "train_private_cohort", breaks)
    for refuses in (lambda: run(private()), lambda: deploy(private(name="sent"), ledgers=tmp_path / "ledgers")):
        with raises(RoundError, "no-quorum", WITHHELD) as info:
            refuses()
        assert str(error) not in str(info.value)
    assert len(replies) == 4 + 4 * ROUNDS  # hellos, then each round that nobody got through
    assert not any(str(error) in str(reply.content) for reply in replies)


@pytest.mark.slow
def test_a_loss_that_explodes_is_not_reported(private: MakeConfig, replies: list[Message], tmp_path: Path) -> None:
    config = private("train.lr=3e38", "train.optimizer=sgd", "privacy.max_grad_norm=100")
    for refuses in (lambda: run(config), lambda: deploy(config, ledgers=tmp_path / "ledgers")):
        with raises(RoundError, "no-quorum", "lower train.lr"):
            refuses()
    assert len(replies) == 4 + 4 * ROUNDS  # hellos, then each round that nobody got through
    assert not any("loss" in str(reply.content) for reply in replies)


@pytest.mark.slow
def test_an_update_with_more_than_public_figures_is_refused(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = private_client._private_figures
    monkeypatch.setattr(private_client, "_private_figures", lambda *args: {**real(*args), "loss": 0.5})
    with raises(RoundError, "no-quorum", "'loss'", "fedlora.privacy.disclosure"):
        run(private())
    monkeypatch.setattr(Disclosure, "require_reply", lambda *args: None)
    for refuses in (run, lambda config: deploy(config, ledgers=tmp_path / "ledgers")):
        with raises(RoundError, "no-quorum", "metric 'loss' was not asked for"):
            refuses(private(name="again"))


def test_a_client_without_examples_answers_like_the_others(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client_training.examples_of_client
    none = np.empty(0, np.int64)
    monkeypatch.setattr(client_training, "examples_of_client", lambda w, k: none if k == 2 else real(w, k))
    outcome = run(private())
    assert outcome.records[-1]["answered"] == [0, 1, 2, 3]
    rows = outcome.records[-1]["clients"]
    assert rows["2"] == rows["1"]


# ------------------------------------------------------------------------------------------------ budgets


def test_a_client_whose_budget_is_spent_is_not_asked_again(private: MakeConfig) -> None:
    config = private(noise="epsilon=4")
    rundir = RunDir.create(config)
    entry = private_settings(config, 0).entry
    with Ledger(ledger_path(rundir.privacy_dir, 1), session="x").spend(entry, run="earlier", round=1) as attempt:
        attempt.release()
    outcome = run_simulation(config, rundir, Callback())
    first, second, last = outcome.records[1:]
    assert (first["answered"], first["spent"], second["spent"]) == ([0, 1, 2, 3], [], [])
    assert "privacy budget is spent: its ledger stands at epsilon 3.99" in last["refused"]["1"]
    assert (last["asked"], last["answered"], last["spent"]) == ([0, 1, 2, 3], [0, 2, 3], [1])
    assert claim(outcome)["epsilon"] <= 4

    later = RunDir.create(private(noise="epsilon=4", name="later"))
    for k, spent_before in ((0, 2), (1, 3)):
        ledger = Ledger(ledger_path(later.privacy_dir, k), session="x")
        for number in range(spent_before):
            with ledger.spend(entry, run="earlier", round=number) as attempt:
                attempt.release()
    records = run_simulation(later.config, later, Callback()).records
    assert [record["asked"] for record in records[1:]] == [[0, 1, 2, 3], [0, 2, 3], [2, 3]]
    assert [record["spent"] for record in records[1:]] == [[1], [0, 1], [0, 1]]


def test_a_run_whose_budgets_are_all_spent_ends_with_a_clear_line(private: MakeConfig) -> None:
    config = private(noise="epsilon=4")
    rundir = RunDir.create(config)
    entry = private_settings(config, 0).entry
    for k in range(4):
        with Ledger(ledger_path(rundir.privacy_dir, k), session="x").spend(entry, run="earlier", round=1) as attempt:
            attempt.release()
    with raises(RoundError, "no-quorum", "round 3: 0 of 4", "privacy budget is spent"):
        run_simulation(config, rundir, Callback())
    assert [record["round"] for record in rundir.read_metrics()] == [0, 1, 2, 3]
    assert len(rundir.read_metrics()[-1]["refused"]) == 4
    assert rundir.rounds_done == 2  # what nobody answered is no round that was done


# ------------------------------------------------------------------------------------------------ resume


def test_a_run_killed_between_rounds_spends_what_an_uninterrupted_one_does(private: MakeConfig) -> None:
    whole = run(private(noise="epsilon=4", name="whole"))
    rundir = RunDir.create(private(noise="epsilon=4", name="cut"))
    for number in (2, 3):
        cut(RunDir.open(rundir.path), number, resume=number > 2)
    name = rundir.run_id
    assert claim(resume(rundir)) == claim(whole)
    assert rundir.run_id == name


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A kill in the middle of training, after so many clients."""
    left: list[int] = []
    real = client_training.train_private_cohort

    def train(base: Any, task: Any, data: Any, jobs: Any, *rest: Any) -> Any:
        result = real(base, task, data, jobs, *rest)
        if left:
            left[0] -= len(jobs)
            if left[0] <= 0:
                left.clear()
                raise KeyboardInterrupt
        return result

    monkeypatch.setattr(client_training, "train_private_cohort", train)
    return left


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_round_spends_what_an_uninterrupted_one_does(
    private: MakeConfig, killed_after: list[int]
) -> None:
    whole = run(private(noise="epsilon=4", name="whole"))
    rundir = RunDir.create(private(noise="epsilon=4", name="cut"))
    killed_after.append(6)  # the second client of round 2
    with pytest.raises(KeyboardInterrupt):
        run_simulation(rundir.config, rundir, Callback())
    killed_after.append(3)  # again, in the round that is repeated
    with pytest.raises(KeyboardInterrupt):
        resume(rundir)
    assert claim(resume(rundir)) == claim(whole)
    events = [json.loads(line)["event"] for line in ledger_path(rundir.privacy_dir, 1).read_text().splitlines()]
    assert events.count("void") == 2


@pytest.mark.slow
def test_figures_that_were_written_before_the_checkpoint_count_twice(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir = RunDir.create(private())
    cut_before_checkpoint(rundir, 2, monkeypatch)
    assert rundir.read_metrics()[-1]["round"] == 2
    outcome = resume(rundir)
    entries = Ledger(ledger_path(rundir.privacy_dir, 0)).entries()
    assert entries == (Entry(Q, SIGMA, STEPS * (ROUNDS + 1)),)
    assert claim(outcome)["epsilon"] == Ledger(ledger_path(rundir.privacy_dir, 0)).epsilon(DELTA, "rdp")


def test_a_failed_client_has_spent_even_if_its_round_is_repeated(
    private: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir = RunDir.create(private())

    def breaks(*args: object) -> None:
        raise ValueError

    with monkeypatch.context() as patch:
        patch.setattr(client_training, "train_private_cohort", breaks)
        with raises(RoundError, "no-quorum"):
            run_simulation(rundir.config, rundir, Callback())
    resume(rundir)
    assert Ledger(ledger_path(rundir.privacy_dir, 0)).entries() == (Entry(Q, SIGMA, STEPS * (ROUNDS + 1)),)


def test_a_resume_without_the_ledgers_is_refused(private: MakeConfig) -> None:
    rundir = RunDir.create(private())
    cut(rundir, 3)
    ledger_path(rundir.privacy_dir, 2).unlink()
    before = rundir.read_metrics()
    with raises(PrivacyError, "ledger-incomplete", "client-2.jsonl", "round 1"):
        resume(rundir)
    assert rundir.read_metrics() == before
    shutil.rmtree(rundir.privacy_dir)
    with raises(PrivacyError, "ledger-incomplete", "round 1"):
        resume(rundir)
    (rundir.path / "run-id").unlink()
    with raises(RunDirError, "run-id-missing", "run-id"):
        resume(rundir)


def test_a_resume_without_the_record_of_what_was_asked_is_refused(private: MakeConfig) -> None:
    rundir = RunDir.create(private())
    cut(rundir, 3)
    record = rundir.privacy_dir / "asked.jsonl"
    lines = record.read_bytes()
    record.unlink()
    with raises(PrivacyError, "ledger-incomplete", "asked.jsonl", "round 1"):
        resume(rundir)
    record.write_bytes(lines.replace(b'"steps"', b'"stops"', 1))
    with raises(PrivacyError, "ledger-damaged", "asked.jsonl", "line 1"):
        resume(rundir)
    record.write_bytes(lines + b'{"round": 3, "sta')  # cut short: nobody was asked
    assert resume(rundir).state.round == ROUNDS


@pytest.mark.slow
def test_more_rounds_are_refused_where_the_noise_was_calibrated_for_fewer(private: MakeConfig) -> None:
    calibrated = run(private(noise="epsilon=4")).rundir
    with raises(RunDirError, "noise-fixes-rounds", "rounds = 3"):
        RunDir.open(calibrated.path, private("rounds=4", noise="epsilon=4"))
    fixed = run(private(name="fixed")).rundir
    more = private("rounds=4", name="fixed")
    outcome = run_simulation(more, RunDir.open(fixed.path, more), Callback(), resume=True)
    assert Ledger(ledger_path(fixed.privacy_dir, 0)).entries() == (Entry(Q, SIGMA, STEPS * 4),)
    assert outcome.state.round == 4


# ------------------------------------------------------------------------------------------------ nodes


def context(node: dict[str, Any], run_config: dict[str, Any]) -> Context:
    return Context(77, 5, UserConfig({"partition-id": 0, **node}), RecordDict(), UserConfig(run_config))


def test_a_node_without_a_ledger_trains_nothing(private: MakeConfig) -> None:
    with raises(PrivacyError, "no-ledger", "--node-config 'ledger="):
        client_app.ledger_place(context({}, {})).open(0, "0" * 32)
    grid = LoopbackGrid(client_app.app, [{"partition-id": 0}], {"toml": private().to_toml()})
    with task_identity(run_id=1):
        question = Message(RecordDict({"hello": ConfigRecord({})}), 2, "query.hello")
        (reply,) = grid.send_and_receive([question])
    assert "num_examples" not in str(reply.content)
    # The run's own answer to it is the cure, and not that something failed which may tell of the data.
    with raises(RoundError, "no-quorum", "--node-config 'ledger="):
        deploy(private("server.max_failed_rounds=0"))


def test_a_nodes_own_ledger_cannot_be_replaced_and_releases_what_it_sends(tmp_path: Path) -> None:
    evil = {"ledger-dir": str(tmp_path), "run-id": "r", "session": "s"}
    run = "0" * 32

    def release(*args: object) -> None: ...

    own = client_app.ledger_place(context({"ledger": str(tmp_path / "mine.jsonl")}, evil)).open(0, run, release)
    assert (own.ledger.path, own.run, own.release) == (tmp_path / "mine.jsonl", run, release)
    shared = client_app.ledger_place(context({}, {"ledger-dir": str(tmp_path)})).open(3, run, release)
    assert (shared.ledger.path, shared.run, shared.release) == (tmp_path / "client-3.jsonl", run, release)
    local = client_app.ledger_place(context({}, evil))  # who answers messages releases, whatever the run's config says
    assert local.open(3, run, release).release == release
    for nameless in ("", None, 7, "0" * 31, "../" * 10 + "aa"):
        with raises(ReplyError, "no-run-id"):
            local.open(3, nameless)


@pytest.mark.slow
def test_a_node_writes_that_its_update_leaves_and_a_simulation_once_a_round_is_over(
    private: MakeConfig, tmp_path: Path
) -> None:
    def events(path: Path) -> list[str]:
        return [json.loads(line)["event"] for line in path.read_text().splitlines()]

    deploy(private(), nodes=[{"partition-id": k, "ledger": str(tmp_path / f"{k}.jsonl")} for k in range(4)])
    assert events(tmp_path / "0.jsonl") == ["started", "released"] * ROUNDS
    assert "released" not in events(ledger_path(run(private(name="simulated")).rundir.privacy_dir, 0))


@pytest.mark.slow
def test_baselines_of_a_private_run_are_refused(private: MakeConfig, tmp_path: Path) -> None:

    from support.command_line import invoke, succeeds

    file = tmp_path / "private.toml"
    file.write_text(private().to_toml())
    done = invoke("run", file, "--baselines")
    assert done.exit_code == 1
    assert "--baselines trains without privacy" in done.output
    done = succeeds("run", file)
    assert "-differential privacy for one example of one client" in done.output
    assert not (tmp_path / "runs" / "private" / "labels.png").exists()
