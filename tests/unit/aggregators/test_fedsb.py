"""Fed-SB: the core's arithmetic. Singhal et al., TMLR 2026, arXiv 2502.15436, section 4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.cored import work_of
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import ClientSpec, load_aggregator
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.fedsb import FedSb
from fedlora.config import TrainConfig
from fedlora.errors import ConfigError, RuleError
from fedlora.evaluation.traffic import measure_traffic
from fedlora.federation.checks import refuse_early, require_servable
from fedlora.testing import AggregatorContract
from fedlora.training import open_workspace, train
from fedlora.training.cohort import train_cohort


def toy() -> AggregatorContract:
    federation: AggregatorContract = type("Toy", (AggregatorContract,), {"aggregator": FedSb()})()
    return federation


def test_factors_are_orthonormal_and_frozen_and_the_start_is_the_base() -> None:
    federation = toy()
    first, later = federation.states()
    for name, pair in first.adapter.pairs.items():
        one = torch.eye(pair.rank, dtype=torch.float64)
        torch.testing.assert_close(pair.A @ pair.A.T, one)
        torch.testing.assert_close(pair.B.T @ pair.B, one)
        assert not pair.delta().any()
        assert torch.equal(later.adapter.pairs[name].A, pair.A)
        assert torch.equal(later.adapter.pairs[name].B, pair.B)
        assert later.adapter.pairs[name].delta().any()


def test_the_core_is_the_mean_and_so_is_the_change() -> None:
    """By NumPy from the clients' own changes, dense."""
    federation = toy()
    state = federation.states()[1]
    updates = federation.updates(state, federation.specs())
    after = federation.aggregator.aggregate(state, updates)
    weights = np.array([update.num_examples for update in updates])
    for name, pair in after.adapter.pairs.items():
        theirs = [update.adapter.pairs[name] for update in updates]
        each = np.array([p.scale * p.B.numpy() @ p.core.numpy() @ p.A.numpy() for p in theirs if p.core is not None])
        assert pair.delta().numpy() == pytest.approx(np.tensordot(weights / weights.sum(), each, 1), abs=1e-12)


@pytest.mark.parametrize(("d", "rank"), [(32, 4), (64, 16)])
def test_it_sends_r_over_2_d_of_what_fedavg_sends(d: int, rank: int) -> None:
    layout = {name: PairShape(d, d, rank, 1.0) for name in ("q", "v")}
    start = AdapterState(fresh_pairs(layout, 0))
    mine, theirs = (measure_traffic(rule, start, [layout] * 3) for rule in (FedSb(), FedAvg()))
    assert mine.up / theirs.up == rank / (2 * d)
    assert mine.down == mine.up
    assert mine.first_down == theirs.first_down + mine.up  # A and B once


@pytest.fixture
def work(tiny_config: Any) -> Any:
    """A workspace in float64, and Fed-SB's start with cores that are not zero."""
    config = tiny_config("model.dtype=float64", "runtime.prefix_cache=off", "adapter.rank=4")
    return work_of(FedSb(), config, 0.1)


def test_a_step_on_the_core_is_the_projection_of_the_step_on_b(work: Any) -> None:
    """dR = -lr s B^T G A^T, and FFA-LoRA's step from the same weights is dB' = -lr s G A^T."""
    workspace, job = work
    sgd = TrainConfig(steps=1, batch_size=8, optimizer="sgd", lr=0.1)
    on = (workspace.base, workspace.task, workspace.data.train)
    core = train(*on, job, sgd).adapter
    plain = job.adapter.plain()
    ffa = train(*on, replace(job, adapter=plain, trains=frozenset({"B", "dense"})), sgd).adapter
    for name, before in job.adapter.pairs.items():
        step = ffa.pairs[name].B - plain.pairs[name].B
        assert core.pairs[name].core is not None
        moved = core.pairs[name].core - before.core  # type: ignore[operator]
        assert float(moved.abs().max()) > 1e-8
        torch.testing.assert_close(moved, before.B.T @ step, rtol=1e-9, atol=1e-14)
        assert torch.equal(core.pairs[name].A, before.A)
        assert torch.equal(core.pairs[name].B, before.B)
    for name, value in ffa.dense.items():
        torch.testing.assert_close(core.dense[name], value, rtol=1e-9, atol=1e-14)


def test_in_a_cohort_each_core_is_as_alone(work: Any) -> None:
    workspace, job = work
    jobs = [job, replace(job, seed=5, indices=np.arange(8, 20)), replace(job, seed=6)]
    config = TrainConfig(steps=3, batch_size=4, lr=0.01)
    on = (workspace.base, workspace.task, workspace.data.train)
    together = train_cohort(*on, jobs, [config] * 3)
    for one, found in zip(jobs, together, strict=True):
        alone = train(*on, one, config).adapter
        for name, value in alone.tensors().items():
            torch.testing.assert_close(found.adapter.tensors()[name], value, rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]


def test_what_has_no_place_for_a_core_is_refused(tiny_config: Any, tmp_path: Any) -> None:
    with raises(RuleError, "rank-above-layer", "lower adapter.rank"):
        FedSb().init(AdapterState({"m": LoraPair(torch.zeros(4, 8), torch.zeros(3, 4), 1.0)}))
    with raises(RuleError, "not-a-lora-pair", "must be"):
        LoraPair(torch.zeros(4, 8), torch.zeros(9, 4), 1.0, torch.zeros(4, 3))
    with raises(RuleError, "mixed-ranks", "client 0 has rank 2", "choose a rule that accepts mixed ranks (fedmomentum"):
        refuse_early(mixed := tiny_config("strategy.name=fedsb", "clients.ranks=[2,4]"), open_workspace(mixed))
    from fedlora.flower.flower_strategy import FedLoraStrategy

    config = tiny_config("strategy.name=fedsb")
    workspace = open_workspace(config)
    strategy = FedLoraStrategy("fedsb", alpha=8)
    state = strategy.rule.init(workspace.base.initial_adapter(0))
    with raises(RuleError, "core-elsewhere", "fedlora's own ServerApp"):
        strategy._plan(state)
    plan = load_aggregator("fedsb", {}).plan(state, ClientSpec(0, state.adapter.layout))
    own = config.model_copy(update={"train": config.train.model_copy(update={"loop": "json:dumps"})})
    with raises(ConfigError, "core-not-trained", "train.loop"):
        require_servable(own, workspace, iter([plan]), [0])
