"""A node's own model is the shared adapter with what the node keeps, and is made of files that are there alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import invoke

from fedlora.federation.client_ledger import LedgerPlace

RUNS = ("a" * 32, "b" * 32)
A, B, HEAD = (f"base_model.model.{name}" for name in ("q.lora_A.weight", "q.lora_B.weight", "head.weight"))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site whose node, client 3, kept something of rounds 1, 2 and 5 of a run; and the adapter after round 4."""
    (tmp_path / "node-config.toml").write_text(f"partition-id = 3\nledger = '{tmp_path}/ledger.jsonl'\n")
    keep(tmp_path, RUNS[0], *((number, since) for number, since in ((1, 0), (2, 1), (5, 2))))
    (tmp_path / "adapter").mkdir()
    stored = {A: torch.full((2, 4), 9.0), B: torch.zeros(3, 2), HEAD: torch.zeros(2)}
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "fedlora.json").write_text(json.dumps({"rounds": "4"}))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return tmp_path


def keep(site: Path, run: str, *rounds: tuple[int, int], rank: int = 2) -> None:
    store = LedgerPlace(own=site / "ledger.jsonl").store(run)
    for number, since in rounds:
        value = float(number)
        store.save(3, number, {"q:B": torch.full((3, rank), value), "head.weight": torch.full((2,), -value)}, since)


def export(site: Path, *options: str) -> tuple[int, str]:
    result = invoke("node", "export", site, site / "adapter", site / "out", *options)
    return result.exit_code, result.output.replace("\n", "")


def test_what_is_kept_takes_the_place_of_the_shared_values(site: Path) -> None:
    code, said = export(site)
    assert (code, "what it kept of round 2" in said) == (0, True)  # the adapter has not seen round 5
    found = load_file(site / "out" / "adapter_model.safetensors")
    assert torch.equal(found[A], torch.full((2, 4), 9.0))
    assert torch.equal(found[B], torch.full((3, 2), 2.0))
    assert torch.equal(found[HEAD], torch.full((2,), -2.0))
    assert (site / "out" / "adapter_config.json").read_text() == "{}"
    code, said = export(site)
    assert (code, "already exists" in said) == (1, True)


@pytest.mark.parametrize("cored", [False, True])
def test_a_whole_model_of_its_own_is_written_as_plain_lora(site: Path, cored: bool) -> None:
    """As a client of `train.personal` keeps it, beside what it has still to send."""
    store = LedgerPlace(own=site / "ledger.jsonl").store(RUNS[0])
    own = {"q:A": torch.full((2, 4), 3.0), "q:B": torch.full((3, 2), 5.0), "head.weight": torch.full((2,), 7.0)}
    core = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    store.save(3, 4, {**own, **({"q:R": core} if cored else {}), "residual/q:B": torch.ones(3, 2)}, 2)
    assert export(site)[0] == 0
    found = load_file(site / "out" / "adapter_model.safetensors")
    assert found.keys() == {A, B, HEAD}
    assert torch.equal(found[A], own["q:A"])
    assert torch.equal(found[B], own["q:B"] @ core if cored else own["q:B"])
    assert torch.equal(found[HEAD], own["head.weight"])


def test_where_an_optimiser_alone_is_kept_there_is_no_own_model(site: Path) -> None:
    store = LedgerPlace(own=site / "ledger.jsonl").store(RUNS[0])
    store.save(3, 2, {"optimizer/step/q:B": torch.ones(1)}, 1)
    code, said = export(site)
    assert (code, "use the run's adapter" in said) == (1, True)


def test_of_several_runs_one_is_named(site: Path) -> None:
    keep(site, RUNS[1], (1, 0))
    code, said = export(site)
    assert (code, "name one with --run" in said) == (1, True)
    assert export(site, "--run", RUNS[1])[0] == 0
    assert float(load_file(site / "out" / "adapter_model.safetensors")[HEAD][0]) == -1.0


def test_what_does_not_fit_is_refused(site: Path) -> None:
    keep(site, RUNS[1], (1, 0), rank=5)
    code, said = export(site, "--run", RUNS[1])
    assert (code, "name the adapter of the same run" in said) == (1, True)
    (site / "adapter" / "fedlora.json").write_text(json.dumps({"rounds": "0"}))
    code, said = export(site, "--run", RUNS[0])
    assert (code, "keeps nothing of the run's first 0 rounds" in said) == (1, True)
    (site / "adapter" / "fedlora.json").unlink()
    assert "name the run's adapter/" in export(site, "--run", RUNS[0])[1]
    assert not (site / "out").exists()
