"""A metric of one's own adds up over any sets of examples, and one that cannot is refused in a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import raises

from fedlora.config import OpenTable, RunConfig, parse_config
from fedlora.errors import ConfigError
from fedlora.federation.evaluator import added
from fedlora.tasks import load_task
from fedlora.tasks._base import Task
from fedlora.tasks._own_metric import with_own_metric

FUNCTIONS = """
def signed(measures):
    return 2.0 * measures["label"] - measures["predicted"] - 1.0
def share(sums):
    return float(sums["confusion"][0, 1]) / float(sums["examples"])
def accuracy(sums):
    return 1.0
def scalar(measures):
    return measures["label"].mean()
def words(sums):
    return "high"
def fails(sums):
    return sums["confusions"]
def two(measures, sums):
    return 0.0
nothing = 3
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("own")
    (folder / "figures_of_ones_own.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        __import__("figures_of_ones_own")


def task(name: str) -> Task:
    plain = load_task(OpenTable.model_validate({"name": "text-classification"}))
    return with_own_metric(plain, f"figures_of_ones_own:{name}")


def measures(labels: list[int], guesses: list[int]) -> dict[str, np.ndarray]:
    probabilities = np.where(np.arange(2) == np.asarray(guesses)[:, None], 0.75, 0.25)
    columns = {"label": labels, "predicted": guesses, "loss": [1] * len(labels)}
    return {"probabilities": probabilities, **{k: np.asarray(v, dtype=np.float64) for k, v in columns.items()}}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30), st.integers(1, 5))
@pytest.mark.slow
def test_parts_give_the_figure_of_the_whole(rows: list[tuple[int, int]], parts: int) -> None:
    labels, guesses = (list(column) for column in zip(*rows, strict=True))
    for name in ("signed", "share"):
        own = task(name)
        sums = [own.sums(measures(labels[k::parts], guesses[k::parts])) for k in range(parts) if labels[k::parts]]
        assert own.figures(added(sums))[name] == own.summarise(measures(labels, guesses))[name]
    expected = sum(2 * label - guess - 1 for label, guess in rows) / len(rows)
    assert task("signed").summarise(measures(labels, guesses))["signed"] == pytest.approx(expected, abs=1e-12)


def test_the_task_is_otherwise_as_it_was() -> None:
    plain = load_task(OpenTable.model_validate({"name": "text-classification"}))
    own = task("share")
    assert isinstance(own, type(plain))
    assert vars(own) == vars(plain)
    assert own.metric == plain.metric
    found = own.summarise(measures([0, 1], [1, 1]))
    assert {k: v for k, v in found.items() if k != "share"} == plain.summarise(measures([0, 1], [1, 1]))
    assert with_own_metric(plain, None) is plain


@pytest.mark.parametrize("name", ["accuracy", "scalar", "words", "fails"])
def test_a_function_that_gives_no_figure_is_refused(name: str) -> None:
    with raises(ConfigError, "bad-metric", name):
        task(name).summarise(measures([0, 1], [1, 1]))


@pytest.mark.parametrize("name", ["two", "nothing"])
def test_what_is_no_such_function_is_refused(name: str) -> None:
    with raises(ConfigError, "bad-metric", name, "measures", "sums"):
        task(name)


def config(*overrides: str) -> RunConfig:
    return parse_config("", ["evaluation.metric=figures_of_ones_own:share", *overrides])


def test_the_config_says_which_way_is_better() -> None:
    with raises(ConfigError, "mode-unknown", "selection.mode"):
        config("selection.metric=share")
    assert config("selection.metric=share", "selection.mode=max").selection is not None
    with raises(ConfigError, "class-not-found", "no_such_module"):
        with_own_metric(load_task(OpenTable.model_validate({"name": "text-classification"})), "no_such_module:f")
