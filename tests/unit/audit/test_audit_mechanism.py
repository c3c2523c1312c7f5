"""`fedlora audit` checks the mechanism itself: sound training holds, and each way of breaking it is refuted.

An audit refutes sound training with probability 0.001 at most. So that a test of sound training says the same each
time, the operating system's random bytes are those of a seed there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from support.command_line import invoke
from support.private_mutants import ADAPTIVE, DROPPED, HOOKS, MERGED, STACKED, Mutant

from fedlora.audit.run_audit import check
from fedlora.config import parse_config
from fedlora.training import open_workspace

CLIENT = ["privacy.unit='client'", "privacy.clip_norm=0.5", "server.aggregation_error=false"]


@pytest.fixture
def same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", random.Random(1).randbytes)


@pytest.fixture
def overrides(audited_overrides: list[str]) -> list[str]:
    return [*audited_overrides, "train.batch_size=8", "server.weighting='uniform'"]


@pytest.fixture
def example(overrides: list[str]) -> list[str]:
    return [*overrides, "privacy.max_grad_norm=0.3", "privacy.public_examples=40"]


@pytest.fixture
def hooks(example: list[str]) -> Iterator[None]:
    """Training by Opacus's hooks, as where layers have no stacked form."""
    base = open_workspace(parse_config("", example)).base
    base.alone = "told so"
    yield
    base.alone = None


def audited(folder: Path, config: list[str], canaries: int = 1000) -> Result:
    path = folder / "private.toml"
    path.write_text(parse_config("", config).to_toml())
    command = ["audit", str(path), "--quick", "--canaries", str(canaries)]
    return invoke(*command, env={"COLUMNS": "150", "NO_COLOR": "1"})


def parametrised(mutants: dict[str, Mutant], often: str = "") -> pytest.MarkDecorator:
    """One mutant is slow; the others are nightly."""
    marks = {often: pytest.mark.slow}
    rows = [pytest.param(one, id=name, marks=marks.get(name, pytest.mark.nightly)) for name, one in mutants.items()]
    return pytest.mark.parametrize("mutant", rows)


@pytest.mark.slow
@pytest.mark.usefixtures("same_bytes")
def test_sound_training_holds(example: list[str], tmp_path: Path) -> None:
    done = audited(tmp_path, example)
    assert done.exit_code == 0, done.output
    assert "an adapter for each example" in done.output
    assert "REFUTED" not in done.output


@parametrised(dict(STACKED), "per-tensor clipping")
def test_broken_training_is_refuted(
    example: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Mutant
) -> None:
    mutant(monkeypatch)
    done = audited(tmp_path, example)
    assert done.exit_code == 1, done.output
    assert "REFUTED" in done.output


@pytest.mark.nightly
@pytest.mark.usefixtures("same_bytes")
def test_sound_training_with_dropout_holds(example: list[str], tmp_path: Path) -> None:
    done = audited(tmp_path, [*example, "model.dropout=0.1", "adapter.dropout=0.1"])
    assert done.exit_code == 0, done.output
    assert "dropout masks" in done.output


@parametrised(dict(DROPPED), "masks of the clients")
def test_masks_that_examples_share_are_refuted(
    example: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Mutant
) -> None:
    mutant(monkeypatch)
    done = audited(tmp_path, [*example, "model.dropout=0.1"])
    assert done.exit_code == 1, done.output
    assert "REFUTED" in done.output


@pytest.mark.nightly
@pytest.mark.usefixtures("same_bytes")
def test_sound_training_by_hooks_holds(example: list[str], tmp_path: Path, hooks: None) -> None:
    done = audited(tmp_path, example)
    assert done.exit_code == 0, done.output
    assert "Opacus" in done.output


@parametrised(dict(HOOKS))
def test_broken_training_by_hooks_is_refuted(
    example: list[str], tmp_path: Path, hooks: None, monkeypatch: pytest.MonkeyPatch, mutant: Mutant
) -> None:
    mutant(monkeypatch)
    done = audited(tmp_path, example)
    assert done.exit_code == 1, done.output
    assert "REFUTED" in done.output


@pytest.mark.slow
@pytest.mark.usefixtures("same_bytes")
def test_a_sound_merge_holds(overrides: list[str], tmp_path: Path) -> None:
    done = audited(tmp_path, [*overrides, *CLIENT])
    assert done.exit_code == 0, done.output
    assert "REFUTED" not in done.output


@parametrised(dict(MERGED), "an unclipped head")
def test_a_broken_merge_is_refuted(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Mutant
) -> None:
    mutant(monkeypatch)
    unequal = ["partition={name='quantity', clients=6, alpha=0.3}", "server.weighting='examples'"]
    kept = [one for one in overrides if not one.startswith(("partition", "server"))]
    done = audited(tmp_path, [*kept, *CLIENT, *unequal])
    assert done.exit_code == 1, done.output
    assert "REFUTED" in done.output


@pytest.mark.nightly
@pytest.mark.usefixtures("same_bytes")
def test_a_sound_adaptive_merge_holds(overrides: list[str], tmp_path: Path) -> None:
    done = audited(tmp_path, [*overrides, *CLIENT, "privacy.adaptive_clipping=true"])
    assert done.exit_code == 0, done.output


@parametrised(dict(ADAPTIVE))
def test_a_broken_adaptive_merge_is_refuted(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Mutant
) -> None:
    mutant(monkeypatch)
    done = audited(tmp_path, [*overrides, *CLIENT, "privacy.adaptive_clipping=true"])
    assert done.exit_code == 1, done.output
    assert "REFUTED" in done.output


@pytest.mark.nightly
def test_false_alarms_are_rare(example: list[str], overrides: list[str]) -> None:
    """Forty audits of sound training, at 1e-3 of a false alarm each."""
    workspace = open_workspace(parse_config("", example))
    assert not [found for _ in range(20) for found in check(workspace, 4, generators=100) if found.bad]
    workspace = open_workspace(parse_config("", [*overrides, *CLIENT, "privacy.adaptive_clipping=true"]))
    assert not [found for _ in range(20) for found in check(workspace, 4, generators=100) if found.bad]
