"""Sums of clients: those of examples pass whatever the examples, and what no examples give is left out by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.federations import Said

from fedlora.config import parse_config
from fedlora.federation.client_pool import ClientEvaluation, RoundRequest
from fedlora.federation.evaluator import Evaluator, added
from fedlora.tasks import Task
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.multi_label_classification import MultiLabelClassification
from fedlora.tasks.preference import Preference
from fedlora.tasks.text_classification import TextClassification
from fedlora.tasks.text_regression import TextRegression
from fedlora.tasks.token_classification import TokenClassification, count_entities

NAMES = ("O", "B-ART", "I-ART", "B-PER", "I-PER")
TASKS: dict[str, Task] = {
    "classes": TextClassification(),
    "labels": MultiLabelClassification(),
    "number": TextRegression(),
    "ranked": TextRegression(label_range=(-4, 4)),
    "tags": TokenClassification(max_length=8),
    "text": CausalLM(max_length=8),
    "free": CausalLM(),
    "pairs": Preference(),
}
CLASSES = defaultdict[type[Task], Sequence[str]](
    tuple, {TextClassification: "abc", MultiLabelClassification: "abcd", TokenClassification: NAMES}
)
Sums = dict[str, np.ndarray]


def honest(name: str, seed: int, n: int) -> Sums:
    """Sums of examples of some task, as they come about."""
    draw = np.random.default_rng(seed)
    loss = draw.random(n)
    if name == "classes":
        logits = draw.normal(size=(n, 3)).astype(np.float32) * draw.choice([1, 50])
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float64)
        columns = {"label": draw.integers(0, 3, n), "predicted": probabilities.argmax(axis=1)}
        measures = {"probabilities": probabilities, **{key: value.astype(float) for key, value in columns.items()}}
    elif name == "labels":
        measures = {"labels": (draw.random((n, 4)) < 0.3).astype(float), "probabilities": draw.random((n, 4))}
    elif name in ("number", "ranked"):
        middle, width = draw.choice([0, 3, 1e8]), draw.choice([0, 1e-9, 1, 1e6])
        label = middle + width * draw.normal(size=n)
        predicted = label.copy() if draw.random() < 0.3 else -label + draw.choice([0, 1]) * draw.normal(size=n)
        measures = {"label": label, "predicted": predicted}
    elif name == "tags":
        sizes = draw.integers(1, 9, n)
        rows = np.repeat(np.arange(n), sizes)
        own, guessed = (draw.integers(0, 5, len(rows)) for _ in range(2))
        tags = np.zeros((n, 5, 2))
        np.add.at(tags, (rows, own, 0), 1)
        np.add.at(tags, (rows, own, 1), own == guessed)
        measures = {"tags": tags, "entities": count_entities(own, guessed, rows, NAMES, n)}
    elif name in ("text", "free"):
        measures = {"tokens": draw.integers(1, 9, n).astype(float), "exact": draw.integers(0, 2, n).astype(float)}
    else:
        measures = {"right": draw.integers(0, 2, n).astype(float), "chosen_loss": loss}
    return TASKS[name].sums({"loss": loss, **measures})


def measured(task: Task, sums: Sequence[Mapping[str, np.ndarray]]) -> tuple[dict[str, Any], list[str]]:
    """The line of a round in which each client answers with some sums, and what was said."""
    config = parse_config("", ["evaluation.on=clients", "selection.patience=9", "server.max_examples=1000"])

    def evaluate(request: RoundRequest, parts: Sequence[str]) -> list[ClientEvaluation]:
        return [ClientEvaluation(k, dict.fromkeys(parts, sums[k])) for k in request.clients]

    told, state = Said(), SimpleNamespace(round=3)
    workspace = SimpleNamespace(task=task, data=SimpleNamespace(test=None, label_names=CLASSES[type(task)]))
    evaluator = Evaluator(cast("Any", SimpleNamespace(evaluate=evaluate)), config, cast("Any", workspace), False, told)
    clients = dict.fromkeys(range(len(sums)), cast("Any", None))
    request = RoundRequest(3, (), cast("Any", state), {})
    return evaluator.measure(request, clients, lambda _: True), told.lines


@given(name=st.sampled_from(list(TASKS)), seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 30), min_size=1))
@settings(deadline=None, max_examples=150)
def test_sums_of_examples_pass(name: str, seed: int, sizes: list[int]) -> None:
    sums = [honest(name, seed + k, n) for k, n in enumerate(sizes)]
    line, said = measured(TASKS[name], sums)
    assert not said
    assert len(line["federated"]["clients"]) == len(sizes)
    TASKS[name].require_sums(added(sums))


HOSTILE: list[tuple[str, Mapping[str, Any], str]] = [
    ("classes", {"confusion": np.diag([2e9, 0, 0])}, "confusion"),
    ("classes", {"confusion": np.full((3, 3), 1e200)}, "confusion"),
    ("classes", {"confusion": np.full((3, 3), 1e308)}, "not finite"),
    ("classes", {"calibration": np.full((15, 3), 1e9)}, "calibration"),
    ("classes", {"scores": np.full((3, 2, 200), 1e9)}, "AUROC"),
    ("labels", {"counts": np.tile([10.0, 10, 1e10], (4, 1))}, "more are right"),
    ("labels", {"counts": np.full((4, 3), 1e9)}, "more than 10 examples"),
    ("labels", {"counts": np.tile([10.0, 10, 0], (4, 1))}, "more than 10 examples"),
    ("labels", {"exact": 11.0}, "more than 10 examples"),
    ("labels", {"calibration": np.zeros((15, 3))}, "calibration"),
    ("number", {"moments": [0, 0, 1e-200, 1e-200, 1]}, "products"),
    ("number", {"moments": [0, 0, 1, 1, 1e6]}, "products"),
    ("number", {"moments": [10, 10, 10 + 1e-9, 10 + 1e-9, -10]}, "products"),
    ("number", {"moments": [0, 0, -1, 1, 0]}, "squares"),
    ("number", {"moments": [1e200, 0, 1, 1, 0]}, "squares"),
    ("number", {"moments": [0, 0, 1e308, 1e308, 1e308]}, "not finite"),
    ("ranked", {"ranks": np.full((64, 64), 1e9)}, "ranks"),
    ("ranked", {"ranks": np.zeros((64, 64))}, "ranks"),
    ("tags", {"entities": [[0, 0, 1e9], [0, 0, 0]]}, "more entities are right"),
    ("tags", {"entities": [[1e9, 1e9, 1e9], [0, 0, 0]]}, "more entities than words"),
    ("tags", {"tags": np.tile([4.0, 5], (5, 1))}, "more are right"),
    ("tags", {"tags": np.full((5, 2), 1e9)}, "5e+09 words"),
    ("tags", {"tags": np.zeros((5, 2))}, "0 words"),
    ("text", {"tokens": 1e9}, "1e+09 tokens"),
    ("text", {"tokens": 0.0}, "0 tokens"),
    ("text", {"exact": 11.0}, "more than 10 examples are exact"),
    ("free", {"token_loss": 1e290}, "perplexity of inf"),
    ("pairs", {"right": 1e9}, "ranked right"),
]


@pytest.mark.parametrize(("name", "lie", "why"), HOSTILE)
def test_sums_of_no_examples_are_left_out_and_the_round_goes_on(name: str, lie: Mapping[str, Any], why: str) -> None:
    good = [honest(name, seed, 10) for seed in (0, 2)]
    lied = honest(name, 1, 10)
    lied |= {key: np.asarray(value, dtype=np.float64) for key, value in lie.items()}
    line, said = measured(TASKS[name], [good[0], lied, good[1]])
    assert list(line["federated"]["clients"]) == ["0", "2"]
    assert list(line["federated"]["left_out"]) == ["1"]
    assert why in line["federated"]["left_out"]["1"]
    assert [text.partition(":")[0] for text in said] == ["client 1 is left out of the evaluation"]
    np.testing.assert_equal(line["validation"], TASKS[name].figures(added(good)))


def test_figures_that_are_close_to_nothing_do_not_end_the_round() -> None:
    lied = honest("number", 1, 10) | {"moments": np.asarray([0, 0, 1e-200, 1e-200, 0])}
    line, said = measured(TASKS["number"], [lied])
    assert not said
    assert line["pearson"] == 0


def test_figures_that_cannot_be_computed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = [honest("number", seed, 10) for seed in (0, 1)]
    monkeypatch.setattr(TextRegression, "figures", lambda self, sums: {"mean_absolute_error": 1 / 0})
    line, _ = measured(TASKS["number"], sums)
    assert set(line["federated"]["left_out"]) == {"0", "1"}
    assert "no figures" in line["federated"]["left_out"]["0"]
