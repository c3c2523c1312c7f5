"""The audit of a config sees what the config's own training does, and says so by its exit status."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import PLAIN, invoke, succeeds
from support.errors import raises

from fedlora.audit import run_audit as module
from fedlora.audit.run_audit import Finding, attack, check, through_model
from fedlora.config import parse_config
from fedlora.errors import PrivacyError
from fedlora.privacy.audit import AuditResult, audit_in_one_run
from fedlora.privacy.calibrate import Schedule
from fedlora.privacy.checks import Check
from fedlora.privacy.dpsgd import PrivateStep
from fedlora.privacy.mutants import MUTANTS
from fedlora.training import dp_loop as private_cohort
from fedlora.training import opacus_loop, open_workspace
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.workspace import Workspace

M = 2000
CLAIM, SIGMA = 4.0, 1.0815
EXAMPLE = ["server.weighting='uniform'", "privacy.max_grad_norm=0.3", "privacy.public_examples=40"]
CLIENT = ["server.aggregation_error=false", "privacy.unit='client'", "privacy.clip_norm=0.5"]


@pytest.fixture
def workspace(audited_overrides: list[str]) -> Workspace:
    return open_workspace(parse_config("", [*audited_overrides, *EXAMPLE]))


def attacked(workspace: Workspace) -> AuditResult:
    settings = PrivateSettings(Schedule(1.0, 1, 1, M / 2), SIGMA, 0.3, physical_batch_size=500)
    attack, count = through_model(workspace, settings, M)
    return audit_in_one_run(attack, claimed=CLAIM, delta=1e-5, canaries=count, generator=np.random.default_rng(0))


@pytest.fixture(params=["an adapter for each example", "hooks"])
def way(request: pytest.FixtureRequest, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two private loops trains."""
    assert module.why_alone(workspace.base) is None
    if request.param == "hooks":
        monkeypatch.setattr(module, "why_alone", lambda base: "told so")
    return str(request.param)


def breaks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The mutant, inside the training that federations run."""

    def make(*args: Any, **kwargs: Any) -> PrivateStep:
        step = PrivateStep(*args, **kwargs)
        MUTANTS[name](step)
        return step

    monkeypatch.setattr(opacus_loop, "PrivateStep", make)
    if name == "no clipping":
        monkeypatch.setattr(
            private_cohort.PrivateTrainingLoop, "_clipped_sums", lambda self, gradients, *rest: gradients.sum(0)[None]
        )
        return
    real, factor = private_cohort.noise, {"noise / 4": 1 / 4, "noise / n": 2 / M, "no noise": 1e-9}[name]
    monkeypatch.setattr(private_cohort, "noise", lambda std, *rest: real(std * factor, *rest))


def test_the_training_of_a_federation_holds(workspace: Workspace, way: str) -> None:
    before = workspace.base.model
    found = attacked(workspace)
    assert 0.5 < found.lower_bound < CLAIM  # the attack sees the canaries, and not more of them than was claimed
    assert workspace.base.model is before
    assert not any("canaries" in name for name, _ in before.named_modules())


@pytest.mark.parametrize("name", ["noise / 4", "no clipping", pytest.param("noise / n", marks=pytest.mark.slow)])
def test_what_goes_wrong_inside_the_training_of_a_federation_is_caught(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    breaks(monkeypatch, name)
    assert attacked(workspace).refuted


def test_training_without_any_noise_is_caught_or_does_not_even_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    breaks(monkeypatch, "no noise")
    if way == "hooks":  # fresh adapters have no gradient for A: without noise it stays
        with raises(PrivacyError, "private-training-failed"):
            attacked(workspace)
    else:  # the canaries move it
        assert attacked(workspace).refuted


def test_findings_are_bad_when_a_claim_falls_or_a_mutant_stands() -> None:
    fallen, standing = AuditResult(1.0, 2.0, 9, 10), AuditResult(1.0, 0.5, 6, 10)
    verdicts = [
        (Finding.of("x", result, broken=mutant).bad, Finding.of("x", result, broken=mutant).verdict)
        for result in (fallen, standing)
        for mutant in (False, True)
    ]
    assert verdicts == [(True, "REFUTED"), (False, "caught"), (False, "holds"), (True, "missed")]


@pytest.mark.nightly
def test_the_rows_of_user_level_privacy(audited_overrides: list[str]) -> None:
    equal = ["server.weighting='uniform'", "rounds=2"]
    workspace = open_workspace(parse_config("", [*audited_overrides, *CLIENT, *equal]))
    found = list(attack(workspace, 4, canaries=2000))
    assert [finding.what.strip() for finding in found] == [
        "the heaviest of 4 clients, 1 round",
        "the same, all but 2 drop out",
        "your claim, 2 rounds",
        "noise / 4",
    ]
    assert not any(finding.bad for finding in found)
    unequal = ["partition={name='quantity', clients=8, alpha=0.1}", "server.weighting='examples'"]
    workspace = open_workspace(parse_config("", [*audited_overrides[:4], *audited_overrides[5:], *CLIENT, *unequal]))
    found = list(attack(workspace, 8, canaries=2000))
    assert "noise for equal weights" in [finding.what.strip() for finding in found]
    assert not any(finding.bad for finding in found)
    workspace = open_workspace(
        parse_config("", [*audited_overrides, *CLIENT, *equal, "privacy.adaptive_clipping=true"])
    )
    found = list(attack(workspace, 4, canaries=2000))
    assert found[-1].what.strip() == "clip norm with little noise"
    assert not any(finding.bad for finding in found)


def test_a_config_without_a_claim_has_nothing_to_audit(audited_overrides: list[str]) -> None:
    workspace = open_workspace(parse_config("", audited_overrides[:-2]))
    with raises(PrivacyError, "not-private", "[privacy]"):
        next(check(workspace, 4))
    with raises(PrivacyError, "not-private", "[privacy]"):
        next(attack(workspace, 4))


# ------------------------------------------------------------------------------------------------ fedlora audit


def lines(*rows: Finding | Check) -> Callable[..., Iterator[Finding | Check]]:
    return lambda *args, **kwargs: iter(rows)


@pytest.mark.parametrize(
    ("bound", "broken", "bad", "status", "says"),
    [
        (0.5, False, False, 0, "holds"),
        (1.5, True, False, 0, "caught"),
        (1.5, False, False, 1, "a claim is refuted"),
        (0.5, True, False, 1, "raise --canaries"),
        (0.5, False, True, 1, "a claim is refuted"),
    ],
)
def test_the_exit_status(
    audited_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bound: float,
    broken: bool,
    bad: bool,
    status: int,
    says: str,
) -> None:
    row = Finding.of("the step", AuditResult(1.0, bound, 300, 400), broken=broken)
    monkeypatch.setattr(module, "attack", lines(row))
    monkeypatch.setattr(module, "check", lines(Check("the norm", "1.4 C", "at most 1 C", bad)))
    path = tmp_path / "private.toml"
    path.write_text(parse_config("", [*audited_overrides, *EXAMPLE]).to_toml())
    done = invoke("audit", path, env=PLAIN)
    assert done.exit_code == status
    assert says in done.output
    assert "300/400" in done.output
    assert "1.4 C" in done.output


@pytest.mark.slow
def test_the_whole_command(audited_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "private.toml"
    path.write_text(parse_config("", [*audited_overrides, *EXAMPLE]).to_toml())
    done = succeeds("audit", path, env=PLAIN)
    assert done.output.count("caught") == 8
    assert done.output.count("holds") >= 5 + 12
    breaks(monkeypatch, "noise / n")  # the tiny model has few entries for canaries: a quarter is found in one column
    done = invoke("audit", path, env=PLAIN)
    assert done.exit_code == 1
    assert done.output.count("REFUTED") >= 2 + 1
