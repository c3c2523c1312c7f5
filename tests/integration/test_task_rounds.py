"""Each task goes through the rounds: rules of all kinds, evaluation at the clients, privacy, files of a user's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.federations import simulate
from support.tiny_t5 import write_tiny_t5
from support.tiny_words import LABEL_WORDS

from fedlora.api import figures_of
from fedlora.config import RunConfig, parse_config
from fedlora.evaluation.pretrained_adapter import find_adapter
from fedlora.model.adapter_files import read_adapter
from fedlora.tasks import load_task
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import open_workspace

pytestmark = pytest.mark.nightly
Row = dict[str, Any]
Make = Callable[..., RunConfig]


def rated(row: Row) -> Row:
    number = 2.0 if row["label"] == "positive" else -2.0
    return {
        "text": row["text"],
        "other": f"it was a {row['domain'][:-1]}",
        "label": number,
        "document": row["document"],
    }


def labelled(row: Row) -> Row:
    return {"text": row["text"], "label": [row["label"], row["domain"]], "document": row["document"]}


def tagged(row: Row) -> Row:
    """The words that tell a text's class are entities of this type."""
    words = row["text"].split()
    tags = [f"B-{row['label']}" if word in LABEL_WORDS[row["label"]] else "O" for word in words]
    return {"tokens": words, "tags": tags, "document": row["document"]}


def find_task(outcome: Any) -> Any:
    return load_task(outcome.rundir.config.task)


def answered(row: Row) -> Row:
    """What a text is about and how, in words."""
    return {"text": row["text"], "target": f"{row['label']} {row['domain']}", "document": row["document"]}


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory, tiny_csv: Path) -> Path:
    with tiny_csv.open() as source:
        rows = [answered(row) for row in csv.DictReader(source)]
    return write_tiny_t5(tmp_path_factory.mktemp("tiny_t5"), (f"{row['text']} {row['target']}" for row in rows))


DATA: dict[str, tuple[Callable[[Row], Row], tuple[str, ...]]] = {
    "text-regression": (rated, ("data.columns={text_pair='other'}", "task.label_range=[-4, 4]")),
    "multi-label-classification": (labelled, ()),
    "token-classification": (tagged, ()),
    "seq2seq-lm": (answered, ("task.max_target_length=4",)),
}
"""Task -> a row of the tiny texts as its own, and what else its config says."""


@pytest.fixture(params=sorted(DATA))
def make(request: pytest.FixtureRequest, tiny_csv: Path, tmp_path: Path) -> Make:
    change, more = DATA[request.param]
    model = request.getfixturevalue("tiny_t5" if request.param == "seq2seq-lm" else "tiny_bert")
    file = tmp_path / "own.jsonl"
    with tiny_csv.open() as source:
        file.write_text("".join(json.dumps(change(row)) + "\n" for row in csv.DictReader(source)))

    def config(*overrides: str) -> RunConfig:
        return parse_config(
            "",
            [
                f"output='{tmp_path / 'runs'}'",
                f"model.name='{model}'",
                "adapter.rank=4",
                "adapter.targets=all-linear",
                f"data.source='{file}'",
                "data.group=document",
                "data.test_fraction=0.25",
                f"task.name={request.param}",
                "partition={name='iid', clients=3}",
                "train.steps=20",
                "train.batch_size=8",
                "train.lr=0.01",
                "runtime.threads=1",
                "rounds=3",
                *more,
                *overrides,
            ],
        )

    return config


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "flora", "fedex", "median"])
def test_rules_of_all_kinds_teach_it(rule: str, make: Make) -> None:
    before, *_, after = simulate(make(f"strategy.name={rule}")).rundir.read_metrics()
    assert after["loss"] < 0.9 * before["loss"]


def test_figures_at_the_clients_are_those_of_all_examples_in_one_place(make: Make) -> None:
    config = make("evaluation.on=clients", "evaluation.min_examples=2", "rounds=1")
    outcome = simulate(config)
    workspace = open_workspace(config)
    workspace.base.write(read_adapter(workspace.base, outcome.rundir.adapter_dir))
    apart = workspace.data.apart["test"]
    pooled = evaluate(workspace.base, workspace.task, apart.examples, indices=np.concatenate(apart.clients)).overall
    last = outcome.rundir.read_metrics()[-1]
    assert {name: last[name] for name in pooled} == pytest.approx(pooled, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    "unit",
    ["unit='example', max_grad_norm=1.0, public_examples=24", "unit='client', clip_norm=1.0"],
    ids=["example", "client"],
)
def test_it_can_be_private(make: Make, unit: str) -> None:
    private = f"privacy={{noise_multiplier=1.0, delta=1e-4, {unit}}}"
    found = simulate(
        make(private, "server.weighting=uniform", "server.aggregation_error=false", "rounds=1")
    ).rundir.read_metrics()
    assert [line["round"] for line in found] == [0, 1]
    assert np.isfinite(found[1]["loss"])


def test_an_exported_adapter_is_evaluated_to_the_same_figures(make: Make) -> None:
    outcome = simulate(make("rounds=1"))
    rows, classes = figures_of(find_adapter(outcome.rundir.path), None)
    found = rows["all"]
    last = outcome.rundir.read_metrics()[-1]
    names = found.keys() - {"examples"}
    assert {name: found[name] for name in names} == pytest.approx({name: last[name] for name in names}, rel=1e-4)
    assert classes == last.get("classes", {})
    assert bool(classes) == find_task(outcome).has_classes


def test_a_client_in_company_gets_what_it_gets_alone(make: Make) -> None:
    # T5's norms and softmax are in float32 whatever the base is: twenty steps make hundredths of their rounding.
    fixed = ("rounds=1", "train.steps=3", "model.dtype=float64", "model.dropout=0.1", "train.micro_batch_size=3")
    alone, company = (
        simulate(make(*fixed, f"name={cohort}", f"runtime.cohort={cohort}")).rundir.adapter_dir for cohort in (1, 3)
    )
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (alone, company))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-6)  # exports are in float32
