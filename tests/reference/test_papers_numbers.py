"""Rules against numbers of their papers' equations, computed once in NumPy float64 with dense matrices and loops.

The clients are those of `test_papers_equations`: draw = default_rng(k), A normal (r, 14), B normal (9, r),
n = 30, 10, 50, alpha 8, ranks 4, 4, 4 ("equal") or 4, 2, 3 ("mixed").
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_papers_equations import ALPHA, D_IN, D_OUT, RANK, RANKS, Array, Client, N, ideal, merged, same, start

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import Aggregator, ClientSpec, ClientUpdate, GlobalState, fedmomentum
from fedlora.aggregators._around import gram_of_changes, received, squared_distances, weighted_median
from fedlora.aggregators.clipping import CentredClipping, NormBound
from fedlora.aggregators.coordinatewise import Median, TrimmedMean
from fedlora.aggregators.fedex import FedEx
from fedlora.aggregators.fedmomentum import FedMomentum
from fedlora.aggregators.fedrot import FedRot
from fedlora.aggregators.fedsb import FedSb
from fedlora.aggregators.fedsvd import FedSvd
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flexlora import FlexLora
from fedlora.aggregators.flora import Flora
from fedlora.aggregators.florist import Florist
from fedlora.aggregators.fltrust import FlTrust
from fedlora.aggregators.frlora import FrLora
from fedlora.aggregators.fslora import FsLora, sketch
from fedlora.aggregators.geometric_median import GeometricMedian
from fedlora.aggregators.hetlora import HetLora
from fedlora.aggregators.krum import Krum, krum_scores
from fedlora.aggregators.raflora import RaFlora
from fedlora.aggregators.ravan import Ravan
from fedlora.aggregators.rolora import RoLora
from fedlora.aggregators.server_optimisers import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedlora.lowrank import compress, gram

EQUAL = [RANK] * 3


def clients(ranks: list[int]) -> list[Client]:
    return [Client(k, rank) for k, rank in enumerate(ranks)]


def error(change: Array, who: list[Client]) -> float:
    return float(np.linalg.norm(change - ideal(who)) / np.linalg.norm(ideal(who)))


def sigma(change: Array) -> Array:
    return np.linalg.svd(change, compute_uv=False)


def norm(value: torch.Tensor | Array) -> float:
    return float(np.linalg.norm(np.asarray(value)))


def close(found: float) -> object:
    return pytest.approx(found, rel=1e-12)


# ------------------------------------------------------------------------------------------ singular values


@pytest.mark.parametrize(
    ("ranks", "size", "at_four"),
    [(EQUAL, 26.7544047453501, 0.339796510432068), (RANKS, 32.1743712371917, 0.179045841580911)],
)
def test_flexlora_is_the_best_approximation(ranks: list[int], size: float, at_four: float) -> None:
    assert norm(ideal(clients(ranks))) == close(size)
    for rule in (FlexLora(), FlexLora(split="root"), FlexLora(svd="randomised")):
        _, change = merged(rule, clients(ranks), start())
        assert error(change, clients(ranks)) == pytest.approx(at_four, rel=1e-10)


@pytest.mark.parametrize(("ranks", "wanted"), [(EQUAL, 0.152413921959197), (RANKS, 0.0695317943059828)])
def test_flexlora_of_a_larger_rank_is_nearer(ranks: list[int], wanted: float) -> None:
    pair = LoraPair(torch.zeros(6, D_IN).double(), torch.zeros(D_OUT, 6).double(), ALPHA / 6)
    _, change = merged(FlexLora(), clients(ranks), AdapterState({"m": pair}, start().dense))
    assert error(change, clients(ranks)) == pytest.approx(wanted, rel=1e-10)


def test_flexloras_receivers_hold_orthonormal_rows_in_their_own_scale() -> None:
    state, _ = merged(FlexLora(), clients(RANKS), start())
    layout = {"m": replace(state.adapter.layout["m"], rank=2, scale=ALPHA / 2)}
    pair = FlexLora().plan(state, ClientSpec(7, layout)).adapter.pairs["m"]
    same(pair.A.numpy() @ pair.A.numpy().T, np.eye(2))
    assert norm(pair.B) == close(6.91750279631031)
    U, S, Vt = np.linalg.svd(ideal(clients(RANKS)))
    same(4 * pair.B.numpy() @ pair.A.numpy(), (U[:, :2] * S[:2]) @ Vt[:2], rtol=1e-11)


@pytest.mark.parametrize(
    ("energy", "equal", "mixed"),
    [(0.8, 4, 3), (0.9, 5, 3), (0.95, 5, 4), (0.99, 7, 6), (1.0, 9, 9)],
)
def test_florist_keeps_the_smallest_rank_that_holds_its_energy(energy: float, equal: int, mixed: int) -> None:
    for ranks, rank in ((EQUAL, equal), (RANKS, mixed)):
        state, change = merged(Florist(energy), clients(ranks), start())
        assert state.base_updates[-1].change.pairs["m"].rank == state.metrics["florist/rank"] == rank
        tail = sigma(ideal(clients(ranks)))[rank:]
        assert error(change, clients(ranks)) == pytest.approx(norm(tail) / norm(ideal(clients(ranks))), abs=1e-14)
        assert error(change, clients(ranks)) <= math.sqrt(1 - energy) + 1e-14


def test_florists_error_at_nine_tenths_of_the_energy() -> None:
    for ranks, wanted in ((EQUAL, 0.213965351323782), (RANKS, 0.298927114063078)):
        assert error(merged(Florist(0.9), clients(ranks), start())[1], clients(ranks)) == pytest.approx(
            wanted, rel=1e-10
        )


def test_flexloras_energy_cuts_inside_the_rank() -> None:
    for energy, rank in ((0.8, 3), (0.95, 4), (1.0, 4)):
        pair = merged(FlexLora(energy=energy), clients(RANKS), start())[0].adapter.pairs["m"]
        assert int(pair.B.any(dim=0).sum()) == rank
        assert bool(pair.A.any(dim=1).all())


def test_raflora_divides_each_unit_by_its_owners() -> None:
    wide = replace(
        start().pairs["m"], A=torch.zeros(9, D_IN).double(), B=torch.zeros(D_OUT, 9).double(), scale=ALPHA / 9
    )
    before = RaFlora().init(AdapterState({"m": wide}, start().dense))
    updates = [ClientUpdate(k, client.adapter, N[k]) for k, client in enumerate(clients(RANKS))]
    pair = RaFlora().aggregate(before, updates).adapter.pairs["m"]
    whole = pair.delta().numpy()
    assert norm(whole) == close(42.4449406056258)
    same(sigma(whole)[:4], np.array([27.770669816981, 24.659278251848, 15.225008199209, 12.517124182189]), rtol=1e-11)
    _, cut = merged(RaFlora(), clients(RANKS), start())
    assert norm(cut - whole) / norm(whole) == pytest.approx(0.13697949986035, rel=1e-10)
    _, equal = merged(RaFlora(), clients(EQUAL), start())
    same(equal, merged(FlexLora(), clients(EQUAL), start())[1], rtol=1e-11)


def test_raflora_keeps_the_spectrum_that_flexlora_loses() -> None:
    """40 rounds in which nobody trains: 10% of the weight at rank 8, 90% at rank 2; energy outside the first two."""
    draw = np.random.default_rng(5)
    change = draw.normal(size=(9, 8)) @ draw.normal(size=(8, 14))
    first = compress(LoraPair(torch.from_numpy(change), torch.eye(9).double(), 1.0), 8)
    outside = {}
    for rule in (FlexLora(), RaFlora()):
        state = rule.init(AdapterState({"m": first}))
        seen = []
        for _ in range(3):
            values = sigma(state.adapter.pairs["m"].delta().numpy())
            seen.append(1 - float(np.sum(values[:2] ** 2) / np.sum(values**2)))
            specs = [ClientSpec(k, {"m": replace(first.shape, rank=rank)}) for k, rank in enumerate((8, 2))]
            updates = [
                ClientUpdate(spec.client_id, rule.plan(state, spec).adapter, weight)
                for spec, weight in zip(specs, (0.1, 0.9), strict=True)
            ]
            state = rule.aggregate(state, updates)
        outside[type(rule)] = seen
    assert outside[FlexLora] == pytest.approx([3.469544972499e-01, 5.284791239036e-03, 5.312586389949e-05], rel=1e-9)
    assert outside[RaFlora] == pytest.approx([0.34695449725] * 3, rel=1e-9)


def test_raflora_keeps_a_unit_that_nobody_of_the_round_has() -> None:
    draw = np.random.default_rng(6)
    first = compress(LoraPair(torch.from_numpy(draw.normal(size=(9, 14))), torch.eye(9).double(), 1.0), 6)
    state = RaFlora().init(AdapterState({"m": first}))
    spec = ClientSpec(0, {"m": replace(first.shape, rank=2)})
    after = RaFlora().aggregate(state, [ClientUpdate(0, RaFlora().plan(state, spec).adapter, 1.0)])
    same(after.adapter.pairs["m"].delta().numpy(), first.delta().numpy(), rtol=1e-11)


# ------------------------------------------------------------------------------------------ residuals in the base


def test_fedex_puts_what_fedavg_lacks_into_the_base() -> None:
    state, change = merged(FedEx(), clients(EQUAL), start())
    residual = state.base_updates[-1].change.pairs["m"]
    assert (residual.rank, norm(residual.delta())) == (8, close(19.0127035577434))
    same(change, ideal(clients(EQUAL)))
    for cap, wanted in ((4, 0.1460299627276), (6, 0.0566675915740156)):
        _, capped = merged(FedEx(rank_cap=cap), clients(EQUAL), start())
        assert error(capped, clients(EQUAL)) == pytest.approx(wanted, rel=1e-10)


def test_fedex_of_equal_a_has_nothing_to_put_there() -> None:
    alike = [Client(k, RANK, Client(0, RANK).A) for k in range(3)]
    state, _ = merged(FedEx(), alike, start())
    assert norm(state.base_updates[-1].change.pairs["m"].delta()) < 1e-13


def test_fedmomentum_splits_at_the_adapters_rank() -> None:
    state, change = merged(FedMomentum(energy=1.0), clients(EQUAL), start())
    assert norm(state.adapter.pairs["m"].delta()) == close(25.1624903751752)
    assert norm(state.base_updates[-1].change.pairs["m"].delta()) == close(9.09105337115713)
    same(change, ideal(clients(EQUAL)), rtol=1e-11)
    tail = sigma(ideal(clients(EQUAL)))[4:] ** 2
    for kept, wanted in ((3, 0.0695128175041252), (4, 0.0279240331707727)):
        energy = float(tail[:kept].sum() / tail.sum()) - 1e-9
        state, change = merged(FedMomentum(energy), clients(EQUAL), start())
        assert state.base_updates[-1].change.pairs["m"].rank == kept
        assert error(change, clients(EQUAL)) == pytest.approx(wanted, rel=1e-10)


def test_fedmomentum_stacks_a_tail_that_a_cut_would_hardly_shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    for share in (0.1, 0.9):
        monkeypatch.setattr(fedmomentum, "WORTH_CUTTING", share)
        made[share] = merged(FedMomentum(energy=0.9), clients(EQUAL), start())
    (stacked, whole), (cut, change) = made.values()
    assert [state.base_updates[-1].change.pairs["m"].rank for state in (stacked, cut)] == [3 * RANK + RANK, 3]
    assert error(whole, clients(EQUAL)) < 1e-12 < error(change, clients(EQUAL))
    same(stacked.adapter.pairs["m"].delta().numpy(), cut.adapter.pairs["m"].delta().numpy())


def test_frlora_moves_the_step_of_the_product_into_the_base() -> None:
    draw = np.random.default_rng(99)
    A0, B0 = draw.normal(size=(RANK, D_IN)), draw.normal(size=(D_OUT, RANK))
    first = AdapterState({"m": LoraPair(torch.from_numpy(A0), torch.from_numpy(B0), 2.0)}, start().dense)
    state, change = merged(FrLora(), clients(EQUAL), first)
    base = state.base_updates[-1].change.pairs["m"]
    assert int(np.linalg.matrix_rank(base.delta().numpy())) == 8
    A = sum(client.p * client.A for client in clients(EQUAL))
    B = sum(client.p * client.B for client in clients(EQUAL))
    same(base.delta().numpy(), 2 * B @ A - 2 * B0 @ A0, rtol=1e-11)
    same(change, 2 * B @ A, rtol=1e-11)
    assert norm(change) == close(16.6433159599617)
    assert torch.equal(state.adapter.pairs["m"].A, first.pairs["m"].A)


# ------------------------------------------------------------------------------------------ one factor, turned, padded


def test_rolora_trains_b_first_and_then_a() -> None:
    A0 = np.random.default_rng(7).normal(size=(RANK, D_IN))
    nested = [Client(k, rank, A0[:rank]) for k, rank in enumerate(RANKS)]
    state, change = merged(RoLora(), nested, start(A0))
    same(change, ideal(nested))
    assert RoLora().plan(state, ClientSpec(0, state.adapter.layout)).sends == {"A", "dense"}
    updates = []
    for k, client in enumerate(nested):
        layout = {"m": replace(state.adapter.layout["m"], rank=client.A.shape[0], scale=client.s)}
        plan = RoLora().plan(state, ClientSpec(k, layout))
        client.A = np.random.default_rng(k + 5).normal(size=client.A.shape)
        client.B = plan.adapter.pairs["m"].B.numpy()
        updates.append(ClientUpdate(k, client.adapter, N[k]))
    after = RoLora().aggregate(state, updates)
    same(after.adapter.pairs["m"].delta().numpy(), ideal(nested))
    assert torch.equal(after.adapter.pairs["m"].B, state.adapter.pairs["m"].B)


def test_fedsvd_turns_the_mean_into_orthonormal_rows() -> None:
    A0 = Client(0, RANK).A
    alike = [Client(k, RANK, A0) for k in range(3)]
    state, change = merged(FedSvd(), alike, start(A0))
    same(change, ideal(alike))
    pair = state.adapter.pairs["m"]
    same(pair.A.numpy() @ pair.A.numpy().T, np.eye(RANK))
    wanted = np.array([12.927624952766, 5.067891168199, 3.035248717467, 2.099154901696])
    same(np.linalg.norm(pair.B.numpy(), axis=0), wanted, rtol=1e-11)
    # Nothing of A leaves the row space of the first A.
    same(pair.A.numpy() @ np.linalg.pinv(A0) @ A0, pair.A.numpy(), rtol=1e-11)


def test_fedsvd_of_a_zero_b_keeps_the_row_space() -> None:
    A0 = Client(0, RANK).A
    still = Client(0, RANK, A0)
    still.B = np.zeros((D_OUT, RANK))
    pair = merged(FedSvd(), [still], start(A0))[0].adapter.pairs["m"]
    assert not pair.B.any()
    same(pair.A.numpy() @ pair.A.numpy().T, np.eye(RANK))
    same(pair.A.numpy() @ np.linalg.pinv(A0) @ A0, pair.A.numpy(), rtol=1e-11)


def test_fedsvd_under_plain_sgd_is_ffa_lora_from_an_orthonormal_a() -> None:
    draw = np.random.default_rng(41)
    X, Y = draw.normal(size=(3, D_IN, 20)), draw.normal(size=(3, D_OUT, 20))
    A0 = np.linalg.qr(np.random.default_rng(99).normal(size=(RANK, D_IN)).T)[0].T
    found = []
    for rule in (FedSvd(), FfaLora()):
        state = rule.init(AdapterState({"m": start(A0).pairs["m"]}))
        for _ in range(5):
            pair = state.adapter.pairs["m"]
            updates = []
            for k in range(3):
                A, B = pair.A.numpy(), pair.B.numpy().copy()
                for _ in range(3):
                    B = B - 0.01 * 2.0 * (2.0 * B @ A @ X[k] - Y[k]) @ X[k].T @ A.T / 20
                updates.append(ClientUpdate(k, AdapterState({"m": replace(pair, B=torch.from_numpy(B))}), N[k]))
            state = rule.aggregate(state, updates)
        found.append(state.adapter.pairs["m"].delta().numpy())
    assert norm(found[1]) == close(0.332550304359892)
    same(found[0], found[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("rule", "size", "sigmas"),
    [
        (FedSb(), 56.470367927969136, [52.75677194611562, 18.477278566410188, 7.9672771069963035, 0.8591507582293322]),
        (Ravan(2), 20.143741036903187, [17.47311749537563, 10.005099045257595, 0.5039213364763139, 0.32330223606602]),
    ],
    ids=repr,
)
def test_cores_between_frozen_factors(rule: Aggregator, size: float, sigmas: list[float]) -> None:
    """dW = s sum_k p_k B R_k A, and s sum_k p_k sum_h f_kh B_h R_kh A_h: R_k (and then f_k) normal by default_rng(k),
    A by default_rng(77), B by default_rng(78). A server that multiplied the means of f and R would be off by 0.678."""
    A, B = (np.random.default_rng(seed).normal(size=shape) for seed, shape in ((77, (RANK, D_IN)), (78, (D_OUT, RANK))))
    state = rule.init(start())
    core = state.adapter.pairs["m"].core
    assert core is not None
    frozen = LoraPair(torch.from_numpy(A), torch.from_numpy(B), ALPHA / RANK, core)
    state = replace(state, adapter=AdapterState({"m": frozen}, state.adapter.dense))
    updates, cores, factors = [], [], []
    for k, n in enumerate(N):
        draw = np.random.default_rng(k)
        cores.append(draw.normal(size=core.shape))
        factors.append(draw.normal(size=(len(core), 1, 1)) if core.ndim == 3 else np.ones(()))
        sent = {"m:R": torch.from_numpy(factors[-1] * cores[-1])}
        updates.append(ClientUpdate(k, state.adapter.with_tensors(sent), n))
    change = rule.aggregate(state, updates).adapter.pairs["m"].delta().numpy()
    assert norm(change) == close(size)
    same(sigma(change), np.array([*sigmas, *[0.0] * 5]), rtol=1e-11)
    if core.ndim == 3:
        p = np.array(N) / sum(N)
        blocks = np.tensordot(p, np.array(factors), 1) * np.tensordot(p, np.array(cores), 1)
        wrong = sum(ALPHA / RANK * B[:, 2 * h : 2 * h + 2] @ blocks[h] @ A[2 * h : 2 * h + 2] for h in range(2))
        assert norm(wrong - change) / norm(change) == close(0.6781528173539864)


def test_hetlora_weighs_by_the_size_of_the_product() -> None:
    sizes = np.array([norm(client.B @ client.A) for client in clients(RANKS)])
    shares = sizes / sizes.sum()
    same(shares, np.array([0.366221230415, 0.253421931359, 0.380356838225]), rtol=1e-11)
    pair = merged(HetLora(), clients(RANKS), start())[0].adapter.pairs["m"]
    assert norm(pair.A) == close(3.71238578060384)
    unscaled = [replace(c.adapter.pairs["m"], scale=2.0) for c in clients(RANKS)]
    updates = [ClientUpdate(k, AdapterState({"m": pair}, start().dense), N[k]) for k, pair in enumerate(unscaled)]
    assert norm(HetLora().aggregate(HetLora().init(start()), updates).adapter.pairs["m"].B) == close(3.45486826212787)
    by_n = HetLora("examples").aggregate(HetLora().init(start()), updates).adapter.pairs["m"]
    assert (norm(by_n.A), norm(by_n.B)) == (close(4.19339159739672), close(3.96506401849257))


@pytest.mark.parametrize(
    ("strength", "wanted"), [(0.0, 0.710638257091024), (0.5, 0.615876193518732), (1.0, 0.560679946041969)]
)
def test_fedrot_turns_independent_clients_towards_the_broadcast(strength: float, wanted: float) -> None:
    first = AdapterState({"m": clients(EQUAL)[0].adapter.pairs["m"]}, start().dense)
    before = replace(FedRot(strength).init(first), round=1)  # A is turned in odd rounds
    updates = [ClientUpdate(k, client.adapter, N[k]) for k, client in enumerate(clients(EQUAL))]
    after = FedRot(strength).aggregate(before, updates)
    assert error(after.adapter.pairs["m"].delta().numpy(), clients(EQUAL)) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize(
    ("number", "noise", "wanted"),
    [
        (1, 0.0, (0.672156742105484, 0.25160129029055, 0.0)),
        (2, 0.0, (0.672156742105484, 0.25160129029055, 0.0)),
        (1, 0.1, (0.672740704416651, 0.253162524789938, 0.00579556685705558)),
    ],
)
def test_fedrot_is_exact_for_clients_that_are_one_but_for_a_rotation(
    number: int, noise: float, wanted: tuple[float, ...]
) -> None:
    draw = np.random.default_rng(99)
    A0, B0 = draw.normal(size=(RANK, D_IN)), draw.normal(size=(D_OUT, RANK))
    who = clients(EQUAL)
    for k, client in enumerate(who):
        draw = np.random.default_rng(200 + k)
        G = 0.3 * draw.normal(size=(RANK, RANK))
        T = np.linalg.solve(np.eye(RANK) + G - G.T, np.eye(RANK) - G + G.T)
        client.A = T.T @ (A0 + noise * draw.normal(size=A0.shape))
        client.B = (B0 + noise * draw.normal(size=B0.shape)) @ T
    first = AdapterState({"m": LoraPair(torch.from_numpy(A0), torch.from_numpy(B0), 2.0)}, start().dense)
    updates = [ClientUpdate(k, client.adapter, N[k]) for k, client in enumerate(who)]
    for strength, off in zip((0.0, 0.5, 1.0), wanted, strict=True):
        rule = FedRot(strength)
        after = rule.aggregate(replace(rule.init(first), round=number), updates)
        found = error(after.adapter.pairs["m"].delta().numpy(), who)
        assert found == pytest.approx(off, rel=1e-10, abs=1e-14)


def test_fslora_is_right_on_average_over_sketches() -> None:
    """One step of every client on one unit's gradient: over many rounds each unit moves as if all had been trained."""
    state = FsLora().init(start())
    layout = {"m": replace(state.adapter.layout["m"], rank=2, scale=ALPHA / 2)}
    whole, rounds = np.zeros(RANK), 600
    for number in range(rounds):
        units = sketch(replace(state, round=number), "m", RANK, 2, client_id=3)
        assert len(set(units.tolist())) == 2
        whole[units.numpy()] += RANK / 2 / rounds
    assert whole == pytest.approx(np.ones(RANK), abs=0.15)
    plan = FsLora().plan(state, ClientSpec(3, layout)).adapter.pairs["m"]
    same(plan.A.numpy(), state.adapter.pairs["m"].A[sketch(state, "m", RANK, 2, 3)].numpy())
    moved = replace(plan, B=plan.B + 1.0)
    after = FsLora().aggregate(state, [ClientUpdate(3, AdapterState({"m": moved}, start().dense), 1.0)])
    columns = np.zeros((D_OUT, RANK))
    columns[:, sketch(state, "m", RANK, 2, 3).numpy()] = 1.0
    same(after.adapter.pairs["m"].B.numpy(), columns)


# ------------------------------------------------------------------------------------------ server optimisers


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (FedAdagrad(lr=0.1, beta1=0.9), [0.015982853116, -0.020598090328, 0.013384826626]),
        (FedYogi(lr=0.1), [0.159134896078, -0.205262503008, 0.131078071461]),
        (FedAdam(lr=0.1), [0.159412244931, -0.205776481219, 0.131208529916]),
        (FedAvgM(), [3.309976724504, -5.308412851607, 0.578790645689]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_two_rounds_of_a_server_optimiser(rule: Aggregator, wanted: list[float]) -> None:
    state = rule.init(AdapterState(dense={"x": torch.zeros(3, dtype=torch.float64)}))
    for delta in np.random.default_rng(3).normal(size=(2, 3)):
        moved = AdapterState(dense={"x": state.adapter.dense["x"] + torch.from_numpy(delta)})
        state = rule.aggregate(state, [ClientUpdate(0, moved, 1.0)])
    same(state.adapter.dense["x"].numpy(), np.array(wanted), rtol=1e-10)


# ------------------------------------------------------------------------------------------ robust rules

X = np.random.default_rng(7).normal(size=(9, 6))
LIAR = X * np.where(np.arange(9) == 4, 1e8, 1.0)[:, None]


def centre(rule: Aggregator, rows: Array, weights: list[float] | None = None) -> Array:
    """What a rule makes of vectors, from zero."""
    state = rule.init(AdapterState(dense={"x": torch.zeros(rows.shape[1], dtype=torch.float64)}))
    updates = [
        ClientUpdate(k, AdapterState(dense={"x": torch.from_numpy(row)}), weights[k] if weights else 1.0)
        for k, row in enumerate(rows)
    ]
    found: Array = rule.aggregate(state, updates).adapter.dense["x"].numpy()
    return found


MULTI = "0.009617350336 0.841116883482 -0.449981602219 -0.540922896054 0.048545136088 -0.190325924194"
CENTRES: list[tuple[Aggregator, str, str]] = [
    (
        Median(),
        "X",
        "-0.032521704946 0.076140230377 -0.492206518551 -0.62047489982 0.074516228771 0.113308986003",
    ),
    (
        Median(),
        "LIAR",
        "-0.032521704946 0.076140230377 -0.492206518551 -0.808837239426 0.074516228771 0.119354025697",
    ),
    (
        TrimmedMean(2 / 9),
        "X",
        "-0.367534833903 0.118918282921 -0.471543141435 -0.618737600985 0.034330138327 0.022018676747",
    ),
    (
        TrimmedMean(2 / 9),
        "LIAR",
        "-0.367534833903 -0.029789137095 -0.471543141435 -0.750856802237 -0.209458968882 0.070734281179",
    ),
    (
        Krum(liars=2 / 9),
        "X",
        " ".join(map(repr, map(float, X[6]))),
    ),
    (
        Krum(liars=2 / 9),
        "LIAR",
        " ".join(map(repr, map(float, X[6]))),
    ),
    (
        Krum(liars=2 / 9, keep=3 / 9),
        "X",
        MULTI,
    ),
    (
        Krum(liars=2 / 9, keep=3 / 9),
        "LIAR",
        MULTI,
    ),
    (
        GeometricMedian(),
        "X",
        "-0.369334301436 0.411852142698 -0.502140023221 -0.543843175095 0.008815631654 -0.11492679999",
    ),
    (
        GeometricMedian(),
        "LIAR",
        "-0.409329605409 0.454801207741 -0.508462971095 -0.593559183297 0.015434836704 -0.125892797722",
    ),
    (
        CentredClipping(radius=2.0),
        "X",
        "-0.510595646145 0.232966379079 -0.512612688736 -0.585582559574 -0.015299932376 -0.109101234277",
    ),
    (
        CentredClipping(radius=2.0),
        "LIAR",
        "-0.57413417977 0.267032648139 -0.521895084562 -0.646332016325 -0.014763568702 -0.123035844068",
    ),
]


@pytest.mark.parametrize(("rule", "rows", "wanted"), CENTRES)
def test_robust_centres(rule: Aggregator, rows: str, wanted: str) -> None:
    found = centre(rule, {"X": X, "LIAR": LIAR}[rows])
    np.testing.assert_allclose(found, np.array(wanted.split(), dtype=np.float64), rtol=1e-9, atol=2e-9)


def test_norm_bounding_at_the_median_length() -> None:
    for rows in (X, LIAR):
        assert norm(centre(NormBound(), rows)) == pytest.approx(0.906446306215635, rel=1e-9)


def test_weighted_centres_count_one_client_as_its_halves() -> None:
    values, weights = np.array([[4.0], [1.0], [3.0], [2.0]]), [3.0, 1.0, 2.0, 5.0]
    halves, twice = np.append(values, [[2.0]], axis=0), [3.0, 1.0, 2.0, 2.5, 2.5]
    for rule, wanted in ((Median(), 2.0), (TrimmedMean(0.2), 2.545454545454545)):
        assert float(centre(rule, values, weights)[0]) == close(wanted)
        assert float(centre(rule, halves, twice)[0]) == close(wanted)
    middle = weighted_median(torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double())
    assert float(middle) == 3.5


def test_five_names_of_thirteen_win_krum() -> None:
    score = krum_scores([list(row) for row in ((X[:, None] - X[None]) ** 2).sum(-1)], 5)
    odd = int(np.argmax(score))
    for copies, chosen in ((3, 6), (4, odd)):
        crowd = np.concatenate([X, np.repeat(X[odd : odd + 1], copies, axis=0)])
        same(centre(Krum(liars=2 / len(crowd)), crowd), X[chosen])


def test_of_the_two_that_lie_closest_krum_takes_the_first_whatever_rounding_says() -> None:
    """With one neighbour two clients are each other's nearest: their scores are the same number, to the last bit."""
    draw = np.random.default_rng(0)

    def adapter() -> AdapterState:
        A, B = (torch.from_numpy(draw.normal(size=size)) for size in ((4, 33), (17, 4)))
        return AdapterState({"m": LoraPair(A, B, 0.7)}, {"x": torch.from_numpy(draw.normal(size=97))})

    state = Krum().init(adapter())
    for _ in range(20):
        updates = [ClientUpdate(k, adapter(), 1.0) for k in range(4)]
        apart = squared_distances(gram_of_changes(received(Krum(), state, updates)))
        assert torch.equal(apart, apart.T)
        near = min(range(4), key=krum_scores(apart.tolist(), 1).__getitem__)
        found = Krum().aggregate(state, updates).adapter
        assert all(torch.equal(found.tensors()[k], v) for k, v in updates[near].adapter.tensors().items())


def test_fltrust_follows_the_root() -> None:
    root = np.random.default_rng(8).normal(size=6)
    found = centre(FlTrust(root=9), np.concatenate([X, root[None]]))
    wanted = [-0.921676559619, -0.976579255616, -1.51319185783, -0.266136915631, -1.076442733147, -0.492893040634]
    same(found, np.array(wanted), rtol=1e-10)


def test_distances_of_changes_do_not_see_the_basis_of_the_factors() -> None:
    pairs = [client.adapter.pairs["m"] for client in clients(RANKS)]
    apart = squared_distances(gram([[(1.0, pair)] for pair in pairs])).sqrt()
    same(apart[[0, 0, 1], [1, 2, 2]].numpy(), np.array([69.004491456547, 73.534226738341, 74.644815835396]))
    T = np.random.default_rng(21).normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
    twin = LoraPair(torch.from_numpy(T @ pairs[0].A.numpy()), pairs[0].B @ torch.from_numpy(np.linalg.inv(T)), 2.0)
    both = gram([[(1.0, pairs[0])], [(1.0, twin)], [(1.0, pairs[0]), (-1.0, twin)]])
    assert float(both[2, 2].clamp(min=0.0).sqrt()) < 1e-6
    assert float(both[0, 1]) == pytest.approx(float(both[0, 0]), rel=1e-12)


def test_krum_then_flora_is_flora_of_the_chosen() -> None:
    """Two of three, of different ranks: the stack holds these two, with their own shares."""
    updates = [ClientUpdate(k, client.adapter, N[k]) for k, client in enumerate(clients(RANKS))]
    rule = Krum(liars=0.3, keep=0.67, inner=Flora())
    state: GlobalState = rule.init(start())
    after = rule.aggregate(state, updates)
    scores = krum_scores(squared_distances(gram([[(1.0, u.adapter.pairs["m"])] for u in updates])).tolist(), 1)
    kept = [update for update in updates if scores[update.client_id] < max(scores)]
    wanted = Flora().aggregate(Flora().init(start()), kept)
    assert after.metrics["krum/kept"] == len(kept) == 2
    assert torch.equal(after.base_updates[-1].change.pairs["m"].A, wanted.base_updates[-1].change.pairs["m"].A)
