"""Every rule that a config can name obeys the contract; a file dropped into `aggregators/` needs no line here.

A rule that breaks a law on purpose has a class of its own, with the law that holds in its place. Below are the rules
with other fields, and rules around rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from support.errors import raises

from fedlora.aggregators import Aggregator, Claim, broadcast_change, rules
from fedlora.aggregators.clipping import CentredClipping, NormBound
from fedlora.aggregators.coordinatewise import Median, TrimmedMean
from fedlora.aggregators.drift import FedDyn, Scaffold
from fedlora.aggregators.fair import Fair
from fedlora.aggregators.fairness import Afl, QFedAvg
from fedlora.aggregators.fedex import FedEx
from fedlora.aggregators.fedmomentum import FedMomentum
from fedlora.aggregators.fedrot import FedRot
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flexlora import FlexLora
from fedlora.aggregators.flora import Flora
from fedlora.aggregators.florist import Florist
from fedlora.aggregators.fltrust import FlTrust
from fedlora.aggregators.fslora import FsLora
from fedlora.aggregators.geometric_median import GeometricMedian
from fedlora.aggregators.hetlora import HetLora
from fedlora.aggregators.krum import Krum
from fedlora.aggregators.personal import FedPer, FedRep, FedSaLora, Keep
from fedlora.aggregators.raflora import RaFlora
from fedlora.aggregators.ravan import Ravan
from fedlora.aggregators.rolora import RoLora
from fedlora.aggregators.server_optimisers import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedlora.errors import ConfigError
from fedlora.lowrank import relative_error
from fedlora.testing import AggregatorContract
from fedlora.testing._toy import ideal, initial, visible

ALONE, SAME = "test_one_client_alone_gives_back_that_client", "test_identical_updates_come_back_unchanged"
DENSE, TWINS = "test_dense_parts_are_averaged_as_themselves", "test_one_client_counts_as_its_duplicates"


def contract(name: str, base: type[AggregatorContract], rule: Aggregator, *marks: pytest.MarkDecorator) -> None:
    globals()[name] = type(name, (base,), {"aggregator": rule, "pytestmark": list(marks)})


# ------------------------------------------------------------------------------------------ what holds in their place


class Centre(AggregatorContract):
    """Dense parts get the same centre as the factors, and not the mean."""

    exempt: ClassVar[dict[str, str]] = {DENSE: "test_dense_parts_of_equal_clients_are_theirs"}

    def test_dense_parts_of_equal_clients_are_theirs(self) -> None:
        for state in self.states():
            update = self.updates(state, self.specs())[0]
            same = [dataclasses.replace(update, client_id=k, num_examples=1.0 + k) for k in range(4)]
            after = self.aggregator.aggregate(state, same)
            for name, value in update.adapter.dense.items():
                torch.testing.assert_close(after.adapter.dense[name], value, rtol=1e-12, atol=1e-12)


class Chosen(Centre):
    """Names are counted, not examples."""

    exempt: ClassVar[dict[str, str]] = {
        **Centre.exempt,
        TWINS: "test_a_crowd_of_names_decides",
    }

    def test_a_crowd_of_names_decides(self) -> None:
        state = self.states()[-1]
        updates = self.updates(state, self.specs())
        crowd = [dataclasses.replace(updates[3], client_id=10 + k) for k in range(20)]
        after = self.aggregator.aggregate(state, [*updates, *crowd])
        alone = self.aggregator.aggregate(state, [dataclasses.replace(updates[3], client_id=0)])
        got, wanted = visible(state, after), visible(state, alone)
        for name, value in wanted.items():
            assert float((got[name] - value).norm()) < 0.5 * float(value.norm())


class Trusting(AggregatorContract):
    exempt: ClassVar[dict[str, str]] = {
        DENSE: "test_who_goes_the_trusted_way_is_followed",
        TWINS: "test_who_goes_the_trusted_way_is_followed",
        ALONE: "test_the_trusted_client_alone_moves_nothing",
    }

    def test_who_goes_the_trusted_way_is_followed(self) -> None:
        """One goes where the root goes, and one nowhere: the result is the first's, whatever the weights."""
        for state in self.states():
            root = self.updates(state, self.specs())[0]
            loud = dataclasses.replace(root, client_id=1, num_examples=1e6)
            idle = dataclasses.replace(loud, client_id=2, adapter=self.aggregator.plan(state, self.specs()[2]).adapter)
            after = self.aggregator.aggregate(state, [root, loud, idle])
            alone = self.aggregator.inner.aggregate(state, [loud])  # type: ignore[attr-defined]
            torch.testing.assert_close(visible(state, after), visible(state, alone))
            assert after.metrics["fltrust/trusted"] == 0.5

    def test_the_trusted_client_alone_moves_nothing(self) -> None:
        state = self.states()[-1]
        for who in (0, 1):  # the root, and another without the root
            after = self.aggregator.aggregate(state, self.updates(state, self.specs())[who : who + 1])
            assert after.adapter is state.adapter
            assert after.base_updates == state.base_updates
            assert (after.round, after.metrics["fltrust/root"]) == (state.round + 1, 1.0 - who)


class Step(AggregatorContract):
    """A server optimiser goes along the inner rule's step by a length of its own."""

    exempt: ClassVar[dict[str, str]] = dict.fromkeys((ALONE, SAME, DENSE), "test_a_step_along_the_inner_rules")

    def test_a_step_along_the_inner_rules(self) -> None:
        """The first step of each number has the sign of the inner rule's, and none is zero but where that is."""
        state = self.states()[0]
        updates = self.updates(state, self.specs())
        inner: Aggregator = self.aggregator.inner  # type: ignore[attr-defined]
        wanted = inner.aggregate(self.aggregator.inner_state(state), updates).adapter.tensors()  # type: ignore[attr-defined]
        got = self.aggregator.aggregate(state, updates).adapter.tensors()
        for name, before in state.adapter.tensors().items():
            assert torch.equal((got[name] - before).sign(), (wanted[name] - before).sign())


class Dynamic(AggregatorContract):
    """The mean of all variates is added to the inner rule's result, which is where all clients meet."""

    exempt: ClassVar[dict[str, str]] = dict.fromkeys(
        (ALONE, SAME, DENSE, TWINS), "test_equal_clients_go_on_in_their_direction"
    )

    def test_equal_clients_go_on_in_their_direction(self) -> None:
        """Of N = 4 clients m say the same y: h is y - x for each of them, and x becomes y + m / N (y - x)."""
        state = self.states()[0]
        first = self.updates(state, self.specs())[0]
        for m in (1, 3, 4):
            same = [dataclasses.replace(first, client_id=k, num_examples=2.0) for k in range(m)]
            after = self.aggregator.aggregate(state, same).adapter.tensors()
            y, before = first.adapter.tensors(), state.adapter.tensors()
            wanted = {name: y[name] + m / 4 * (y[name] - before[name]) for name in before}
            torch.testing.assert_close(after, wanted, rtol=1e-12, atol=1e-12)


class Shortened(AggregatorContract):
    """Clients whose losses are equal: the mean step, times a factor below 1."""

    exempt: ClassVar[dict[str, str]] = dict.fromkeys((ALONE, SAME, DENSE), "test_equal_losses_give_a_part_of_the_step")

    def test_equal_losses_give_a_part_of_the_step(self) -> None:
        """Of the inner rule's, the same part for all tensors: with F = 4, 1 / (1 + q L mean |x - y_k|^2 / F)."""
        rule: QFedAvg = self.aggregator  # type: ignore[assignment]
        for state in self.states():
            updates = self.updates(state, self.specs())
            start = rule.plan(state, self.specs()[0])
            sent = start.adapter.tensors(start.sends)
            squares = [
                sum(float((u.adapter.tensors()[name] - value).square().sum()) for name, value in sent.items())
                for u in updates
            ]
            total = sum(u.num_examples for u in updates)
            mean = sum(u.num_examples * square for u, square in zip(updates, squares, strict=True)) / total
            part = 1 / (1 + rule.q * rule.lipschitz * mean / 4.0)
            after = rule.aggregate(state, updates)
            whole = rule.inner.aggregate(rule.inner_state(state), updates).adapter.tensors()
            for name, before in sent.items():
                wanted = before + part * (whole[name] - before)
                torch.testing.assert_close(after.adapter.tensors()[name], wanted, rtol=1e-12, atol=1e-12)
            assert after.metrics["qfedavg/step"] == pytest.approx(part)


class Agnostic(AggregatorContract):
    """Each client counts by its weight lambda_k, whatever its number of examples."""

    exempt: ClassVar[dict[str, str]] = dict.fromkeys((DENSE, TWINS), "test_examples_have_no_say")

    def test_examples_have_no_say(self) -> None:
        """While all losses are equal, all four count alike."""
        for state in self.states():
            updates = self.updates(state, self.specs())
            after = self.aggregator.aggregate(state, updates)
            equal = [dataclasses.replace(update, num_examples=1.0) for update in updates]
            rule: Afl = self.aggregator  # type: ignore[assignment]
            whole = rule.inner.aggregate(rule.inner_state(state), equal)
            torch.testing.assert_close(visible(state, after), visible(state, whole), rtol=1e-12, atol=1e-12)


class Cut(AggregatorContract):
    """A share of the singular values' energy is cut off."""

    exempt: ClassVar[dict[str, str]] = dict.fromkeys((ALONE, SAME), "test_the_error_is_within_the_energy_that_was_cut")

    def test_the_error_is_within_the_energy_that_was_cut(self) -> None:
        energy: float = self.aggregator.energy  # type: ignore[attr-defined]
        for state in self.states():
            for count in (1, 4):
                updates = self.updates(state, self.specs()[:count])
                total = sum(update.num_examples for update in updates)
                change = broadcast_change(state, self.aggregator.aggregate(state, updates))
                assert relative_error(change, ideal(updates), total) <= (1 - energy) ** 0.5


class ByNorm(AggregatorContract):
    exempt: ClassVar[dict[str, str]] = {TWINS: "test_examples_have_no_say_in_the_factors"}

    def test_examples_have_no_say_in_the_factors(self) -> None:
        state = self.states()[-1]
        updates = self.updates(state, self.specs())
        other = [dataclasses.replace(update, num_examples=1.0) for update in updates]
        one, two = self.aggregator.aggregate(state, updates), self.aggregator.aggregate(state, other)
        torch.testing.assert_close(one.adapter.tensors(("A", "B")), two.adapter.tensors(("A", "B")))


class AtFullRank(AggregatorContract):
    """Where a client has not all units, the others stay (raFLoRA), or are other clients' (FSLoRA)."""

    exempt: ClassVar[dict[str, str]] = {SAME: "test_identical_updates_of_full_rank_come_back_unchanged"}

    def test_identical_updates_of_full_rank_come_back_unchanged(self) -> None:
        for state in self.states():
            update = self.updates(state, self.specs())[0]
            same = [dataclasses.replace(update, client_id=k, num_examples=1.0 + k) for k in range(4)]
            after = self.aggregator.aggregate(state, same)
            assert relative_error(broadcast_change(state, after), ideal(same), 10.0) < 1e-12


# ------------------------------------------------------------------------------------------ the rules

OWN: dict[type[Aggregator], type[AggregatorContract]] = {
    Median: Centre,
    TrimmedMean: Centre,
    GeometricMedian: Centre,
    NormBound: Centre,
    CentredClipping: Centre,
    Krum: Chosen,
    FlTrust: Trusting,
    FedAvgM: Step,
    FedAdagrad: Step,
    FedAdam: Step,
    FedYogi: Step,
    FedDyn: Dynamic,
    QFedAvg: Shortened,
    Afl: Agnostic,
    Florist: Cut,
    HetLora: ByNorm,
    RaFlora: AtFullRank,
    FsLora: AtFullRank,
}
for _name, _rule in rules.items():
    contract(f"Test_{_name}", OWN.get(_rule, AggregatorContract), _rule())

VARIANTS: dict[str, tuple[type[AggregatorContract], Aggregator]] = {
    "FairByCosine": (AggregatorContract, Fair(solver="cosine", steps=30, lr=0.5)),
    "FairWithoutRegularisation": (AggregatorContract, Fair(regularisation=0.0)),
    "FlexLoraByRoots": (AggregatorContract, FlexLora(split="root")),
    "FlexLoraAtRandom": (AggregatorContract, FlexLora(svd="randomised")),
    "FloristExact": (AggregatorContract, Florist(energy=1.0)),
    "FedExCapped": (AggregatorContract, FedEx(rank_cap=2)),
    "FedMomentumExact": (AggregatorContract, FedMomentum(energy=1.0)),
    "HetLoraByExamples": (AggregatorContract, HetLora("examples")),
    "HetLoraByBoth": (AggregatorContract, HetLora("both")),
    "KrumOfFlora": (Chosen, Krum(inner=Flora())),
    "MultiKrumOfFfa": (Chosen, Krum(liars=0.25, keep=0.5, inner=FfaLora())),
    "MedianOfRoLora": (Centre, Median(RoLora())),
    "TrimmedMeanOfFfa": (Centre, TrimmedMean(0.25, FfaLora())),
    "GeometricMedianOfFlora": (Centre, GeometricMedian(Flora())),
    "NormBoundOfFedEx": (Centre, NormBound(inner=FedEx())),
    "CentredClippingOfRoLora": (Centre, CentredClipping(inner=RoLora())),
    "FlTrustOfFedEx": (Trusting, FlTrust(inner=FedEx())),
    "FedRotOfFedEx": (AggregatorContract, FedRot(1.0, FedEx())),
    "FedAdamOfFfa": (Step, FedAdam(inner=FfaLora())),
    "FedAdamOfRoLora": (Step, FedAdam(inner=RoLora())),
    "RavanOfTwoHeads": (AggregatorContract, Ravan(2)),
    "MedianOfRavan": (Centre, Median(Ravan(2))),
    "KrumOfRavan": (Chosen, Krum(inner=Ravan(2))),
    "KeepFactors": (AggregatorContract, Keep(("A",))),
    "KeepByPattern": (AggregatorContract, Keep(("*q:B", "head.bias"))),
    "KeepHeadsOfFlora": (AggregatorContract, Keep(inner=Flora())),
    "KeepHeadsOfKrum": (Chosen, Keep(inner=Krum())),
    "FedRepOfRoLora": (AggregatorContract, FedRep(3, RoLora())),
    "FedPerOfRoLora": (AggregatorContract, FedPer(RoLora())),
    "FedSaOfMedian": (AggregatorContract, FedSaLora(Median())),
    "ScaffoldOfRoLora": (AggregatorContract, Scaffold(RoLora())),
    "QFedAvgOfRoLora": (Shortened, QFedAvg(0.5, inner=RoLora())),
    "AflOfFlora": (Agnostic, Afl(inner=Flora())),
    "KrumOfQFedAvg": (Chosen, Krum(inner=QFedAvg(0.0))),
    "FedDynOfFedAvgM": (Dynamic, FedDyn(0.5, FedAvgM(momentum=0.0))),
    "KrumOfScaffold": (Chosen, Krum(inner=Scaffold())),
    "KeepHeadsOfScaffold": (AggregatorContract, Keep(inner=Scaffold())),
    "FedYogiOfMedianOfFfa": (Step, FedYogi(inner=Median(FfaLora()))),
}
OFTEN = ("KrumOfFlora", "FedAdamOfFfa", "KeepByPattern", "RavanOfTwoHeads")
for _name, (_base, _variant) in VARIANTS.items():
    contract(f"Test{_name}", _base, _variant, *([] if _name in OFTEN else [pytest.mark.slow]))


# ------------------------------------------------------------------------------------------ claims that follow

E, L, M, B, R, T, G, P = (
    Claim.EXACT,
    Claim.LINEAR,
    Claim.MIXED_RANKS,
    Claim.CHANGES_BASE,
    Claim.ROBUST,
    Claim.ANY_TENSORS,
    Claim.GAUGE_FREE,
    Claim.PERSONAL,
)


@pytest.mark.parametrize(
    ("rule", "claims"),
    [
        (Krum(), R),
        (Krum(liars=0.0), Claim.NONE),
        (Krum(inner=Flora()), R | M | B | G),
        (Krum(inner=FfaLora()), R | M),
        (GeometricMedian(Flora()), R | M | B | G),
        (NormBound(), R | T),
        (NormBound(bound=1.0), T),
        (NormBound(inner=Flora()), R | M | B),
        (FlTrust(inner=FfaLora()), R | M),
        (Median(FfaLora()), R),
        (TrimmedMean(trim=0.0), T),
        (CentredClipping(radius=1.0), T),
        (FedRot(inner=FedEx()), E | B),
        (FedAdam(), L | T),
        (FedAdam(inner=FfaLora()), L | M),
        (FedAvgM(inner=Median()), R | T),
        (FedEx(rank_cap=3), B),
        (FedMomentum(energy=1.0), E | B | M | G),
        (Florist(energy=1.0), E | B | M | G),
        (FedSaLora(), L | P),
        (Keep(inner=FedEx()), B | G | P),
        (FedPer(FfaLora()), L | M | P),
        (FedRep(2, FfaLora()), L | M | P),
        (Keep(("B",), FedAdam()), L | P),
    ],
    ids=repr,
)
def test_claims_follow_from_the_fields_and_the_inner_rule(rule: Aggregator, claims: Claim) -> None:
    assert rule.claims == claims
    assert dataclasses.replace(rule).claims == claims


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: Keep(()), "nothing-kept"),
        (lambda: Keep(("B",), FfaLora()), "factor-kept"),
        (lambda: FedSaLora(Flora()), "factor-kept"),
        (lambda: Krum(inner=FedPer()), "personal-inside"),
        (lambda: FedRep(0), "out-of-range"),
        (lambda: Keep(("A",), FedSaLora()), "personal-inside"),
        (lambda: Keep(("*:A",), FlexLora()).init(initial(torch.float32)), "factor-kept"),
    ],
)
def test_a_rule_that_cannot_do_without_what_is_kept_is_refused(make: Callable[[], object], code: str) -> None:
    with raises(ConfigError, code):
        make()


def test_fedsa_is_the_mean_of_a_over_everybodys_own_b() -> None:
    """Guo et al., ICLR 2025, arXiv 2410.01463, section 4: A <- sum_k p_k A_k, and nothing else moves."""
    federation = type("FedSa", (AggregatorContract,), {"aggregator": FedSaLora()})()
    state = federation.states()[0]
    updates = federation.updates(state, federation.specs())
    after = FedSaLora().aggregate(state, updates)
    total = sum(update.num_examples for update in updates)
    for name, pair in state.adapter.pairs.items():
        mean = sum(update.num_examples / total * update.adapter.pairs[name].A for update in updates)
        torch.testing.assert_close(after.adapter.pairs[name].A, mean, rtol=1e-14, atol=1e-14)
        assert torch.equal(after.adapter.pairs[name].B, pair.B)
    assert all(torch.equal(after.adapter.dense[name], value) for name, value in state.adapter.dense.items())
    assert FedSaLora().plan(state, federation.specs()[0]).sends == {"A"}
