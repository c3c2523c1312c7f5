"""What evaluation costs: a sample between the first and the last round, shared processes, and the base kept on disk."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.federations import deploy, require_alike, simulate, timeless
from support.interrupted import cut_and_resumed
from support.tiny_federations import MakeConfig

from fedlora.aggregators import GlobalState
from fedlora.callbacks import Callback, Evaluation
from fedlora.config import RunConfig
from fedlora.federation import evaluation_sample, evaluator
from fedlora.federation.evaluation_sample import sample_size, stratified
from fedlora.federation.run import RunOutcome
from fedlora.model import Base
from fedlora.runs.outcomes import read_outcomes
from fedlora.tasks import Examples, Task
from fedlora.tasks._own_metric import with_own_metric
from fedlora.tasks.text_classification import TextClassification
from fedlora.training import kept_evaluation
from fedlora.training.evaluate import Measures, evaluate, measure_batches
from fedlora.training.workspace import close_workspace, open_workspace

HALF = "evaluation.sample=0.5"


class Watching(Callback):
    """What was evaluated, and said."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[GlobalState, Evaluation]] = {}
        self.said: list[str] = []
        self.kept: set[int] = set()

    def started(self, config: RunConfig, clients: int, rounds: int) -> None:
        self.folder = Path(config.output) / config.name

    def evaluated(self, state: GlobalState, evaluation: Evaluation) -> None:
        self.found[state.round] = state, evaluation
        outcomes = read_outcomes(self.folder, state.round if evaluation.rows is None else 0)
        assert outcomes is not None
        self.kept |= {len(values) for values in outcomes[1].values()}

    def message(self, text: str) -> None:
        self.said.append(text)


# ------------------------------------------------------------------------------------------------ the sample


@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 3), st.floats(0.01, 1.0), st.integers(0, 9))
def test_each_domain_and_class_has_its_share_of_the_sample(
    n: int, domains: int, classes: int, share: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    column, labels = generator.integers(domains, size=n).astype(str), generator.integers(classes, size=n)
    test = Examples({}, labels, np.ones(n), {"domain": column})
    size = max(1, round(share * n))
    rows = stratified(test, "domain", size, seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == size
    assert rows.tolist() == stratified(test, "domain", size, seed).tolist()
    drawn = Counter(zip(column[rows], labels[rows], strict=True))
    for stratum, m in Counter(zip(column, labels, strict=True)).items():
        assert abs(drawn[stratum] - m * size / n) < 1
    for domain, m in Counter(column).items():  # strata of a domain stand together
        assert abs(sum(count for (name, _), count in drawn.items() if name == domain) - m * size / n) < 1


def test_another_seed_draws_others_and_each_example_can_be_drawn() -> None:
    test = Examples({}, np.arange(40) % 2, np.ones(40))
    draws = [stratified(test, None, 10, seed).tolist() for seed in range(60)]
    assert len({tuple(draw) for draw in draws}) > 50
    assert {row for draw in draws for row in draw} == set(range(40))


@pytest.mark.slow
@pytest.mark.parametrize("run", [simulate, deploy])
def test_rounds_between_are_measured_on_one_sample_and_the_ends_on_all(
    tiny_config: MakeConfig, run: Callable[..., RunOutcome]
) -> None:
    config, watching = tiny_config(HALF, "rounds=4"), Watching()
    outcome = run(config, watching)
    workspace = open_workspace(config)
    test = workspace.data.require_test()
    size = round(len(test) / 2)
    assert [record.get("sample") for record in outcome.records] == [None, size, size, size, None]
    rows = watching.found[1][1].rows
    assert rows is not None
    for number, (state, evaluation) in watching.found.items():
        chosen = rows if number in (1, 2, 3) else None
        assert np.array_equal(np.arange(len(test)) if chosen is None else chosen, measured_rows(evaluation, len(test)))
        workspace.base.write(state.adapter)
        again = evaluate(workspace.base, workspace.task, test, indices=chosen, domain_column="domain")
        record = outcome.records[number]
        assert {name: record[name] for name in again.overall} == again.overall
        assert record["domains"] == again.domains
    assert any(f"{size} of the {len(test)}" in text for text in watching.said)
    assert watching.kept == {len(test)}  # what the run leaves by example, wherever it is cut
    page = outcome.rundir.report.read_text()
    assert f"{size} test examples were measured" in page
    assert f"{len(test)} test examples" in page  # the interval of the last round


def measured_rows(evaluation: Evaluation, n: int) -> np.ndarray:
    return np.arange(n) if evaluation.rows is None else evaluation.rows


@pytest.mark.slow
def test_a_resumed_run_measures_the_same_sample(tiny_config: MakeConfig) -> None:
    whole = simulate(tiny_config(HALF, "rounds=4", name="whole"))
    resumed = cut_and_resumed(tiny_config(HALF, "rounds=4", name="cut"), 2)
    assert timeless(resumed.records) == timeless(whole.records)


@pytest.mark.slow
def test_a_round_that_may_be_kept_and_the_last_of_a_run_that_ends_early_are_measured_on_all(
    tiny_config: MakeConfig,
) -> None:
    overfits = ("selection.metric=loss", "data.validation_fraction=0.3", "train.lr=0.05", "train.steps=6")
    outcome = simulate(tiny_config(HALF, *overfits, "rounds=30", "selection.patience=3"))
    best, in_full = np.inf, {0, outcome.state.round}
    for record in outcome.records[1:]:
        if (loss := record["validation"]["loss"]) < best:
            best = loss
            in_full.add(record["round"])
    assert outcome.state.round < 30
    assert {record["round"] for record in outcome.records if "sample" not in record} == in_full
    assert len(in_full) < len(outcome.records)
    assert "sample" not in outcome.rundir.read_json("result.json")["last"]


def test_by_default_it_follows_from_what_a_round_trains_on(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_workspace(tiny_config())
    everything = len(workspace.data.require_test())
    assert sample_size(workspace) == everything < evaluation_sample.LEAST
    monkeypatch.setattr(evaluation_sample, "LEAST", 5)
    assert sample_size(workspace) == 4 * 4 * 8 / 4  # clients, steps, rows
    assert sample_size(open_workspace(tiny_config("server.clients_per_round=2"))) == 16
    assert sample_size(open_workspace(tiny_config("train.steps=1", "train.batch_size=1"))) == 5
    assert sample_size(open_workspace(tiny_config("train.steps=1000"))) == everything
    assert sample_size(open_workspace(tiny_config("evaluation.sample=7"))) == 7
    assert sample_size(open_workspace(tiny_config("evaluation.sample=1.0"))) == everything


@pytest.mark.slow
@pytest.mark.parametrize("sample", ["0.5", pytest.param("1.0", marks=pytest.mark.nightly)])
def test_processes_share_the_servers_test_set(tiny_config: MakeConfig, sample: str) -> None:
    keys = ("runtime.cohort=1", "runtime.prefix_cache=off", f"evaluation.sample={sample}")
    one = simulate(tiny_config(*keys, name="one"))
    two = simulate(tiny_config(*keys, "runtime.processes=2", name="two"))
    for mine, theirs in zip(timeless(one.records), timeless(two.records), strict=True):
        require_alike(mine, theirs)


# ------------------------------------------------------------------------------------------------ the base, kept


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Sizes of the batches that are measured, in a cache of this test's own."""
    sizes: list[int] = []

    def measure(base: Base, task: Task, examples: Examples, batches: Sequence[np.ndarray]) -> list[Measures]:
        sizes.extend(map(len, batches))
        return measure_batches(base, task, examples, batches)

    monkeypatch.setattr(evaluator, "measure_batches", measure)
    monkeypatch.setattr(kept_evaluation, "cache_dir", lambda: tmp_path / "cache")
    return sizes


def first_line(config: RunConfig, sizes: list[int]) -> tuple[dict[str, object], int]:
    """The line of metrics before training, and how many examples were measured in the whole run."""
    close_workspace()
    sizes.clear()
    record = simulate(config).records[0]
    return record, sum(sizes)


@pytest.mark.slow
def test_the_base_is_measured_once_for_all_that_it_depends_on(
    tiny_config: MakeConfig, tiny_bert: Path, tiny_csv: Path, tmp_path: Path, measured: list[int]
) -> None:
    model, data = copied(tiny_bert, tmp_path / "model"), tmp_path / "data.csv"
    data.write_bytes(tiny_csv.read_bytes())
    config = tiny_config(f"model.name='{model}'", f"data.source='{data}'", "rounds=1", name="kept")
    n = len(open_workspace(config).data.require_test())
    first, all_measured = first_line(config, measured)
    assert all_measured == 2 * n
    for same in (config, config.model_copy(update={"train": config.train.model_copy(update={"lr": 0.5})})):
        assert first_line(same, measured) == (first, n)
    other_head, count = first_line(config.model_copy(update={"seed": 1}), measured)
    assert count == 2 * n
    assert other_head != first

    change_a_word(data, open_workspace(config).data.require_test().columns["document"])
    _, count = first_line(config, measured)
    assert count == 2 * n

    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name] = weights[name] + 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    _, count = first_line(config, measured)
    assert count == 2 * n
    _, count = first_line(config, measured)
    assert count == n


@pytest.mark.slow
def test_nothing_is_kept_of_a_private_run_and_a_damaged_file_is_measured_anew(
    tiny_config: MakeConfig, measured: list[int], tmp_path: Path
) -> None:
    private = (
        "privacy={unit='client', clip_norm=1.0, noise_multiplier=1.0, delta=1e-3}",
        "server.weighting=uniform",
        "server.aggregation_error=false",
    )
    _, count = first_line(tiny_config(*private, "rounds=1", name="private"), measured)
    assert not (tmp_path / "cache").exists()
    config = tiny_config("rounds=1", name="damaged")
    first, count = first_line(config, measured)
    (file,) = (tmp_path / "cache" / "evaluations").iterdir()
    file.write_bytes(file.read_bytes()[:-9] + b"different")
    assert first_line(config, measured) == (first, count)


class Mine(TextClassification):
    """A task of one's own."""


def test_what_a_task_of_ones_own_measures_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.tasks._own_metric.import_named", lambda *_: lambda measures: measures["loss"])
    for task, kept in ((TextClassification(), True), (Mine(), False)):
        assert kept_evaluation.measured_by_us(task) == kept
        assert kept_evaluation.measured_by_us(with_own_metric(task, f"my:{type(task).__name__}")) == kept


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def change_a_word(data: Path, documents: Sequence[str]) -> None:
    """Another word in one of the test examples."""
    with data.open(newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["document"] == str(documents[0]))
    row["text"] = " ".join(["terrible", *row["text"].split()[1:]])
    with data.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
