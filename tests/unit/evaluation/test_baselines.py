from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import raises

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import RunConfig, TrainConfig, parse_config
from fedlora.data.describe import main_domains
from fedlora.errors import ConfigError
from fedlora.evaluation.baselines import (
    as_one_round,
    centralised,
    expected_examples,
    local_only,
    spread_over_domains,
)
from fedlora.training import Workspace, open_workspace
from fedlora.training.job import TrainJob, learning_rate


@pytest.fixture
def config(tiny_bert, tiny_csv) -> RunConfig:
    return parse_config(
        "",
        [
            f"model.name='{tiny_bert}'",
            f"data.source='{tiny_csv}'",
            "data.domain=domain",
            "data.test_fraction=0.25",
            "partition.name=domain",
            "partition.clients=4",
            "adapter.rank=2",
            "adapter.targets=['query','value']",
            "train.steps=2",
            "train.batch_size=8",
            "train.lr=0.01",
            "rounds=2",
            "runtime.threads=1",
            "runtime.kernels=off",
        ],
    )


@pytest.fixture
def workspace(config: RunConfig) -> Workspace:
    return open_workspace(config)


def test_a_client_alone_takes_as_many_steps_as_in_the_federation(workspace: Workspace) -> None:
    found = local_only(workspace)
    assert [row["client"] for row in found["clients"]] == [0, 1, 2, 3]
    assert (
        [row["domain"] for row in found["clients"]]
        == ["films", "films", "phones", "phones"]
        == main_domains(workspace.data)
    )
    assert {row["steps"] for row in found["clients"]} == {4}
    figures = [row["accuracy"] for row in found["clients"]]
    assert found["best"]["accuracy"] == max(figures)
    assert found["worst"]["accuracy"] == min(figures)
    assert found["mean"]["accuracy"] == pytest.approx(np.mean(figures))
    phones = [row["domains"]["phones"]["accuracy"] for row in found["clients"]]
    assert found["mean"]["domains"]["phones"]["accuracy"] == pytest.approx(np.mean(phones))


def test_a_baseline_depends_on_nothing_that_ran_before(workspace: Workspace) -> None:
    one_by_one = workspace.config.runtime.model_copy(update={"cohort": 1})  # company rounds differently, and may
    workspace = replace(workspace, config=workspace.config.model_copy(update={"runtime": one_by_one}))
    alone = local_only(workspace, [2])["clients"][0]
    together = centralised(workspace)
    assert local_only(workspace, [0, 2])["clients"][1] == alone
    assert centralised(workspace) == together


def test_centralised_training_sees_as_many_examples_as_the_federation(workspace: Workspace) -> None:
    found = centralised(workspace)
    assert found["examples_seen"] == expected_examples(workspace) == 4 * 2 * 2 * 8
    assert found["steps"] == 2 * 2  # rounds x steps, each on a batch as large as all four clients' together
    assert centralised(workspace, 64)["examples_seen"] == 64


def test_expected_examples_follow_the_config(workspace: Workspace) -> None:
    def expected(**changes: object) -> int:
        return expected_examples(replace(workspace, config=workspace.config.model_copy(update=changes)))

    server = workspace.config.server
    assert expected(rounds=6) == 3 * expected()
    assert expected(server=server.model_copy(update={"fraction": 0.5})) == expected() / 2
    assert expected(server=server.model_copy(update={"clients_per_round": 1})) == expected() / 4
    everything = sum(len(rows) for rows in workspace.data.clients)
    assert expected(train=TrainConfig(epochs=2)) == 2 * 2 * everything
    assert expected(train=TrainConfig()) == 2 * everything
    assert expected(train=TrainConfig(steps=1, batch_size=10**6)) == 2 * everything


def test_longer_training_multiplies_what_the_config_gives() -> None:
    assert as_one_round(TrainConfig(steps=3), 4).steps == 12
    assert as_one_round(TrainConfig(epochs=0.5), 4).epochs == 2.0
    assert as_one_round(TrainConfig(), 4).epochs == 4.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_rounds", [0.0, 0.5, 1.0])
def test_a_baseline_has_the_learning_rates_of_the_run(schedule: str, warmup_rounds: float) -> None:
    rounds, steps = 3, 4
    once = TrainConfig(steps=steps, schedule=schedule, warmup_rounds=warmup_rounds, lr_end=1e-5)  # type: ignore[arg-type]
    job = TrainJob(AdapterState(), ALL_PARTS, np.empty(0, np.int64), 0)
    places = [(k % steps, replace(job, round=1 + k // steps, rounds=rounds)) for k in range(rounds * steps)]
    whole = as_one_round(once, rounds)
    assert [learning_rate(k, rounds * steps, whole, job) for k in range(rounds * steps)] == pytest.approx(
        [learning_rate(step, steps, once, place) for step, place in places]
    )


def test_baselines_go_by_a_schedule_over_the_whole_run(config: RunConfig) -> None:
    train = config.train.model_copy(update={"schedule": "cosine", "warmup_rounds": 1.0})
    workspace = open_workspace(config.model_copy(update={"train": train}))
    alone, together = local_only(workspace, [0])["clients"][0], centralised(workspace)
    assert (alone["steps"], together["steps"]) == (4, 4)


def test_each_job_says_whose_it_is(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of one's own is told, as in the federation."""
    from fedlora.evaluation import baselines

    seen: list[int] = []
    real = baselines.train_cohort
    monkeypatch.setattr(
        baselines, "train_cohort", lambda *on: (seen.extend(job.client_id for job in on[3]), real(*on))[1]
    )
    local_only(workspace, [1, 3])
    assert seen == [1, 3]


def test_no_client_is_refused(workspace: Workspace) -> None:
    with raises(ConfigError, "no-clients"):
        local_only(workspace, [])


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.integers(1, 14), st.booleans())
def test_chosen_clients_are_spread(domains: list[str], number: int, known: bool) -> None:
    chosen = spread_over_domains(domains if known else None, len(domains), number)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(number, len(domains))
    assert set(chosen) <= set(range(len(domains)))
    if known:
        taken = {name: sum(domains[k] == name for k in chosen) for name in set(domains)}
        most = max(taken.values())
        assert all(taken[name] >= min(most - 1, domains.count(name)) for name in taken)
