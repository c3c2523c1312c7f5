"""Exactness, linearity and mixed ranks for drawn shapes, ranks, scales, weights and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import (
    Aggregator,
    BaseUpdate,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    accumulate,
    broadcast_change,
    catch_up,
    compact,
)
from fedlora.aggregators.clipping import NormBound
from fedlora.aggregators.coordinatewise import Median
from fedlora.aggregators.fair import Fair
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.fedmomentum import FedMomentum
from fedlora.aggregators.fedsvd import FedSvd
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flexlora import FlexLora
from fedlora.aggregators.flora import Flora
from fedlora.aggregators.florist import Florist
from fedlora.aggregators.geometric_median import GeometricMedian
from fedlora.aggregators.hetlora import HetLora
from fedlora.aggregators.krum import Krum
from fedlora.aggregators.raflora import RaFlora
from fedlora.aggregators.rolora import RoLora
from fedlora.lowrank import DeltaSum, compress, frobenius, relative_error
from fedlora.rng import derive
from fedlora.testing._contract import follow

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
dims = st.integers(1, 24)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
weights = st.floats(1e-3, 1e6)
scales = st.floats(0.05, 8.0)
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(rule: Aggregator, state: GlobalState, spec: ClientSpec, weight: float, dtype: torch.dtype) -> ClientUpdate:
    plan = rule.plan(state, spec)
    tensors = {
        name: value + noise(tuple(value.shape), derive(spec.client_id, name), dtype)
        for name, value in plan.adapter.tensors(plan.sends).items()
    }
    return ClientUpdate(spec.client_id, plan.adapter.with_tensors(tensors), weight, plan.base_version)


@st.composite
def federations(draw: st.DrawFn) -> tuple[PairShape, list[PairShape], list[float], torch.dtype]:
    """A global shape, the clients' shapes (ranks up to the global one, any scale), weights and a dtype."""
    o, i, rank = draw(dims), draw(dims), draw(st.integers(1, 6))
    count = draw(st.integers(1, 5))
    shapes = [PairShape(o, i, draw(st.integers(1, rank)), draw(scales)) for _ in range(count)]
    return PairShape(o, i, rank, draw(scales)), shapes, [draw(weights) for _ in range(count)], draw(dtypes)


@QUICK
@given(federations())
def test_exact_rules_are_exact(drawn: tuple[PairShape, list[PairShape], list[float], torch.dtype]) -> None:
    shape, shapes, ns, dtype = drawn
    for rule in (FfaLora(), Flora(), RoLora(), FedSvd(), FedMomentum(1.0), Florist(1.0)):
        state = rule.init(AdapterState(fresh_pairs({"m": shape}, 1, dtype)), seed=2)
        for _ in range(2):
            specs = [ClientSpec(k, {"m": theirs}) for k, theirs in enumerate(shapes)]
            updates = [trained(rule, state, spec, n, dtype) for spec, n in zip(specs, ns, strict=True)]
            after = rule.aggregate(state, updates)
            ideal = DeltaSum()
            for update in updates:
                ideal.add(update.adapter.pairs, update.num_examples)
            made = broadcast_change(state, after)
            # Terms may cancel; rounding is relative to their sizes and not to what is left of the sum.
            size = sum(n / sum(ns) * frobenius([(1.0, u.adapter.pairs["m"])]) for n, u in zip(ns, updates, strict=True))
            wanted = [(-c / sum(ns), pair) for c, pair in ideal.terms("m")]
            assert frobenius([*made.terms("m"), *wanted]) <= ROUNDING[dtype] * size
            state = after


@QUICK
@given(dims, dims, st.integers(1, 6), scales, st.lists(weights, min_size=1, max_size=5), dtypes)
def test_fair_is_never_further_from_the_ideal_than_fedavg(
    o: int, i: int, rank: int, scale: float, ns: list[float], dtype: torch.dtype
) -> None:
    """At lambda = 0 the residual minimises the aggregation error over all B, FedAvg's among them."""
    start = AdapterState(fresh_pairs({"m": PairShape(o, i, rank, scale)}, 1, dtype))
    errors = []
    for rule in (Fair(0.0), FedAvg()):
        state = rule.init(start)
        specs = [ClientSpec(k, start.layout) for k in range(len(ns))]
        updates = [trained(rule, state, spec, n, dtype) for spec, n in zip(specs, ns, strict=True)]
        ideal = DeltaSum()
        for update in updates:
            ideal.add(update.adapter.pairs, update.num_examples)
        errors.append(relative_error(broadcast_change(state, rule.aggregate(state, updates)), ideal, sum(ns)))
    assert errors[0] <= errors[1] + 3 * ROUNDING[dtype]


@pytest.mark.slow
@QUICK
@given(dims, dims, st.integers(1, 6), scales, st.lists(weights, min_size=1, max_size=5), dtypes)
def test_singular_values_are_never_further_from_the_ideal_than_other_rules_of_their_rank(
    o: int, i: int, rank: int, scale: float, ns: list[float], dtype: torch.dtype
) -> None:
    """Eckart and Young: from the same updates, over two rounds of each rule's own."""
    start = AdapterState(fresh_pairs({"m": PairShape(o, i, rank, scale)}, 1, dtype))
    for other in (FedAvg(), Fair(0.0), HetLora(), RaFlora(), Krum(), Median(), GeometricMedian(), NormBound()):
        state = other.init(start)
        for _ in range(2):
            specs = [ClientSpec(k, start.layout) for k in range(len(ns))]
            updates = [trained(other, state, spec, n, dtype) for spec, n in zip(specs, ns, strict=True)]
            ideal = DeltaSum()
            for update in updates:
                ideal.add(update.adapter.pairs, update.num_examples)
            after = other.aggregate(state, updates)
            best = FlexLora().aggregate(state, updates)
            errors = [relative_error(broadcast_change(state, made), ideal, sum(ns)) for made in (best, after)]
            assert errors[0] <= errors[1] + 3 * ROUNDING[dtype]
            state = after


@QUICK
@given(st.lists(weights, min_size=1, max_size=8), dtypes, st.randoms(use_true_random=False))
def test_the_mean_lies_among_its_terms_in_any_order(ns: list[float], dtype: torch.dtype, order: object) -> None:
    values = [noise((5,), k, dtype) for k in range(len(ns))]
    means = []
    for _ in range(2):
        terms = list(zip(values, ns, strict=True))
        order.shuffle(terms)  # type: ignore[attr-defined]
        mean = WeightedMean()
        for value, n in terms:
            mean.add({"x": value}, n)
        means.append(mean.result()["x"])
    assert means[0].dtype == dtype
    stacked, slack = torch.stack(values).double(), ROUNDING[dtype]
    assert bool((means[0].double() >= stacked.amin(0) - slack).all())
    assert bool((means[0].double() <= stacked.amax(0) + slack).all())
    torch.testing.assert_close(means[0], means[1])


@QUICK
@given(dims, dims, st.integers(1, 30), st.integers(1, 30), scales)
def test_compress_keeps_all_that_fits(o: int, i: int, rank: int, target: int, scale: float) -> None:
    pair = LoraPair(noise((rank, i), 1, torch.float64), noise((o, rank), 2, torch.float64), 1.0)
    cut = compress(pair, target, scale)
    left = torch.linalg.svdvals(pair.B @ pair.A)[target:]
    gap = frobenius([(1.0, pair), (-1.0, cut)])
    size = frobenius([(1.0, pair)])
    assert cut.shape == PairShape(o, i, target, scale)
    assert abs(gap - float(left.norm())) <= 1e-7 * size


@QUICK
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.data())
def test_any_road_through_any_log_ends_with_the_same_bits(ranks: list[int], data: st.DataObject) -> None:
    there: dict[str, torch.Tensor] = {}
    states, log = [there], ()
    for version, rank in enumerate(ranks):
        pair = LoraPair(noise((rank, 9), version, torch.float32), noise((8, rank), -version % 97, torch.float32), 0.3)
        base_update = BaseUpdate(version, version + 1, AdapterState({"m": pair}))
        log = compact((*log, base_update))
        there = accumulate(there, base_update)
        states.append(there)
        since = data.draw(st.integers(0, version + 1))
        plan = ClientPlan(AdapterState(), base_version=version + 1, base_updates=catch_up(log, since))
        assert torch.equal(follow(states[since], since, plan)["m"], there["m"])
        assert log[-1] is base_update
