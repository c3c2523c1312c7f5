"""The contract's toy federation: a model of two modules, and clients who train by drawing random steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import Aggregator, Claim, ClientPlan, ClientSpec, ClientUpdate, GlobalState, broadcast_change
from fedlora.lowrank import DeltaSum
from fedlora.rng import derive
from fedlora.state_io import flatten_state, pack, unflatten_state, unpack

MODULES = {"layer.0.q": (9, 12), "layer.0.v": (5, 12)}
"""Module name -> (d_out, d_in) of the contract's toy model: not square, and not the same for all."""
RANK = 4
"""Rank of the toy model's global adapter."""
WEIGHTS = (3.0, 1.0, 2.0, 5.0)
"""n_k of the contract's four clients."""
MIXED = (4, 2, 3, 1)
"""Their ranks, where ranks are mixed."""


class ToyFederation:
    """Four imaginary clients around a rule."""

    aggregator: ClassVar[Aggregator]

    def rank_lists(self) -> list[Sequence[int] | None]:
        return [None, MIXED] if Claim.MIXED_RANKS in self.aggregator.claims else [None]

    def specs(self, ranks: Sequence[int] | None = None) -> list[ClientSpec]:
        return [ClientSpec(k, layout_of(rank, mixed=ranks is not None)) for k, rank in enumerate(ranks or (RANK,) * 4)]

    def states(self, dtype: torch.dtype = torch.float64) -> list[GlobalState]:
        """The state before the first round, and a state with a past; B is not zero where clients may keep it."""
        start = initial(dtype)
        if Claim.PERSONAL in self.aggregator.claims:
            start = start.with_tensors({name: noise(B, 5, name) for name, B in start.tensors(("B",)).items()})
        first = self.aggregator.init(start, seed=7)
        return [first, self.next(self.next(first))]

    def next(
        self, state: GlobalState, specs: Sequence[ClientSpec] | None = None, rule: Aggregator | None = None
    ) -> GlobalState:
        rule = rule or self.aggregator
        return rule.aggregate(state, self.updates(state, specs or self.specs(), rule=rule))

    def updates(
        self,
        state: GlobalState,
        specs: Sequence[ClientSpec],
        weights: Sequence[float] = WEIGHTS,
        step: float = 0.3,
        rule: Aggregator | None = None,
    ) -> list[ClientUpdate]:
        updates = []
        for spec, weight in zip(specs, weights, strict=False):
            plan = (rule or self.aggregator).plan(state, spec)
            adapter = moved(plan, derive(state.round, "client", spec.client_id), step)
            facts = dict.fromkeys(plan.asks, 4.0)
            updates.append(ClientUpdate(spec.client_id, adapter, weight, plan.base_version, {"loss": 1.0}, facts))
        return updates


def layout_of(rank: int, mixed: bool) -> dict[str, PairShape]:
    """Alpha is fixed at 8; where ranks are mixed, the second module has a rank pattern and rsLoRA's scale."""
    first, second = MODULES
    other = max(1, rank - 1) if mixed else rank
    scale = 8 / other**0.5 if mixed else 8 / other
    return {first: PairShape(*MODULES[first], rank, 8 / rank), second: PairShape(*MODULES[second], other, scale)}


def initial(dtype: torch.dtype) -> AdapterState:
    dense = {"head.weight": torch.zeros(3, 5, dtype=dtype), "head.bias": torch.zeros(3, dtype=dtype)}
    dense = {name: noise(value, 5, name) for name, value in dense.items()}
    return AdapterState(fresh_pairs(layout_of(RANK, mixed=False), 5, dtype), dense)


def moved(plan: ClientPlan, seed: int, step: float) -> AdapterState:
    return plan.adapter.with_tensors(
        {name: value + step * noise(value, seed, name) for name, value in plan.adapter.tensors(plan.sends).items()}
    )


def noise(like: Tensor, seed: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(derive(seed, name))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def ideal(updates: Sequence[ClientUpdate]) -> DeltaSum:
    """sum_k n_k s_k B_k A_k: D* times the sum of the weights."""
    ideal = DeltaSum()
    for update in updates:
        ideal.add(update.adapter.pairs, update.num_examples)
    return ideal


def visible(before: GlobalState, after: GlobalState) -> dict[str, Tensor]:
    """All that clients see of an aggregation: each weight's change, multiplied out in float64, and the dense parts."""
    change = broadcast_change(before, after)
    out = {
        name: torch.stack([c * _as(p, torch.float64).delta() for c, p in change.terms(name)]).sum(0)
        for name in change.names
    }
    return out | {name: value.double() for name, value in after.adapter.dense.items()}


def _as(pair: LoraPair, dtype: torch.dtype) -> LoraPair:
    core = None if pair.core is None else pair.core.to(dtype)
    return LoraPair(pair.A.to(dtype), pair.B.to(dtype), pair.scale, core)


def alpha_doubled(adapter: AdapterState) -> AdapterState:
    pairs = {name: LoraPair(p.A, p.B / 2, p.scale * 2, p.core) for name, p in adapter.pairs.items()}
    return AdapterState(pairs, adapter.dense)


def in_another_gauge(adapter: AdapterState, seed: int) -> AdapterState:
    """The same changes of weights from other factors, (G A, B G^-1) with a matrix G for each module."""
    pairs = {}
    for name, pair in adapter.pairs.items():
        G = noise(pair.A.new_zeros(pair.rank, pair.rank), seed, name) + 2 * torch.eye(pair.rank, dtype=pair.A.dtype)
        pairs[name] = LoraPair(G @ pair.A, torch.linalg.solve(G, pair.B, left=False), pair.scale)
    return AdapterState(pairs, adapter.dense)


def scaled(adapter: AdapterState, factor: float) -> AdapterState:
    return adapter.with_tensors({name: value * factor for name, value in adapter.tensors().items()})


def cast_adapter(adapter: AdapterState, dtype: torch.dtype) -> AdapterState:
    return adapter.with_tensors({name: value.to(dtype) for name, value in adapter.tensors().items()})


def cast_state(state: GlobalState, dtype: torch.dtype) -> GlobalState:
    base_updates = tuple(dataclasses.replace(m, change=cast_adapter(m.change, dtype)) for m in state.base_updates)
    memory = {name: value.to(dtype) for name, value in state.memory.items()}
    return dataclasses.replace(
        state, adapter=cast_adapter(state.adapter, dtype), base_updates=base_updates, memory=memory
    )


def all_tensors(state: GlobalState) -> dict[str, Tensor]:
    out = {f"adapter {name}": value for name, value in state.adapter.tensors().items()}
    for base_update in state.base_updates:
        name = f"base update {base_update.since}-{base_update.version}"
        out |= {f"{name} {key}": value for key, value in base_update.change.tensors().items()}
    return out | {f"memory {name}": value for name, value in state.memory.items()}


def saved(state: GlobalState) -> GlobalState:
    """A state as a checkpoint gives it back."""
    return unflatten_state(*unpack(pack(*flatten_state(state))))
