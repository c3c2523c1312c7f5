"""RAVAN: heads of a block-diagonal core, and their factors. Raje et al., NeurIPS 2025, arXiv 2506.05568."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.cored import drawn, work_of
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pairs, times_core
from fedlora.aggregators import ClientUpdate, load_aggregator
from fedlora.aggregators.drift import FedDyn, Scaffold
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.fedsb import FedSb
from fedlora.aggregators.ravan import Ravan
from fedlora.audit.observed_trainer import first_job
from fedlora.config import TrainConfig
from fedlora.errors import ConfigError, PrivacyError, RuleError
from fedlora.evaluation.traffic import measure_traffic
from fedlora.lowrank import stack
from fedlora.training import open_workspace, train
from fedlora.training.cohort import train_cohort

HEADS = 2


@pytest.mark.parametrize("batch", [(), (3,)])
def test_blocks_are_a_block_diagonal_core(batch: tuple[int, ...]) -> None:
    B, blocks = torch.randn(*batch, 9, 6).double(), torch.randn(*batch, 3, 2, 2).double()
    whole = torch.zeros(*batch, 6, 6).double()
    for h in range(3):
        whole[..., 2 * h : 2 * h + 2, 2 * h : 2 * h + 2] = blocks[..., h, :, :]
    torch.testing.assert_close(times_core(B, blocks), B @ whole)
    if not batch:
        pair, plain = (LoraPair(torch.ones(6, 4).double(), B, 0.5, core) for core in (blocks, whole))
        for one, other in ((pair.delta(), plain.delta()), (pair.up, plain.up), (stack([(2.0, pair)]).B, plain.up)):
            torch.testing.assert_close(one, other)


def test_of_one_head_the_server_does_what_fed_sb_does() -> None:
    """To the bit: the same start, and the same mean of the same cores."""
    layout = {"m": PairShape(9, 14, 4, 2.0)}
    states = [rule.init(AdapterState(fresh_pairs(layout, 3)), seed=5) for rule in (Ravan(1), FedSb())]
    ends = []
    for state, rule in zip(states, (Ravan(1), FedSb()), strict=True):
        updates = [ClientUpdate(k, drawn(state.adapter, k), 1.0 + k) for k in range(3)]
        ends.append(rule.aggregate(state, updates).adapter.pairs["m"])
    assert torch.equal(ends[0].core[0], ends[1].core)  # type: ignore[index, arg-type]
    assert torch.equal(ends[0].A, ends[1].A)
    assert torch.equal(ends[0].B, ends[1].B)
    assert ends[0].core.any()  # type: ignore[union-attr]


def test_no_two_heads_share_a_direction() -> None:
    """Each head's change is orthogonal to the others': |dW|² = s² sum_h |R_h|². At first there is none."""
    rule, scale = Ravan(3), 2.0
    state = rule.init(AdapterState(fresh_pairs({"m": PairShape(9, 14, 6, scale)}, 3)), seed=5)
    assert not state.adapter.pairs["m"].delta().any()
    pair = drawn(state.adapter, 1).pairs["m"]
    assert pair.core is not None
    heads = [pair.B[:, h : h + 2] @ pair.core[h // 2] @ pair.A[h : h + 2] for h in (0, 2, 4)]
    for g, h in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(heads[g], heads[h])
        torch.testing.assert_close(heads[g].T @ heads[h], torch.zeros(14, 14, dtype=pair.B.dtype))
        torch.testing.assert_close(heads[g] @ heads[h].T, torch.zeros(9, 9, dtype=pair.B.dtype))
    assert float(pair.delta().norm()) == pytest.approx(scale * float(pair.core.norm()), rel=1e-6)
    assert torch.linalg.matrix_rank(pair.delta()) == 6


@pytest.mark.parametrize(("d", "rank", "heads"), [(32, 4, 2), (64, 16, 4)])
def test_it_sends_a_share_of_what_fed_sb_sends(d: int, rank: int, heads: int) -> None:
    layout = {name: PairShape(d, d, rank, 1.0) for name in ("q", "v")}
    start = AdapterState(fresh_pairs(layout, 0))
    mine, theirs = (measure_traffic(rule, start, [layout] * 3) for rule in (Ravan(heads), FedAvg()))
    assert mine.up / theirs.up == rank / (2 * d * heads)
    assert mine.down == mine.up


@pytest.fixture
def work(tiny_config: Any) -> Any:
    """A workspace in float64, and a client's job with cores that are not zero."""
    config = tiny_config("model.dtype=float64", "runtime.prefix_cache=off", "adapter.rank=4")
    return work_of(Ravan(HEADS), config, 1.0)


def test_a_step_moves_blocks_and_factors_and_their_products_are_sent(work: Any) -> None:
    """With G_h = s B_h^T G A_h^T: R_h - lr G_h times 1 - lr <R_h, G_h>; FFA-LoRA's step from the same weights is
    dB' = -lr s G A^T."""
    workspace, job = work
    sgd = TrainConfig(steps=1, batch_size=8, optimizer="sgd", lr=0.5)
    on = (workspace.base, workspace.task, workspace.data.train)
    found = train(*on, job, sgd).adapter
    plain = job.adapter.plain()
    ffa = train(*on, replace(job, adapter=plain, trains=frozenset({"B", "dense"})), sgd).adapter
    moved = 0.0
    for name, before in job.adapter.pairs.items():
        size = before.rank // HEADS
        step = ffa.pairs[name].B - plain.pairs[name].B
        for h in range(HEADS):
            units = slice(h * size, (h + 1) * size)
            block = before.core[h]
            change = before.B[:, units].T @ step[:, units]
            factor = 1 + (block * change).sum()
            moved = max(moved, abs(float(factor - 1)))
            torch.testing.assert_close(found.pairs[name].core[h], factor * (block + change), rtol=1e-9, atol=1e-14)
        assert torch.equal(found.pairs[name].A, before.A)
        assert torch.equal(found.pairs[name].B, before.B)
    assert moved > 1e-5
    assert found.tensors().keys() == job.adapter.tensors().keys(), "nobody else knows of factors"


def test_in_a_cohort_each_is_as_alone_and_goes_on_from_its_optimisers_state(work: Any) -> None:
    workspace, job = work
    jobs = [job, replace(job, seed=5, indices=np.arange(8, 20)), replace(job, seed=6)]
    config = TrainConfig(steps=3, batch_size=4, lr=0.01, keep_optimizer=True, proximal_mu=0.1)
    on = (workspace.base, workspace.task, workspace.data.train)
    together: Any = train_cohort(*on, jobs, [config] * 3)
    for one, found in zip(jobs, together, strict=True):
        alone = train(*on, one, config)
        for name, value in alone.adapter.tensors().items():
            torch.testing.assert_close(found.adapter.tensors()[name], value, rtol=1e-9, atol=1e-12)
        again = train(*on, replace(one, adapter=alone.adapter, optimizer=alone.optimizer), config)
        factors = [name for name in again.optimizer if name.startswith("step/") and name.endswith(":F")]
        assert len(factors) == len(job.adapter.pairs)
        assert all(again.optimizer[name] == 6 for name in factors)


def test_what_has_no_place_for_heads_is_refused(tiny_config: Any) -> None:
    with raises(ConfigError, "out-of-range", "1 or more"):
        Ravan(0)
    pairs = fresh_pairs({"m": PairShape(9, 14, 6, 1.0)}, 0)
    with raises(RuleError, "heads-and-rank", "4 heads", "rank 6"):
        Ravan(4).init(AdapterState(pairs))
    with raises(RuleError, "rank-above-layer", "Ravan"):
        Ravan(2).init(AdapterState({"m": LoraPair(torch.zeros(4, 8), torch.zeros(3, 4), 1.0)}))
    with raises(RuleError, "dora-unsupported", "Ravan"):
        Ravan(2).init(AdapterState(pairs, {"m.lora_magnitude_vector": torch.ones(9)}))
    for core in (torch.zeros(2, 2, 3), torch.zeros(3, 4, 4), torch.zeros(6, 1, 6), torch.zeros(1, 2, 3, 3)):
        with raises(RuleError, "not-a-lora-pair", "must be"):
            LoraPair(torch.zeros(6, 8), torch.zeros(9, 6), 1.0, core)
    with raises(PrivacyError, "products-not-audited", "audit strategy 'fedsb'"):
        first_job(open_workspace(tiny_config("strategy.name=ravan")))
    for around in (Scaffold, FedDyn):
        with raises(RuleError, "no-step", "trained factors"):
            around(inner=load_aggregator("ravan", {"heads": 3})).init(AdapterState(pairs))
