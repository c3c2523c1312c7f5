"""User-level privacy: clipping, noise from the actual weights, adaptive clipping, and audits aimed at one client."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import Aggregator, ClientSpec, ClientUpdate, GlobalState
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flora import Flora
from fedlora.errors import PrivacyError, RuleError
from fedlora.privacy import server_dp as central_module
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.audit import AuditResult, audit_two_worlds
from fedlora.privacy.audit_clients import client_worlds
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.server_dp import CLIP, ServerDP

DELTA = 1e-5


def adapter(seed: int = 0, dense: int = 3) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    pair = LoraPair(torch.randn(2, 5, generator=g), torch.randn(4, 2, generator=g), 2.0)
    return AdapterState({"layer": pair}, {"head": torch.randn(dense, generator=g)})


def update(
    start: AdapterState, client: int, size: float, weight: float = 1.0, parts: tuple[str, ...] = ("A", "B", "dense")
) -> ClientUpdate:
    """An update whose difference to `start` has norm `size` over all its parts together."""
    g = torch.Generator().manual_seed(100 + client)
    moves = {name: torch.randn(t.shape, generator=g, dtype=torch.float64) for name, t in start.tensors(parts).items()}
    norm = math.sqrt(sum(float(m.square().sum()) for m in moves.values()))
    changed = {name: t + (moves[name] * size / norm).to(t.dtype) for name, t in start.tensors(parts).items()}
    return ClientUpdate(client, start.with_tensors(changed), weight)


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(central_module, "_noise", lambda like, std, generator: torch.zeros_like(like))


def flat(state: AdapterState) -> torch.Tensor:
    return torch.cat([t.double().flatten() for _, t in sorted(state.tensors().items())])


@pytest.mark.parametrize("rule", [FedAvg(), FfaLora()])
def test_without_noise_and_with_room_it_is_the_wrapped_rule(rule: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    start = adapter()
    wrapped = ServerDP(rule, noise_multiplier=1.0, clip_norm=10.0)
    parts = tuple(rule.plan(rule.init(start), ClientSpec(0, start.layout)).sends)
    updates = [update(start, k, 0.5 + k, weight=1.0 + k, parts=parts) for k in range(4)]
    got = wrapped.aggregate(wrapped.init(start), updates)
    expected = rule.aggregate(rule.init(start), updates)
    assert got.round == expected.round == 1
    assert torch.allclose(flat(got.adapter), flat(expected.adapter), atol=1e-6)


def test_each_update_is_clipped_over_all_its_tensors_jointly(monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    start = adapter()
    rule = ServerDP(FedAvg(), noise_multiplier=1.0, clip_norm=0.5, minimum_cohort=1)
    for size in (0.1, 0.5, 7.0, 1e6):
        after = rule.aggregate(rule.init(start), [update(start, 1, size)])
        moved = flat(after.adapter) - flat(start)
        assert float(moved.norm()) == pytest.approx(min(size, 0.5), rel=1e-5)
    two = rule.aggregate(rule.init(start), [update(start, 1, 0.2), update(start, 2, 1e4)])
    parts = [flat(update(start, 1, 0.2).adapter) - flat(start), flat(update(start, 2, 0.5).adapter) - flat(start)]
    assert torch.allclose(flat(two.adapter) - flat(start), sum(parts) / 2, atol=1e-6)


def test_an_update_that_is_not_finite_counts_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    start = adapter()
    rule = ServerDP(FedAvg(), noise_multiplier=1.0, clip_norm=0.5)
    broken = start.with_tensors({"head": torch.tensor([math.nan, math.inf, 0.0])})
    after = rule.aggregate(rule.init(start), [update(start, 1, 0.2), ClientUpdate(2, broken, 1.0)])
    assert torch.allclose(
        flat(after.adapter), flat(start) + (flat(update(start, 1, 0.2).adapter) - flat(start)) / 2, atol=1e-6
    )


@pytest.mark.parametrize(("weights", "largest"), [([1.0] * 10, 0.1), ([400.0, 10.0], 400 / 410), ([1.0, 1.0], 0.5)])
def test_noise_follows_the_largest_weight_that_really_was_there(weights: list[float], largest: float) -> None:
    start = AdapterState({}, {"head": torch.zeros(20_000, dtype=torch.float64)})
    rule = ServerDP(FedAvg(), noise_multiplier=1.5, clip_norm=2.0)
    after = rule.aggregate(rule.init(start), [ClientUpdate(k, start, w) for k, w in enumerate(weights)])
    assert float(after.adapter.dense["head"].std()) == pytest.approx(1.5 * 2.0 * largest, rel=0.03)
    assert after.metrics["noise_std"] == pytest.approx(1.5 * 2.0 * largest)


def test_noise_is_fresh_in_each_merge_whatever_the_seed() -> None:
    start = adapter()
    rule = ServerDP(FedAvg(), noise_multiplier=1.0, clip_norm=1.0)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(
            flat(rule.aggregate(rule.init(start, seed=5), [ClientUpdate(k, start, 1.0) for k in range(3)]).adapter)
        )
    assert not torch.allclose(*results)


def test_rules_that_look_at_single_updates_are_refused_with_the_reason() -> None:
    with raises(PrivacyError, "rule-not-linear", "Flora", "fedavg", "ffa"):
        ServerDP(Flora(), noise_multiplier=1.0, clip_norm=1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"clip_norm": math.inf},
        {"minimum_cohort": 0},
        {"quantile": 1.0},
        {"adaptive": True, "count_noise_multiplier": 1.0},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with raises(PrivacyError, "out-of-range"):
        ServerDP(FedAvg(), **{"noise_multiplier": 1.0, "clip_norm": 1.0} | wrong)


def test_a_small_cohort_drops_the_round_and_costs_nothing() -> None:
    start = adapter()
    rule = ServerDP(FedAvg(), noise_multiplier=1.0, clip_norm=1.0, minimum_cohort=3, adaptive=True)
    state = rule.init(start)
    after = rule.aggregate(state, [update(start, k, 1.0) for k in range(2)])
    assert torch.equal(flat(after.adapter), flat(start))
    assert (after.round, after.metrics["dropped"], after.memory[CLIP]) == (1, 1.0, state.memory[CLIP])
    assert rule.aggregate(state, [update(start, k, 1.0) for k in range(3)]).metrics["dropped"] == 0.0
    with raises(RuleError, "no-updates"):
        rule.aggregate(state, [])


def test_clients_with_other_starts_or_other_tensors_are_refused() -> None:
    start = adapter()
    rule = ServerDP(FfaLora(), noise_multiplier=1.0, clip_norm=1.0)
    state = rule.init(start)
    small = AdapterState(
        {"layer": LoraPair(start.pairs["layer"].A[:1], start.pairs["layer"].B[:, :1], 2.0)}, start.dense
    )
    with raises(RuleError, "mixed-ranks", "client 1"):
        rule.aggregate(state, [ClientUpdate(0, start, 1.0), ClientUpdate(1, small, 1.0)])
    other = ServerDP(FedAvg(), noise_multiplier=1.0, clip_norm=1.0)
    with raises(RuleError, "tensors-differ", "client 0", "'head'"):
        other.aggregate(other.init(start), [ClientUpdate(0, AdapterState(start.pairs), 1.0)])


# ---------------------------------------------------------------------------------------------- adaptive clipping


@pytest.mark.parametrize("first", [0.01, 1.0, 100.0])
def test_the_clip_norm_goes_to_the_quantile_of_the_norms(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Andrew et al. 2021: with norms 1..10 and gamma = 0.5 the clip norm ends between 5 and 6, from either side."""
    silent(monkeypatch)
    start = AdapterState({}, {"head": torch.zeros(1, dtype=torch.float64)})
    rule = ServerDP(FedAvg(), noise_multiplier=0.5, clip_norm=first, adaptive=True)
    state = rule.init(start)
    for _ in range(150):
        updates = [
            ClientUpdate(k, AdapterState({}, {"head": torch.tensor([1.0 + k]).double()}), 1.0) for k in range(10)
        ]
        state = replace(rule.aggregate(state, updates), adapter=start)
    assert 4.9 < float(state.memory[CLIP]) < 6.1


def test_one_step_of_the_clip_norm_is_the_papers() -> None:
    rule = ServerDP(FedAvg(), noise_multiplier=1.0, clip_norm=3.0, adaptive=True, quantile=0.3, clip_lr=0.2)
    quiet = replace(rule, count_noise_multiplier=1.0 + 1e-9)
    got = quiet._next_clip(3.0, 7, 10, _Zero())
    assert got == pytest.approx(3.0 * math.exp(-0.2 * (0.7 - 0.3)))


class _Zero(torch.Generator):
    """Marks a call whose noise is taken out below."""


@pytest.fixture(autouse=True)
def _no_noise_for_the_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    real = central_module._noise
    monkeypatch.setattr(
        central_module,
        "_noise",
        lambda like, std, g: torch.zeros_like(like) if isinstance(g, _Zero) else real(like, std, g),
    )


def test_the_count_query_is_paid_for() -> None:
    """z^-2 = z_D^-2 + sigma_b^-2: both Gaussians together cost what one round's entry says."""
    rule = ServerDP(FedAvg(), noise_multiplier=1.0, clip_norm=1.0, adaptive=True, count_noise_multiplier=2.0)
    assert rule.update_multiplier == pytest.approx(math.sqrt(4 / 3))
    assert rule.update_multiplier**-2 + 2.0**-2 == pytest.approx(rule.entry().noise_multiplier ** -2)
    start = AdapterState({}, {"head": torch.zeros(20_000, dtype=torch.float64)})
    after = rule.aggregate(rule.init(start), [ClientUpdate(k, start, 1.0) for k in range(10)])
    assert float(after.adapter.dense["head"].std()) == pytest.approx(math.sqrt(4 / 3) / 10, rel=0.03)
    generator = torch.Generator().manual_seed(0)
    logs = torch.tensor([math.log(rule._next_clip(1.0, 5, 10, generator)) for _ in range(4000)])
    assert float(logs.std()) == pytest.approx(0.2 * 2.0 / 10, rel=0.05)  # eta sigma_b / n


def test_a_resumed_run_goes_on_with_its_clip_norm_and_the_rules_memory() -> None:
    @dataclass(frozen=True)
    class Counting(Aggregator):
        claims = FedAvg.claims

        def aggregate(self, state: GlobalState, updates: object) -> GlobalState:
            assert CLIP not in state.memory
            seen = state.memory.get("seen", torch.tensor(0)) + 1
            return replace(FedAvg().aggregate(state, updates), memory={"seen": seen})

    start = adapter()
    rule = ServerDP(Counting(), noise_multiplier=1.0, clip_norm=1.0, adaptive=True)
    state = rule.init(start)
    for number in (1, 2):
        state = rule.aggregate(state, [update(start, k, 9.0) for k in range(4)])
        assert int(state.memory["seen"]) == number
    resumed = GlobalState(state.adapter, state.seed, state.round, state.base_updates, dict(state.memory))
    assert rule.aggregate(resumed, [update(start, 0, 1.0), update(start, 1, 1.0)]).metrics["clip_norm"] == float(
        state.memory[CLIP]
    )


def test_the_servers_ledger_counts_rounds_of_clients(tmp_path: object) -> None:
    rule = ServerDP(FedAvg(), noise_multiplier=4.0, clip_norm=1.0)
    ledger = Ledger(f"{tmp_path}/server.jsonl", unit="client")
    for number in range(16):
        ledger.spend(rule.entry(), run="r", round=number).close()
    one = replace(rule, noise_multiplier=1.0).entry()
    assert ledger.epsilon(DELTA) == pytest.approx(epsilon([one], DELTA), rel=1e-8)  # 16 at sigma 4 are 1 at sigma 1
    assert "one whole client" in ledger.statement(DELTA)


# ---------------------------------------------------------------------------------------------- audits of one client


UNEQUAL = [400.0, 10.0, 10.0, 10.0]
DROPPED = [1.0, 1.0]


def audited(weights: list[float], *, adaptive: bool = False, trials: int = 3000, **mutant: float) -> AuditResult:
    rule = ServerDP(FedAvg(), noise_multiplier=2.0, clip_norm=1.0, minimum_cohort=1, adaptive=adaptive)
    claim = epsilon([rule.entry()], DELTA)
    worlds = client_worlds(rule, weights, **mutant)
    return audit_two_worlds(worlds, claimed=claim, delta=DELTA, trials=trials)


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    "weights",
    [pytest.param(UNEQUAL, marks=pytest.mark.nightly), pytest.param(DROPPED, marks=pytest.mark.nightly), [1.0] * 10],
)
def test_the_claim_holds_against_a_worst_case_client(weights: list[float], adaptive: bool) -> None:
    assert not audited(weights, adaptive=adaptive).refuted


@pytest.mark.slow
def test_noise_for_equal_weights_is_caught_on_unequal_ones() -> None:
    assert audited(UNEQUAL, noise_for=1 / len(UNEQUAL)).refuted


@pytest.mark.slow
def test_noise_for_the_asked_clients_is_caught_when_most_of_them_drop_out() -> None:
    assert audited(DROPPED, noise_for=1 / 10).refuted


@pytest.mark.slow
def test_a_clip_norm_that_adapts_with_too_little_noise_is_caught() -> None:
    assert audited([1.0] * 10, adaptive=True, count_noise=0.05).refuted


def test_the_count_moves_by_one_when_an_update_is_replaced_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sensitivity that its noise is made for: no world moves it further."""
    silent(monkeypatch)
    rule = ServerDP(FedAvg(), noise_multiplier=2.0, clip_norm=1.0, adaptive=True)
    start = AdapterState({}, {"head": torch.zeros(1, dtype=torch.float64)})

    def count(*sizes: float) -> float:
        updates = [
            ClientUpdate(k, AdapterState({}, {"head": torch.tensor([size]).double()}), 1.0)
            for k, size in enumerate(sizes)
        ]
        moved = math.log(float(rule.aggregate(rule.init(start), updates).memory[CLIP]) / rule.clip_norm)
        return (rule.quantile - moved / rule.clip_lr) * len(sizes)

    others = (0.0, 3.0, 0.5)
    assert count(0.0, *others) - count(5.0, *others) == pytest.approx(1.0)
    assert count(math.nan, *others) == pytest.approx(count(5.0, *others))
