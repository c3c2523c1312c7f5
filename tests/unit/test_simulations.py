"""The simulations run through, on runs that nobody trained."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_runs import make_run

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import ClientUpdate, load_aggregator
from fedlora.config import RunConfig, load_config
from fedlora.federation.load_rule import load_rule
from fedlora.runs.outcomes import write_outcomes
from fedlora.sweep import _workers
from fedlora.testing import broken_laws

FOLDER = Path(__file__).parents[2] / "simulations"
SWEEPS = sorted(path.parent.name for path in FOLDER.glob("*/config.toml"))
GROWING = ("attacks", "features", "ranks", "rules")
"""Whose results.csv has what is done, from which the rest goes on."""


def load(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A simulation's script, working in `folder` with two seeds and one process."""
    spec = importlib.util.spec_from_file_location(f"{name}_run", FOLDER / name / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    if name in SWEEPS:
        shutil.copy(FOLDER / name / "config.toml", folder / "config.toml")
    monkeypatch.setattr(module, "HERE", folder)
    monkeypatch.setattr(module, "SEEDS", (0, 4))
    monkeypatch.setattr("sys.argv", ["run.py", "--processes", "1"])
    return module


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[RunConfig]]:
    """Does a simulation in `tmp_path` with two seeds; its runs end at once, as well as their rate lets them."""
    asked: list[RunConfig] = []

    def complete(config: RunConfig, keep: str, on_round: Callable[[int], None]) -> None:
        asked.append(config)
        assert keep == "metrics"  # a checkpoint for each of a hundred runs would fill a disk
        final = 0.8 - abs(config.train.lr - 0.003) + config.seed / 1000
        rounds = [0.5, *[float("nan")] * (config.rounds - 1), final]
        path = make_run(Path(config.output) / config.name, rounds, aggregation_error=0.25)
        (path / "config.toml").write_text(config.to_toml())

    def run(name: str) -> list[RunConfig]:
        monkeypatch.setattr(_workers, "complete", complete)
        load(name, tmp_path, monkeypatch).main()
        return asked

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SWEEPS if name not in ("personal", *GROWING)])
def test_it_runs_through(name: str, simulate: Callable[[str], list[RunConfig]], tmp_path: Path) -> None:
    require_results(simulate(name), tmp_path)


def require_results(asked: list[RunConfig], tmp_path: Path) -> None:
    assert {config.seed for config in asked} == {0, 4, 100}  # one that chooses, and those that are reported
    assert "79." in (tmp_path / "table.md").read_text() or "80." in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    lines = (tmp_path / "results.csv").read_text().splitlines()
    settings = {config.name.rpartition(",seed=")[0] for config in asked if config.seed != 100}
    assert len(lines) == 1 + len(settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
def test_the_table_is_that_of_the_results(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(FOLDER / name / "results.csv", tmp_path)
    module = load(name, tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", ["run.py", "--no-runs"])
    module.main()
    table = (tmp_path / "table.md").read_text()
    assert table == (FOLDER / name / "table.md").read_text()
    assert all(line in (FOLDER / name / "README.md").read_text() for line in table.splitlines())
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_features_goes_beyond_the_rates_it_begins_with_and_repeats_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("features", tmp_path, monkeypatch)
    asked: list[tuple[str, str, int, float]] = []

    def one_run(setting: str, rule: str, seed: int, lr: float) -> dict[str, float]:
        asked.append((setting, rule, seed, lr))
        best = 0.0018 if rule == "FLoRA" else 0.01
        accuracy = 0.8 - abs(np.log(lr / best)) / 10 + 0.02 * (rule == "LoRA-FAIR") + seed / 1000
        return {"accuracy": accuracy, "before": accuracy - 0.01, "worst domain": 0.5, "aggregation error": 0.1}

    monkeypatch.setattr(module, "one_run", one_run)
    monkeypatch.setattr("sys.argv", ["run.py", "--results", str(tmp_path / "there")])
    module.main()
    chosen = {(rule, lr) for _, rule, seed, lr in asked if seed != 100}
    assert chosen == {(rule, 0.0018 if rule == "FLoRA" else 0.01) for rule in module.RULES}
    assert {seed for _, _, seed, _ in asked} == {0, 4, 100}
    assert sum(rule == "FLoRA" and seed == 100 for _, rule, seed, _ in asked) == 3 * 5, "one beyond the best, too"
    text = (tmp_path / "there" / "table.md").read_text()
    assert "| LoRA-FAIR | 0.01 | 82.2 ± 2.5 | 50.0 ± 0.0 | 2.0 ± 0.0 |  | 1.0 ± 0.0 | 0.1 |" in text
    assert (tmp_path / "there" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    count = len(asked)
    module.main()
    assert len(asked) == count


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_fair_of_a_corrects_a_where_lora_fair_corrects_b(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """(B^T B + lambda I) A = B^T D*/s + lambda mean(A): the normal equations of its own objective."""
    monkeypatch.syspath_prepend(str(FOLDER / "features"))
    rule = load_aggregator("fair_of_a:FairOfA", {"regularisation": scale})
    draw = np.random.default_rng(0)
    factors = [(draw.normal(size=(2, 5)), draw.normal(size=(7, 2)), weight) for weight in (0.5, 0.2, 0.3)]
    adapters = [
        AdapterState({"m": LoraPair(torch.from_numpy(A), torch.from_numpy(B), 2.0)}, {"head": torch.ones(1) * weight})
        for A, B, weight in factors
    ]
    updates = [ClientUpdate(k, one, factors[k][2]) for k, one in enumerate(adapters)]
    found = rule.aggregate(rule.init(adapters[0]), updates).adapter
    A, B = found.pairs["m"].A.numpy(), found.pairs["m"].B.numpy()
    mean = sum(weight * A for A, _, weight in factors)
    ideal = sum(weight * B @ A for A, B, weight in factors)
    np.testing.assert_allclose(B, sum(weight * B for _, B, weight in factors))
    np.testing.assert_allclose(B.T @ B @ A + scale * A, B.T @ ideal + scale * mean)
    assert float(found.dense["head"]) == pytest.approx(0.5**2 + 0.2**2 + 0.3**2)


@pytest.mark.slow
def test_fair_of_a_breaks_no_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER / "features"))
    assert not broken_laws(load_aggregator("fair_of_a:FairOfA"))


@pytest.mark.slow
def test_rules_takes_a_rate_whose_neighbours_are_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunConfig] = []
    best = {"ffa": 0.18, "fedadam": 0.001}

    def one_run(changes: list[str]) -> dict[str, float]:
        asked.append(config := load_config(tmp_path / "config.toml", changes))
        rule = load_rule(config)
        off = math.log10(getattr(rule, "lr", config.train.lr) / best.get(config.strategy.name, 0.01))
        return {"accuracy": 0.8 - abs(off) / 10, "rounds": config.rounds}

    module = load("rules", tmp_path, monkeypatch)
    monkeypatch.setattr(module, "one_run", one_run)
    results = module.Results(tmp_path / "results.csv")
    # From 0.0032, 0.01 and 0.032 upwards, two steps at a time, and then both neighbours of the best.
    assert results.rate_of("label shift", "FFA-LoRA") == 0.18
    rates = [config.train.lr for config in asked]
    assert rates == [0.0032, 0.01, 0.032, 0.1, 0.32, 1.0, 0.18, 0.56]
    assert list(results.tried("label shift", "FFA-LoRA")) == sorted(rates)
    # A server's rate goes down, its clients have FedAvg's.
    assert results.rate_of("label shift", "FedAdam") == 0.001
    assert {config.train.lr for config in asked if config.strategy.name == "fedadam"} == {0.01}
    # What is done is not repeated, by another process either.
    before = len(asked)
    again = module.Results(tmp_path / "results.csv")
    assert again.rate_of("label shift", "FFA-LoRA") == 0.18
    assert len(asked) == before
    # Every rule has a config in every setting; those that cannot take mixed ranks have one rank for all.
    for setting, (_, rules) in module.SETTINGS.items():
        for rule in rules:
            results.accuracy(setting, rule, 0.001, 0)
    mixed = [config for config in asked if config.partition.fields["alpha"] == 1.0]
    assert {c.adapter.rank for c in mixed if not isinstance(c.clients.ranks, list | tuple)} == {2, 32}
    assert {c.strategy.name for c in mixed if not isinstance(c.clients.ranks, list | tuple)} == {"fedavg"}
    # All scales are alpha / r = 2.
    assert {config.adapter.alpha / config.adapter.rank for config in asked} == {2.0}


@pytest.mark.slow
def test_heterogeneity_reports_a_rate_chosen_at_one_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunConfig] = []

    def complete(config: RunConfig, keep: str, on_round: Callable[[int], None]) -> None:
        asked.append(config)
        final = 0.8 - abs(config.train.lr - 0.003) - 0.01 / config.partition.fields["alpha"] + config.seed / 1000
        rounds = [0.1, *[float("nan")] * (config.rounds - 1), final]
        path = make_run(Path(config.output) / config.name, rounds, aggregation_error=0.25)
        (path / "config.toml").write_text(config.to_toml())

    monkeypatch.setattr(_workers, "complete", complete)
    module = load("heterogeneity", tmp_path, monkeypatch)
    monkeypatch.setattr(module, "ALPHAS", (0.1, 0.3, 1.0))
    module.main()
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert len(rows) == 4
    assert rows[0].split("|")[2:6] == [" 0.003 ", " 70.2 ± 0.3 ", " 76.9 ± 0.3 ", " 79.2 ± 0.3 "]
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    others = [config for config in asked if config.partition.fields["alpha"] != 0.3]
    assert {config.train.lr for config in others} == {0.003}
    assert {config.seed for config in others} == {0, 4}


@pytest.mark.slow
def test_personal_takes_the_rate_that_is_best_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the test would choose another: on the reported seeds it falls with the rate, on validation it rises to
    0.03, which is beyond the rates that are tried first."""
    asked: list[RunConfig] = []

    def complete(config: RunConfig, keep: str, on_round: Callable[[int], None]) -> None:
        asked.append(config)
        lr = config.train.lr
        own = config.train.personal is not None or config.strategy.name in ("fedsa", "fedper", "fedrep")
        if config.strategy.name == "feddyn" and lr == 0.03:
            raise ValueError("diverged")
        shared = [0.8 - lr + config.seed / 100 - 0.3 * (k == 0) for k in range(20)]
        at_clients = {"clients": {str(k): {"accuracy": value} for k, value in enumerate(shared)}}
        if own:
            better = {str(k): {"accuracy": value + 0.1} for k, value in enumerate(shared)}
            at_clients = {"clients": better, "shared": at_clients}
        path = Path(config.output) / config.name
        make_run(path, [0.1, shared[1]], federated=at_clients, validation={"accuracy": 0.5 - abs(lr - 0.03)})
        (path / "config.toml").write_text(config.to_toml())
        (path / "result.json").write_text('{"rounds": 10}')

    monkeypatch.setattr(_workers, "complete", complete)
    module = load("personal", tmp_path, monkeypatch)
    monkeypatch.setattr("sys.argv", ["run.py", "--results", str(tmp_path / "kept")])
    module.main()
    assert {config.seed for config in asked} == {0, 4, 100}
    reported = {(c.strategy.name, c.train.personal, c.train.lr) for c in asked if c.seed != 100}
    assert ("fedavg", None, 0.03) in reported
    assert ("feddyn", None, 0.01) in reported  # at the best rate of all it diverged
    assert ("scaffold", None, 0.03) in reported
    assert len(reported) == 9
    text = (tmp_path / "table.md").read_text()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[:12] if "±" in row]
    rows = {name: values for name, *values in cells}
    assert rows["FedAvg"][:3] == ["0.03", "77.5 ± 25.4", ""]
    assert rows["local only"][1:3] == ["", "87.5 ± 25.4"]
    assert rows["Ditto"][4] == "10.0 ± 0.0"
    assert rows["FedDyn"][:1] == ["0.01"]
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * (2 * 4 + 2 * 2 * 5)
    before = len(asked)
    module.main()
    assert len(asked) == before + 3, "what is done is not repeated; what failed in each setting is tried again"


@pytest.mark.slow
def test_preferences_says_by_how_much_dpo_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunConfig] = []
    right = {"dpo": [1, 1, 1, 1, 1, 0, 1, 1], 0.001: [0, 0, 1, 0, 1, 0, 0, 0], 0.01: [1, 0, 0, 0, 1, 0, 0, 1]}

    def complete(config: RunConfig, keep: str, on_round: Callable[[int], None]) -> None:
        asked.append(config)
        how = str(config.task.fields["loss_type"])
        found = np.asarray(right["dpo" if how == "dpo" else config.train.lr], dtype=float)
        curve = [0.125, *[float("nan")] * (config.rounds - 1), float(found.mean())]
        path = make_run(Path(config.output) / config.name, curve, metric="ranking_accuracy", chosen_loss=4.0)
        (path / "config.toml").write_text(config.to_toml())
        write_outcomes(path, config.rounds, "the same", {"loss": 1 - found, "right": found, "chosen_loss": found})

    monkeypatch.setattr(_workers, "complete", complete)
    module = load("preferences", tmp_path, monkeypatch)
    monkeypatch.setattr(module, "RATES", (0.001, 0.01))
    monkeypatch.setattr(module, "SEEDS", (0,))
    module.main()
    assert [config.task.fields["loss_type"] for config in asked] == ["dpo", "sft", "sft"]
    assert [config.train.lr for config in asked[1:]] == [0.001, 0.01]
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [cell[:2] for cell in cells] == [
        ["the base", "12.5"], ["DPO", "87.5"], ["SFT, lr 0.001", "25.0"], ["SFT, lr 0.01", "37.5"],
    ]  # fmt: skip
    assert cells[1][3] == ""
    assert [cell[3].split(" ")[0] for cell in cells[2:]] == ["62.5", "50.0"]
    low, high = (float(end) for end in cells[3][3].split("(")[1].strip(")").split(" to "))
    assert 0 < low < 50 < high <= 100
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4
