"""User-level privacy in whole federations: what is claimed, what is written down, what is refused, and crashes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.errors import raises
from support.federations import deploy
from support.federations import simulate as run
from support.interrupted import cut, cut_before_checkpoint
from support.tiny_federations import MakeConfig

from fedlora.aggregators import load_aggregator
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, FedloraError, PrivacyError
from fedlora.federation import client
from fedlora.federation.client_pool import ClientReply, Failure
from fedlora.federation.load_rule import load_rule
from fedlora.federation.local_clients import LocalClients
from fedlora.federation.privacy_account import open_account
from fedlora.federation.run import RunOutcome
from fedlora.federation.screen import Screen
from fedlora.federation.server import FederatedServer
from fedlora.privacy import server_dp as central_module
from fedlora.privacy.accounting import Entry
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.server_dp import CLIP
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import refuse_early, run_simulation
from fedlora.testing.loopback_grid import LoopbackGrid
from fedlora.training.workspace import open_workspace

Z, ROUNDS, DELTA = 2.0, 3, 1e-3


@pytest.fixture
def central(tiny_config: MakeConfig) -> MakeConfig:
    def make(*overrides: str, name: str = "central", noise: str = f"noise_multiplier={Z}") -> RunConfig:
        return tiny_config(
            "train.steps=1",
            "server.aggregation_error=false",
            f"evaluation.every={ROUNDS}",
            "privacy.unit=client",
            f"privacy.{noise}",
            f"privacy.delta={DELTA}",
            "privacy.clip_norm=0.05",
            f"rounds={ROUNDS}",
            *overrides,
            name=name,
        )

    return make


def resume(rundir: RunDir) -> RunOutcome:
    return run_simulation(rundir.config, RunDir.open(rundir.path), Callback(), resume=True)


def claim(outcome: RunOutcome) -> dict[str, Any]:
    return outcome.rundir.read_json("result.json")["privacy"]


def ledger(rundir: RunDir) -> Ledger:
    return Ledger(rundir.privacy_dir / "server.jsonl", unit="client")


# ------------------------------------------------------------------------------------------------ the claim


@pytest.mark.slow
def test_the_claim_is_that_of_another_library_and_says_that_it_is_user_level(central: MakeConfig) -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    outcome = run(central())
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(Z), ROUNDS))
    found = claim(outcome)
    assert found["epsilon"] == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)
    assert (found["unit"], found["delta"], found["rounds_dropped"]) == ("client", DELTA, 0)
    for words in ("one whole client", "the server, which is trusted", "who answered and with how many examples counts"):
        assert words in found["statement"]
    assert ledger(outcome.rundir).entries() == (Entry(1.0, Z, ROUNDS),)
    spent = [record["epsilon"] for record in outcome.records[1:]]
    assert spent == sorted(spent)
    assert spent[-1] == found["epsilon"]


@pytest.mark.slow
def test_a_calibrated_run_ends_just_below_its_epsilon_whatever_share_of_the_clients_is_asked(
    central: MakeConfig,
) -> None:
    assert 3.99 < claim(run(central(noise="epsilon=4")))["epsilon"] <= 4
    few = claim(run(central("server.clients_per_round=2", "server.weighting=uniform", noise="epsilon=4", name="few")))
    assert 3.99 < few["epsilon"] <= 4  # no amplification: the seed of the draw is known
    assert "examples" not in few["statement"].split("counts as public")[0].rsplit(";", 1)[1]


@pytest.mark.parametrize(
    ("weighting", "unequal"), [pytest.param("uniform", False, marks=pytest.mark.slow), ("examples", True)]
)
def test_noise_follows_the_largest_share_of_the_replies_that_came(
    central: MakeConfig, weighting: str, unequal: bool
) -> None:
    unequally = ["partition.name=quantity", "partition.clients=4", "partition.alpha=0.5"]
    config = central("rounds=1", f"server.weighting={weighting}", *unequally)
    sizes = [len(part) for part in open_workspace(config).data.clients]
    share = max(sizes) / sum(sizes) if unequal else 1 / len(sizes)
    record = run(config).records[-1]
    assert record["rule"]["noise_std"] == pytest.approx(Z * 0.05 * share)


def test_the_global_model_moves_by_clipped_updates_and_noise_alone(
    central: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = central("rounds=1", "privacy.clip_norm=1e-3", "train.lr=0.1")
    monkeypatch.setattr(central_module, "_noise", lambda like, std, generator: torch.zeros_like(like))
    start = open_workspace(quiet).base.initial_adapter(quiet.seed).tensors()
    after = run(quiet).state.adapter.tensors()
    moved = math.sqrt(sum(float((after[n].double() - t.double()).square().sum()) for n, t in start.items()))
    assert 1e-4 < moved <= 1e-3 * 1.001
    monkeypatch.undo()
    one, other = run(quiet).state.adapter.tensors(), run(quiet).state.adapter.tensors()
    assert all(not torch.equal(one[name], other[name]) for name in one)  # noise is not the seed's


def test_adaptive_clipping_goes_on_after_a_resume(central: MakeConfig) -> None:
    # The norms are noised, so that no two runs have the same: what is held is that each round has the last one's.
    config = central("privacy.adaptive_clipping=true", "privacy.clip_norm=10", "privacy.clip_lr=1.0")
    rundir = RunDir.create(config)
    cut(rundir, 3)
    kept = rundir.checkpoints.latest()
    assert kept is not None
    before = float(kept.memory[CLIP])
    assert before != 10
    outcome = resume(rundir)
    norms = [record["rule"]["clip_norm"] for record in outcome.records[1:]]
    assert norms[0] == 10
    assert norms[2] == pytest.approx(before)
    assert claim(outcome)["epsilon"] == pytest.approx(ledger(outcome.rundir).epsilon(DELTA))
    assert ledger(outcome.rundir).entries() == (Entry(1.0, Z, ROUNDS),)  # the count query is paid for in it


# ------------------------------------------------------------------------------------------------ leaks


def test_the_runs_files_hold_no_figure_of_a_client(central: MakeConfig) -> None:
    outcome = run(central("server.weighting=uniform"))
    for record in outcome.records[1:]:
        assert record["train_loss"] is None
        assert "aggregation_error" not in record
        assert all(row == {"num_examples": 1.0} for row in record["clients"].values())
        assert record["rule"].keys() == {"dropped", "clip_norm", "noise_std"}
    assert not {path.name for path in outcome.rundir.path.iterdir()} & {"partition.json", "labels.png"}


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_even_the_trusted_server_is_told_no_figure_but_what_weights_need(
    central: MakeConfig, monkeypatch: pytest.MonkeyPatch, weighting: str
) -> None:
    sent: list[dict[str, Any]] = []
    real = LoopbackGrid._pull

    def pull(self: LoopbackGrid, key: str) -> Any:
        reply = real(self, key)
        if "metrics" in reply.content:
            sent.append(dict(reply.content.metric_records["metrics"]))
        return reply

    monkeypatch.setattr(LoopbackGrid, "_pull", pull)
    config = central("rounds=1", "train.clip_norm=1.0", f"server.weighting={weighting}")
    deploy(config)
    sizes = [len(rows) for rows in open_workspace(config).data.clients]
    assert sent == [{"num_examples": 1 if weighting == "uniform" else size} for size in sizes]


@pytest.mark.parametrize("run", [run, deploy])
def test_a_client_whose_training_fails_sends_an_update_that_changes_nothing(
    central: MakeConfig, monkeypatch: pytest.MonkeyPatch, run: Callable[..., RunOutcome]
) -> None:
    real = client.train_requests

    def fails(workspace: Any, requests: Any, *rest: Any) -> list[Any]:
        return [
            ValueError("patient Quaxby") if one.client_id == 2 else found
            for one, found in zip(requests, real(workspace, requests, *rest), strict=True)
        ]

    monkeypatch.setattr(client, "train_requests", fails)
    moved: dict[int, bool] = {}
    admit = Screen.admit

    def admits(self: Screen, reply: Any, request: Any, sent: Any, *rest: Any) -> Any:
        moved[request.client_id] = any(not torch.equal(sent[name], start) for name, start in request.starts.items())
        return admit(self, reply, request, sent, *rest)

    monkeypatch.setattr(Screen, "admit", admits)
    outcome = run(central("rounds=1", "server.weighting=uniform"))
    assert outcome.records[-1]["answered"] == [0, 1, 2, 3]
    assert moved == {0: True, 1: True, 2: False, 3: True}
    # A name, since four digits stand in one of twenty runs by chance, among the hexadecimal ids of a ledger.
    assert b"Quaxby" not in b"".join(p.read_bytes() for p in outcome.rundir.path.rglob("*") if p.is_file())


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "code", "named"),
    [
        (["strategy.name=flora"], "rule-not-linear", "Flora"),
        (["strategy.name=fair"], "rule-not-linear", "Fair"),
        (["strategy.name=ffa", "clients.ranks=[4,2]"], "different-starts", "rank"),
        (["privacy.delta=0.25"], "delta-too-large", "1 / 4"),
        (["privacy.minimum_cohort=5"], "cohort-below-minimum", "5"),
        (["server.clients_per_round=1"], "cohort-below-minimum", "1"),
    ],
)
def test_refused_before_anything_is_made(central: MakeConfig, overrides: list[str], code: str, named: str) -> None:
    config = central(*overrides)
    for refuses in (lambda: refuse_early(config, open_workspace(config)), lambda: run(config), lambda: deploy(config)):
        with raises(FedloraError, code, named):
            refuses()


@pytest.mark.parametrize(
    ("overrides", "error", "code", "named"),
    [
        (["server.aggregation_error=true"], PrivacyError, "aggregation-error-tells", "server.aggregation_error"),
        (["server.max_norm=1.0"], PrivacyError, "norm-limit-couples-clients", "server.max_norm"),
        (["privacy.max_grad_norm=1.0"], ConfigError, "unknown-key", "'privacy.max_grad_norm'"),
        (["privacy.unit=user"], ConfigError, "unknown-name", "'user'"),
        (["privacy.epsilon=3"], PrivacyError, "not-exactly-one", "privacy.epsilon"),
        (["privacy.clip_norm=0"], ConfigError, "bad-value", "privacy.clip_norm"),
        (["privacy.minimum_cohort=1"], ConfigError, "bad-value", "privacy.minimum_cohort"),
    ],
)
def test_configs_that_make_no_claim_are_refused(
    central: MakeConfig, overrides: list[str], error: type[FedloraError], code: str, named: str
) -> None:
    with raises(error, code, named):
        central(*overrides)


def test_a_rule_without_noise_cannot_slip_in(central: MakeConfig, tmp_path: Path) -> None:
    config = central()
    rundir = RunDir.create(config)
    with raises(PrivacyError, "wrong-rule"):
        open_account(config, load_aggregator("fedavg", {}), rundir)
    plain = config.model_copy(update={"privacy": None})
    with raises(PrivacyError, "wrong-rule"):
        open_account(plain, load_rule(config), rundir)
    assert load_rule(config).entry() == Entry(1.0, Z, 1)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ dropped rounds


def test_a_round_with_too_few_replies_changes_nothing_and_costs_nothing(
    central: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalClients._outcome

    def outcome_(self: LocalClients, request: Any, *rest: Any) -> Any:
        reply = real(self, request, *rest)
        if request.number != 2 or reply.client_id == 0:
            return reply
        return ClientReply(reply.client_id).failed(Failure("missing"))

    monkeypatch.setattr(LocalClients, "_outcome", outcome_)
    outcome = run(central("privacy.minimum_cohort=3", "server.quorum=0.1"))
    first, second, third = outcome.records[1:]
    assert [r["rule"]["dropped"] for r in (first, second, third)] == [0.0, 1.0, 0.0]
    assert first["epsilon"] == second["epsilon"] < third["epsilon"]
    assert ledger(outcome.rundir).entries() == (Entry(1.0, Z, 2),)
    assert claim(outcome)["rounds_dropped"] == 1
    assert ledger(outcome.rundir).rounds(outcome.rundir.run_id) == {1, 3}


# ------------------------------------------------------------------------------------------------ crashes


def _killed(*args: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_run_reports_what_an_uninterrupted_one_does(
    central: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = claim(run(central(noise="epsilon=4", name="whole")))
    rundir = RunDir.create(central(noise="epsilon=4", name="cut"))
    cut(rundir, 2)
    for _ in range(2):  # killed in the middle of a round, after its clients have answered
        with monkeypatch.context() as patch:
            patch.setattr(FederatedServer, "_line", _killed)
            with pytest.raises(KeyboardInterrupt):
                resume(rundir)
    assert claim(resume(rundir)) == whole
    events = [json.loads(line)["event"] for line in ledger(rundir).path.read_text().splitlines()]
    assert events.count("void") == 2  # the first kill came before anything of the round was asked
    assert events.count("released") == ROUNDS


def test_figures_without_their_checkpoint_count_twice(central: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = RunDir.create(central())
    cut_before_checkpoint(rundir, 2, monkeypatch)
    outcome = resume(rundir)
    assert ledger(rundir).entries() == (Entry(1.0, Z, ROUNDS + 1),)
    assert claim(outcome)["epsilon"] == ledger(rundir).epsilon(DELTA)


def test_a_resume_without_its_ledger_is_refused(central: MakeConfig) -> None:
    rundir = RunDir.create(central())
    cut(rundir, 3)
    ledger(rundir).path.unlink()
    with raises(PrivacyError, "ledger-lacks-round", "round 1", ledger(rundir).path):
        resume(rundir)


def test_a_budget_that_was_spent_elsewhere_ends_the_run(central: MakeConfig) -> None:
    config = central(noise="epsilon=4")
    rundir = RunDir.create(config)
    with ledger(rundir).spend(load_rule(config).entry(), run="earlier", round=1) as attempt:  # type: ignore[attr-defined]
        attempt.release()
    with raises(PrivacyError, "budget-spent"):
        run_simulation(config, rundir, Callback())
    assert rundir.read_metrics()[-1]["round"] == ROUNDS - 1
