"""The laws for all rules."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import unittest
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair, fresh_pairs
from fedlora.aggregators import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientUpdate,
    accumulate,
    broadcast_change,
)
from fedlora.errors import FedloraError
from fedlora.lowrank import relative_error
from fedlora.testing._claim_laws import ClaimLaws
from fedlora.testing._require import refuses, require, require_same
from fedlora.testing._toy import (
    MIXED,
    MODULES,
    RANK,
    WEIGHTS,
    all_tensors,
    cast_adapter,
    cast_state,
    ideal,
    initial,
    saved,
    visible,
)


def follow(acc: Mapping[str, Tensor], version: int, plan: ClientPlan) -> dict[str, Tensor]:
    """What a client's base has changed by when it trains on a plan, module name -> [d_out, d_in].

    Args:
        acc: what it has changed by before.
        version: of that base.
        plan: with the base updates that are missing.
    """
    if plan.base_version == 0:
        return {}
    out = dict(acc)
    for base_update in plan.base_updates:
        fits = base_update.since in (0, version)
        require(fits, f"a base at version {version} cannot take the update from version {base_update.since}")
        out, version = accumulate(out, base_update), base_update.version
    require(version == plan.base_version, f"the base updates end at version {version}, not at {plan.base_version}")
    return out


def broken_laws(aggregator: Aggregator) -> list[str]:
    """The names of the contract's laws that a rule breaks, sorted; empty for a good rule."""
    contract = type("Contract", (AggregatorContract,), {"aggregator": aggregator})()
    broken = []
    for name, law in inspect.getmembers(contract, inspect.ismethod):
        if name.startswith("test_"):
            try:
                law()
            except unittest.SkipTest:
                continue
            except (AssertionError, FedloraError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
                broken.append(name)
    return broken


class AggregatorContract(ClaimLaws):
    """Laws of aggregation rules; set `aggregator`, and each `test_` method is one law.

    The clients are imaginary: "training" moves each tensor that the plan asks for by a random step that is a function
    of client, round and tensor name. Here are the laws for all rules; those of the claims are inherited.
    """

    def test_plan_is_data_that_fits_the_client(self) -> None:
        self._law("test_plan_is_data_that_fits_the_client")
        for state in self.states():
            for spec in self.specs():
                plan, again = self.aggregator.plan(state, spec), self.aggregator.plan(state, spec)
                require(plan.adapter.layout == spec.layout, "the plan's adapter does not have the client's layout")
                trained, sent = (plan.adapter.tensors(parts).keys() for parts in (plan.trains, plan.sends))
                require(sent <= trained, "the plan asks a client to send what it does not train")
                require(plan.first < plan.trains, "the plan trains all parts first, or some that it does not train")
                if Claim.PERSONAL in self.aggregator.claims:
                    require(bool(plan.kept), "claims PERSONAL, and clients send all that they train")
                else:
                    require(not plan.kept, "clients keep what they train, and the rule does not claim PERSONAL")
                tilted = {name: value.shape for name, value in plan.tilt.items()}
                shapes = {name: value.shape for name, value in plan.adapter.tensors(plan.sends).items()}
                require(tilted.items() <= shapes.items(), "the plan's tilt is not of what the client sends")
                require(not tilted or self.aggregator.tilts, "the plan has a tilt, and the rule does not say `tilts`")
                require_same(dict(plan.tilt), dict(again.tilt), 0.0, "the tilt of two plans")
                require(plan.base_version == state.base_version, "the plan trains on another version of the base")
                require_same(
                    plan.adapter.tensors(), again.adapter.tensors(), 0.0, "two plans for the same state and client"
                )
                if plan.fresh_seed is not None:
                    drawn = AdapterState(fresh_pairs(spec.layout, plan.fresh_seed, torch.float64), plan.adapter.dense)
                    require_same(
                        plan.adapter.tensors(),
                        drawn.tensors(),
                        0.0,
                        "the plan's pairs against those drawn from its fresh_seed",
                    )

    def test_one_client_alone_gives_back_that_client(self) -> None:
        self._law("test_one_client_alone_gives_back_that_client")
        for state in self.states():
            updates = self.updates(state, self.specs()[:1])
            after = self.aggregator.aggregate(state, updates)
            error = relative_error(broadcast_change(state, after), ideal(updates), updates[0].num_examples)
            require(error < 1e-12, f"the result with one client is not that client's: relative error {error:.2e}")
            require_same(after.adapter.dense, updates[0].adapter.dense, 1e-12, "the dense parts with one client")

    def test_dense_parts_are_averaged_as_themselves(self) -> None:
        self._law("test_dense_parts_are_averaged_as_themselves")
        for state in self.states():
            updates = self.updates(state, self.specs())
            after = self.aggregator.aggregate(state, updates)
            total = sum(update.num_examples for update in updates)
            for name in state.adapter.dense:
                mean = torch.stack([u.adapter.dense[name] * (u.num_examples / total) for u in updates]).sum(dim=0)
                require_same({name: after.adapter.dense[name]}, {name: mean}, 1e-12, "the mean of a dense part")

    def test_order_of_replies_does_not_matter(self) -> None:
        self._law("test_order_of_replies_does_not_matter")
        for state in self.states():
            updates = self.updates(state, self.specs())
            expected = visible(state, self.aggregator.aggregate(state, updates))
            for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
                got = visible(state, self.aggregator.aggregate(state, [updates[k] for k in order]))
                require_same(got, expected, 1e-12, f"updates in the order {order}")

    def test_scaling_all_weights_changes_nothing(self) -> None:
        self._law("test_scaling_all_weights_changes_nothing")
        for state in self.states():
            updates = self.updates(state, self.specs())
            expected = visible(state, self.aggregator.aggregate(state, updates))
            for factor in (10.0, 1e-3):
                scaled = [dataclasses.replace(u, num_examples=u.num_examples * factor) for u in updates]
                got = visible(state, self.aggregator.aggregate(state, scaled))
                require_same(got, expected, 1e-12, f"all weights times {factor}")

    def test_one_client_counts_as_its_duplicates(self) -> None:
        self._law("test_one_client_counts_as_its_duplicates")
        for state in self.states():
            *others, last = self.updates(state, self.specs())
            half = dataclasses.replace(last, num_examples=last.num_examples / 2)
            twin = dataclasses.replace(half, client_id=last.client_id + 100)
            expected = visible(state, self.aggregator.aggregate(state, [*others, last]))
            got = visible(state, self.aggregator.aggregate(state, [*others, half, twin]))
            require_same(got, expected, 1e-12, "one client split into two of half its weight")

    def test_streaming_equals_all_at_once(self) -> None:
        self._law("test_streaming_equals_all_at_once")
        for state in self.states():
            updates = self.updates(state, self.specs())
            expected = visible(state, self.aggregator.aggregate(state, updates))
            got = visible(state, self.aggregator.aggregate(state, iter(updates)))
            require_same(got, expected, 0.0, "updates from an iterator that can be read only once")

    def test_inputs_are_not_changed(self) -> None:
        self._law("test_inputs_are_not_changed")
        for state in self.states():
            kept_state = saved(state)
            plans = [self.aggregator.plan(state, spec) for spec in self.specs()]
            updates = self.updates(state, self.specs())
            kept = [dataclasses.replace(u, adapter=u.adapter.clone(), metrics=dict(u.metrics)) for u in updates]
            given = list(updates)
            self.aggregator.aggregate(state, given)
            require(len(given) == len(updates), "aggregate changed the list of updates")
            require_same(all_tensors(state), all_tensors(kept_state), 0.0, "the input state after plan and aggregate")
            require(state.metrics == kept_state.metrics, "aggregate changed the metrics of the state that it was given")
            for before, after in zip(kept, updates, strict=True):
                what = f"client {after.client_id}'s update after aggregate"
                require_same(after.adapter.tensors(), before.adapter.tensors(), 0.0, what)
                require(after.metrics == before.metrics, "aggregate changed an update's metrics")
            for plan, spec in zip(plans, self.specs(), strict=True):
                again = self.aggregator.plan(state, spec)
                require_same(plan.adapter.tensors(), again.adapter.tensors(), 0.0, "plans before and after aggregate")

    def test_resume_equals_uninterrupted(self) -> None:
        self._law("test_resume_equals_uninterrupted")
        one_go, stopped = copy.deepcopy(self.aggregator), self.aggregator
        straight = resumed = one_go.init(initial(torch.float64), seed=7)
        for _ in range(4):
            straight = self.next(straight, rule=one_go)
            # A new process knows the config and the saved state, and nothing else.
            stopped = copy.deepcopy(self.aggregator)
            resumed = saved(self.next(resumed, rule=stopped))
        require(straight.round == resumed.round == 4, "aggregate must count the rounds in GlobalState.round")
        require_same(all_tensors(resumed), all_tensors(straight), 0.0, "a run resumed after each round")

    def test_half_precision_is_accumulated_wide(self) -> None:
        self._law("test_half_precision_is_accumulated_wide")
        for dtype in (torch.bfloat16, torch.float16):
            # 300 equal terms: a bfloat16 running sum stops growing at 256 times its term.
            state = self.next(self.aggregator.init(initial(dtype), seed=7))
            specs = [dataclasses.replace(self.specs()[0], client_id=k) for k in range(10)]
            drawn = self.updates(state, specs, weights=[1.0] * 10, step=0.02)
            updates = [dataclasses.replace(drawn[k % 10], client_id=k) for k in range(300)]
            got = visible(state, self.aggregator.aggregate(state, updates))
            wide = cast_state(state, torch.float64)
            exact = [cast_adapter(update.adapter, torch.float64) for update in drawn]
            cast = [dataclasses.replace(update, adapter=exact[k % 10]) for k, update in enumerate(updates)]
            expected = visible(wide, self.aggregator.aggregate(wide, cast))
            require_same(got, expected, 4 * torch.finfo(dtype).eps, f"300 clients in {dtype} against float64")

    def test_no_update_is_refused(self) -> None:
        self._law("test_no_update_is_refused")
        for state in self.states():
            refuses("no update at all", lambda state=state: self.aggregator.aggregate(state, iter(())))

    def test_bad_weights_are_refused(self) -> None:
        self._law("test_bad_weights_are_refused")
        state = self.states()[-1]
        for weight in (0.0, -1.0, float("nan"), float("inf")):
            for place in (0, 3):
                updates = self.updates(state, self.specs())
                updates[place] = dataclasses.replace(updates[place], num_examples=weight)
                refuses(f"the weight {weight}", lambda u=updates: self.aggregator.aggregate(state, u))

    def test_updates_that_do_not_fit_are_refused(self) -> None:
        self._law("test_updates_that_do_not_fit_are_refused")
        state = self.states()[-1]
        good = self.updates(state, self.specs())
        pairs, dense = dict(good[1].adapter.pairs), dict(good[1].adapter.dense)
        module, other = MODULES
        head = min(dense)
        wider = LoraPair(torch.zeros(RANK, 13).double(), pairs[module].B, pairs[module].scale)
        bad = {
            "a missing module": AdapterState({module: pairs[module]}, dense),
            "an unknown module": AdapterState({**pairs, "extra": pairs[other]}, dense),
            "another d_in": AdapterState({**pairs, module: wider}, dense),
            "a missing dense part": AdapterState(pairs, {k: v for k, v in dense.items() if k != head}),
            "an unknown dense part": AdapterState(pairs, {**dense, "extra": dense[head]}),
            "a dense part of another shape": AdapterState(pairs, {**dense, head: dense[head][:1]}),
        }
        for what, adapter in bad.items():
            update = dataclasses.replace(good[1], adapter=adapter)
            refuses(f"{what}, in all updates", lambda u=update: self.aggregator.aggregate(state, [u]))
            refuses(f"{what}, in one update", lambda u=update: self.aggregator.aggregate(state, [good[0], u, good[2]]))

    def test_mixed_ranks_are_taken_or_refused(self) -> None:
        self._law("test_mixed_ranks_are_taken_or_refused")
        state = self.states()[-1]
        specs = self.specs(MIXED)
        if Claim.MIXED_RANKS in self.aggregator.claims:
            for _ in range(2):
                for spec in specs:
                    plan = self.aggregator.plan(state, spec)
                    require(plan.adapter.layout == spec.layout, "the plan does not have its client's rank")
                state = self.next(state, specs)
            return
        for ranks in ((4, 2), (4, 8)):
            spec = self.specs(ranks)[1]
            refuses("a client of another rank (in plan)", lambda spec=spec: self.aggregator.plan(state, spec))
            odd = ClientUpdate(spec.client_id, AdapterState(fresh_pairs(spec.layout, 0), state.adapter.dense), 1.0)
            refuses("an update of another rank", lambda odd=odd: self.aggregator.aggregate(state, [odd]))
        first = self.specs()[0]
        other = {name: dataclasses.replace(shape, scale=shape.scale * 2) for name, shape in first.layout.items()}
        spec = dataclasses.replace(first, layout=other)
        refuses("a client of another scale", lambda: self.aggregator.plan(state, spec))
        scaled = {name: dataclasses.replace(p, scale=p.scale * 2) for name, p in state.adapter.pairs.items()}
        update = ClientUpdate(0, AdapterState(scaled, state.adapter.dense), 1.0)
        refuses("an update of another scale", lambda: self.aggregator.aggregate(state, [update]))

    def test_base_is_changed_by_those_that_say_so(self) -> None:
        self._law("test_base_is_changed_by_those_that_say_so")
        state = self.states()[-1]
        if Claim.CHANGES_BASE not in self.aggregator.claims:
            require(not state.base_updates, "the rule changed the base and does not claim CHANGES_BASE")
            return
        spec = self.specs()[0]
        there: dict[str, Tensor] = {}
        sometimes: dict[str, Tensor] = {}
        asleep, seen = state.base_version, 0
        for base_update in state.base_updates:
            there = accumulate(there, base_update)
        for turn in range(6):
            state = self.next(state)
            # The last base update is the round's own, and all that a client gets which is sampled in every round.
            there = accumulate(there, state.base_updates[-1])
            late = follow({}, 0, self.aggregator.plan(state, spec))
            require_same(late, there, 0.0, "the base of a client that joins late, against one in every round")
            if turn % 3 == 2:
                plan = self.aggregator.plan(state, dataclasses.replace(spec, base_version=seen))
                sometimes, seen = follow(sometimes, seen, plan), plan.base_version
                require_same(
                    sometimes, there, 0.0, "the base of a client that missed rounds, against one in every round"
                )
        require(state.base_version == asleep + 6, "base_version must increase by 1 in each round")
        updates = self.updates(state, self.specs())
        stale = [dataclasses.replace(update, base_version=state.base_version - 1) for update in updates]
        refuses("an update trained on a stale base", lambda: self.aggregator.aggregate(state, stale))

    def test_identical_updates_come_back_unchanged(self) -> None:
        self._law("test_identical_updates_come_back_unchanged")
        for state in self.states():
            for spec in (self.specs(ranks)[0] for ranks in self.rank_lists()):
                first = self.updates(state, [spec])[0]
                for weights in (WEIGHTS[:2], WEIGHTS):
                    same = [
                        dataclasses.replace(first, client_id=k, adapter=first.adapter.clone(), num_examples=weight)
                        for k, weight in enumerate(weights)
                    ]
                    after = self.aggregator.aggregate(state, same)
                    error = relative_error(broadcast_change(state, after), ideal(same), sum(weights))
                    what = f"{len(same)} identical updates"
                    require(error < 1e-12, f"the result of {what} is not that update: relative error {error:.2e}")
                    require_same(after.adapter.dense, first.adapter.dense, 1e-12, f"the dense parts of {what}")

    def test_every_exemption_is_paid_with_a_law(self) -> None:
        for law, instead in self.exempt.items():
            require(hasattr(AggregatorContract, law), f"exempt names {law!r}, which is not a law of the contract")
            own = callable(getattr(self, instead, None)) and not hasattr(AggregatorContract, instead)
            require(
                own and instead.startswith("test_"),
                f"{law!r} is exempt, and {instead!r} is not a test_ method of this class: test what holds instead",
            )
