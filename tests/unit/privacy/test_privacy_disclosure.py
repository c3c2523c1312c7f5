"""The list of what a private run may tell: what is not on it is refused, where it is written and where it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.errors import raises

from fedlora.config import parse_config
from fedlora.errors import PrivacyError
from fedlora.privacy.disclosure import Disclosure
from fedlora.runs.rundir import RunDir

EXAMPLE = ["server.weighting=uniform", "privacy.max_grad_norm=1", "privacy.public_examples=40"]
CLIENT = ["server.aggregation_error=false", "privacy.unit=client", "privacy.clip_norm=1"]


def rundir(tmp_path: Path, *private: str) -> RunDir:
    more = ["privacy.noise_multiplier=1", "privacy.delta=1e-3", *private] if private else []
    return RunDir.create(parse_config("", [f"output='{tmp_path}'", *more], name="run"))


@pytest.mark.parametrize("unit", [EXAMPLE, CLIENT])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition.json", {"sizes": [3, 4]}),
        ("baselines.json", {"centralised": {"accuracy": 1.0}}),
        ("provenance.json", {"base": "a", "train_data": "b"}),
        ("environment.json", {"seed": 0, "longest_example": 77}),
        ("environment.json", {"seed": 0, "resumed": [{"round": 1, "typical_tokens": 9}]}),
        ("anything.json", [1, 2]),
    ],
)
def test_files_and_keys_that_are_not_on_the_list_are_refused(
    tmp_path: Path, unit: list[str], name: str, value: object
) -> None:
    with raises(PrivacyError, "not-disclosable"):
        rundir(tmp_path, *unit).write_json(name, value)
    assert not name.startswith(("partition", "baselines", "anything")) or not (tmp_path / "run" / name).exists()


@pytest.mark.parametrize("unit", [EXAMPLE, CLIENT])
@pytest.mark.parametrize(
    "more",
    [
        {"seconds": 1.0},
        {"seconds_train": 1.0},
        {"loss": 0.5},  # unless it was measured on the test examples
        {"train_loss": 0.5},
        {"clients": {"0": {"num_examples": 1, "loss": 0.5}}},
        {"clients": {"0": {"seconds": 0.5}}},
        {"examples_seen": 7},
    ],
)
def test_lines_of_metrics_with_more_than_the_list_are_refused(
    tmp_path: Path, unit: list[str], more: dict[str, Any]
) -> None:
    run = rundir(tmp_path, *unit)
    with raises(PrivacyError, "not-disclosable"):
        run.append_metrics({"round": 1, **more})
    assert run.read_metrics() == []


def test_figures_over_the_test_examples_are_the_servers_own(tmp_path: Path) -> None:
    run = rundir(tmp_path, *EXAMPLE)
    run.measured = frozenset({"loss", "accuracy"})
    run.append_metrics({"round": 0, "loss": 0.5, "accuracy": 0.5})
    assert run.read_metrics() == [{"round": 0, "loss": 0.5, "accuracy": 0.5}]


def test_the_aggregation_error_is_told_where_updates_are_noised_already(tmp_path: Path) -> None:
    rundir(tmp_path / "a", *EXAMPLE).append_metrics({"round": 1, "aggregation_error": 0.1})
    with raises(PrivacyError, "not-disclosable", "aggregation_error"):
        rundir(tmp_path / "b", *CLIENT).append_metrics({"round": 1, "aggregation_error": 0.1})


def test_a_run_without_privacy_writes_what_it_likes(tmp_path: Path) -> None:
    run = rundir(tmp_path)
    run.write_json("partition.json", {"sizes": [1]})
    run.append_metrics({"round": 1, "seconds": 1.0})
    assert json.loads((run.path / "partition.json").read_text()) == {"sizes": [1]}


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize(
    ("head", "figures"),
    [
        ({"kind": "hello", "client_id": 0, "num_examples": 7}, ()),
        ({"kind": "hello", "client_id": 0, "provenance": {"base": "a", "train_data": "b"}}, ()),
        ({"kind": "hello", "client_id": 0, "provenance": {"test_data": "b"}}, ()),
        ({"kind": "update", "round": 1, "base_digest": "", "loss": 0.5}, ()),
        ({"kind": "update", "round": 1, "base_digest": ""}, ("num_examples", "loss")),
        ({"kind": "update", "round": 1, "base_digest": ""}, ("seconds",)),
        ({"kind": "statistics", "mean": 3}, ()),
    ],
)
def test_replies_that_say_more_than_the_list_are_refused(
    unit: str, head: dict[str, Any], figures: tuple[str, ...]
) -> None:
    with raises(PrivacyError, "not-disclosable"):
        Disclosure(unit).require_reply({"protocol": 1, **head}, figures)
