"""The laws of the claims: each is tested of the rules that make its claim."""

from __future__ import annotations

import dataclasses
import unittest
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch

from fedlora.adapter import AdapterState
from fedlora.aggregators import Claim, ClientUpdate, WeightedMean, broadcast_change
from fedlora.lowrank import relative_error
from fedlora.testing._require import require, require_same
from fedlora.testing._toy import WEIGHTS, ToyFederation, alpha_doubled, ideal, noise, visible


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
        state = self.states()[-1]
        seen: list[list[weakref.ref[Any]]] = []

        def replies() -> Iterator[ClientUpdate]:
            for spec, weight in zip(self.specs(), WEIGHTS, strict=True):
                alive = sum(any(ref() is not None for ref in refs) for refs in seen)
                # The loop that reads this generator may still hold the update before.
                require(alive <= 1, f"claims LINEAR, but holds {alive} earlier updates")
                update = self.updates(state, [spec], weights=[weight])[0]
                seen.append([weakref.ref(t) for n, t in update.adapter.tensors().items() if not n.endswith(":A")])
                seen[-1].append(weakref.ref(update))
                yield update
                del update

        self.aggregator.aggregate(state, replies())

    def test_robust_bounds_one_liar(self) -> None:
        self._law("test_robust_bounds_one_liar", Claim.ROBUST)
        for state in self.states():
            specs = [dataclasses.replace(self.specs()[0], client_id=k) for k in range(9)]
            updates = self.updates(state, specs, weights=[1.0] * 9)
            honest = visible(state, self.aggregator.aggregate(state, updates))
            size = max(float(value.norm()) for value in honest.values())
            lie = {name: value * 1e8 for name, value in updates[4].adapter.tensors().items()}
            updates[4] = dataclasses.replace(updates[4], adapter=updates[4].adapter.with_tensors(lie))
            fooled = visible(state, self.aggregator.aggregate(state, updates))
            moved = max(float((fooled[name] - honest[name]).norm()) for name in honest)
            require(
                moved < 10 * size,
                f"claims ROBUST, but one bad client of 9 moves the result by {moved / size:.1e} of its size",
            )

    def test_any_tensors_are_treated_alike(self) -> None:
        self._law("test_any_tensors_are_treated_alike", Claim.ANY_TENSORS)
        state = self.states()[-1]
        updates = self.updates(state, self.specs())
        expected = self.aggregator.aggregate(state, updates).adapter.tensors()
        loose = dataclasses.replace(
            self.aggregator.init(AdapterState(dense=state.adapter.tensors()), seed=7), round=state.round
        )
        renamed = [dataclasses.replace(u, adapter=AdapterState(dense=u.adapter.tensors())) for u in updates]
        got = self.aggregator.aggregate(loose, renamed).adapter.tensors()
        require_same(got, expected, 1e-12, "the tensors under other names")

    def _law(self, name: str, claim: Claim = Claim.NONE) -> None:
        if name in self.exempt:
            raise unittest.SkipTest(f"{self.exempt[name]} is tested in its place")
        if claim not in self.aggregator.claims:
            raise unittest.SkipTest(f"{type(self.aggregator).__name__} does not claim {claim.name}")
