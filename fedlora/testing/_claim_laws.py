"""The laws of the claims: each is tested of the rules that make its claim."""

from __future__ import annotations

import dataclasses
import unittest
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import Claim, ClientUpdate, GlobalState, WeightedMean, broadcast_change
from fedlora.lowrank import relative_error
from fedlora.testing._require import require, require_same
from fedlora.testing._toy import (
    WEIGHTS,
    ToyFederation,
    all_tensors,
    alpha_doubled,
    ideal,
    in_another_gauge,
    noise,
    scaled,
    visible,
)


class ClaimLaws(ToyFederation):
    """What a rule is held to for each of its claims."""

    exempt: ClassVar[Mapping[str, str]] = {}
    """Law that this rule breaks on purpose -> the method of the subclass that holds in its place, a law of its own."""

    def test_exact(self) -> None:
        self._law("test_exact", Claim.EXACT)
        for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            for state in self.states(dtype):
                for ranks in self.rank_lists():
                    updates = self.updates(state, self.specs(ranks))
                    after = self.aggregator.aggregate(state, updates)
                    error = relative_error(broadcast_change(state, after), ideal(updates), sum(WEIGHTS))
                    require(error < bound, f"claims EXACT, but its aggregation error is {error:.2e} in {dtype}")

    def test_exact_trades_scale_for_factor(self) -> None:
        self._law("test_exact_trades_scale_for_factor", Claim.EXACT)
        for state in self.states():
            for ranks in self.rank_lists():
                updates = self.updates(state, self.specs(ranks))
                expected = visible(state, self.aggregator.aggregate(state, updates))
                twice = dataclasses.replace(state, adapter=alpha_doubled(state.adapter))
                moved = [dataclasses.replace(u, adapter=alpha_doubled(u.adapter)) for u in updates]
                got = visible(twice, self.aggregator.aggregate(twice, moved))
                require_same(got, expected, 1e-12, "alpha doubled and B halved, everywhere")

    def test_linear_sees_sums_only(self) -> None:
        self._law("test_linear_sees_sums_only", Claim.LINEAR)
        for state in self.states():
            updates = self.updates(state, self.specs())
            expected = visible(state, self.aggregator.aggregate(state, updates))
            sent = self.aggregator.plan(state, self.specs()[0]).sends
            # Two clients' tensors move so that the weighted sum does not.
            moved = list(updates)
            for k, sign in ((0, 1.0), (2, -1.0)):
                tensors = {
                    name: value + sign / updates[k].num_examples * noise(value, 11, name)
                    for name, value in updates[k].adapter.tensors(sent).items()
                }
                moved[k] = dataclasses.replace(updates[k], adapter=updates[k].adapter.with_tensors(tensors))
            got = visible(state, self.aggregator.aggregate(state, moved))
            require_same(got, expected, 1e-11, "other updates with the same weighted sum")
            one, other = updates[0], updates[2]
            both = WeightedMean()
            for update in (one, other):
                both.add(update.adapter.tensors(sent), update.num_examples)
            summed = dataclasses.replace(one, adapter=one.adapter.with_tensors(both.exact()), num_examples=both.total)
            got = visible(state, self.aggregator.aggregate(state, [summed, updates[1], *updates[3:]]))
            require_same(got, expected, 1e-11, "two updates replaced by their weighted mean")

    def test_linear_holds_one_update_at_a_time(self) -> None:
        self._law("test_linear_holds_one_update_at_a_time", Claim.LINEAR)
        for state in self.states():  # a rule may ask for other parts in every other round
            self._require_one_update_at_a_time(state)

    def _require_one_update_at_a_time(self, state: GlobalState) -> None:
        sent = self.aggregator.plan(state, self.specs()[0]).sends  # the rest is the plan's, and all updates share it
        seen: list[list[weakref.ref[Any]]] = []

        def replies() -> Iterator[ClientUpdate]:
            for spec, weight in zip(self.specs(), WEIGHTS, strict=True):
                alive = sum(any(ref() is not None for ref in refs) for refs in seen)
                # The loop that reads this generator may still hold the update before.
                require(alive <= 1, f"claims LINEAR, but holds {alive} earlier updates")
                update = self.updates(state, [spec], weights=[weight])[0]
                seen.append([weakref.ref(tensor) for tensor in update.adapter.tensors(sent).values()])
                seen[-1].append(weakref.ref(update))
                yield update
                del update

        self.aggregator.aggregate(state, replies())

    def test_robust_bounds_one_liar(self) -> None:
        self._law("test_robust_bounds_one_liar", Claim.ROBUST)
        self._require_robust(9, 1, lambda adapter: scaled(adapter, 1e8), "one bad client of 9")

    def test_robust_bounds_a_share_of_liars(self) -> None:
        self._law("test_robust_bounds_a_share_of_liars", Claim.ROBUST)
        self._require_robust(20, 2, lambda adapter: scaled(adapter, 1e8), "two bad clients of 20 who say the same")

    def test_robust_bounds_a_liar_in_another_gauge(self) -> None:
        self._law("test_robust_bounds_a_liar_in_another_gauge", Claim.ROBUST)

        def hidden(adapter: AdapterState) -> AdapterState:
            pairs = {name: LoraPair(pair.A * 1e8, pair.B / 1e8, pair.scale) for name, pair in adapter.pairs.items()}
            return AdapterState(pairs, adapter.dense)

        self._require_robust(9, 1, hidden, "one client of 9 with A times 1e8 and B by 1e8")

    def _require_robust(self, count: int, liars: int, lie: Callable[[AdapterState], AdapterState], who: str) -> None:
        for state in self.states():
            specs = [dataclasses.replace(self.specs()[0], client_id=k) for k in range(count)]
            updates = self.updates(state, specs, weights=[1.0] * count)
            honest = visible(state, self.aggregator.aggregate(state, updates))
            size = max(float(value.norm()) for value in honest.values())
            sent = self.aggregator.plan(state, specs[0]).sends
            told = lie(updates[4].adapter).tensors(sent)
            for k in range(4, 4 + liars):
                updates[k] = dataclasses.replace(updates[k], adapter=updates[k].adapter.with_tensors(told))
            fooled = visible(state, self.aggregator.aggregate(state, updates))
            moved = max(float((fooled[name] - honest[name]).norm()) for name in honest)
            require(moved < 10 * size, f"claims ROBUST, but {who} moves the result by {moved / size:.1e} of its size")

    def test_any_tensors_are_treated_alike(self) -> None:
        self._law("test_any_tensors_are_treated_alike", Claim.ANY_TENSORS)
        for state in self.states():
            updates = self.updates(state, self.specs())
            expected = self.aggregator.aggregate(state, updates).adapter.tensors()
            fresh = self.aggregator.init(AdapterState(dense=state.adapter.tensors()), seed=7)
            loose = dataclasses.replace(fresh, round=state.round, memory=state.memory)
            renamed = [dataclasses.replace(u, adapter=AdapterState(dense=u.adapter.tensors())) for u in updates]
            got = self.aggregator.aggregate(loose, renamed).adapter.tensors()
            require_same(got, expected, 1e-12, "the tensors under other names")

    def test_gauge_is_not_seen(self) -> None:
        self._law("test_gauge_is_not_seen", Claim.GAUGE_FREE)
        for state in self.states():
            for ranks in self.rank_lists():
                specs = self.specs(ranks)
                sent = self.aggregator.plan(state, specs[0]).sends
                require({"A", "B"} <= sent, "claims GAUGE_FREE, but its clients do not send both factors")
                updates = self.updates(state, specs)
                expected = visible(state, self.aggregator.aggregate(state, updates))
                turned = [dataclasses.replace(u, adapter=in_another_gauge(u.adapter, u.client_id)) for u in updates]
                got = visible(state, self.aggregator.aggregate(state, turned))
                require_same(got, expected, 1e-9, "each client's (A, B) as (G A, B G^-1)")

    def test_personal_kept_parts_are_not_read(self) -> None:
        self._law("test_personal_kept_parts_are_not_read", Claim.PERSONAL)
        require(Claim.EXACT not in self.aggregator.claims, "claims PERSONAL and EXACT: the clients have no common D*")
        for state in self.states():
            for ranks in self.rank_lists():
                updates = self.updates(state, self.specs(ranks))
                expected = all_tensors(self.aggregator.aggregate(state, updates))
                moved = []
                for update, spec in zip(updates, self.specs(ranks), strict=True):
                    kept = self.aggregator.plan(state, spec).kept
                    own = {name: value + noise(value, update.client_id, name) for name, value in kept.items()}
                    moved.append(dataclasses.replace(update, adapter=update.adapter.with_tensors(own)))
                got = all_tensors(self.aggregator.aggregate(state, moved))
                require_same(got, expected, 0.0, "updates with other values of what clients keep")

    def test_personal_all_clients_begin_alike(self) -> None:
        self._law("test_personal_all_clients_begin_alike", Claim.PERSONAL)
        first, later = self.states()
        for ranks in self.rank_lists():
            for spec in self.specs(ranks):
                begun = self.aggregator.plan(first, spec).kept
                late = self.aggregator.plan(later, spec).kept
                require_same(late, begun, 0.0, "where a client begins that comes late, against one of the first round")

    def _law(self, name: str, claim: Claim = Claim.NONE) -> None:
        if name in self.exempt:
            raise unittest.SkipTest(f"{self.exempt[name]} is tested in its place")
        if claim not in self.aggregator.claims:
            raise unittest.SkipTest(f"{type(self.aggregator).__name__} does not claim {claim.name}")
