"""Rules that are wrong on purpose, each as public code is wrong: the contract must catch every one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fedlora.adapter import AdapterState, LoraPair, fresh_pairs
from fedlora.aggregators import (
    Aggregator,
    BaseUpdate,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    base_update_chain,
    require_modules,
)
from fedlora.aggregators._around import gram_of_changes, received, squared_distances
from fedlora.aggregators.fair import Fair
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.ffa import TRAINED, FfaLora
from fedlora.aggregators.flora import Flora
from fedlora.aggregators.krum import Krum, krum_scores
from fedlora.aggregators.personal import Keep
from fedlora.rng import derive


@dataclass(frozen=True)
class WrongStack(Flora):  # type: ignore[misc]  # final for users; broken here on purpose
    """FLoRA with its mistakes to choose from."""

    mistake: str = ""

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        given = list(updates)
        right = super().aggregate(state, given)
        total = sum(update.num_examples for update in given)
        change = {}
        for name in state.adapter.pairs:
            mine = [(update.num_examples / total, update.adapter.pairs[name]) for update in given]
            A = torch.cat([pair.A * (p * (1.0 if self.mistake == "no scale" else pair.scale)) for p, pair in mine])
            B = torch.cat([pair.B * (p if self.mistake == "p on both sides" else 1.0) for p, pair in mine], dim=1)
            change[name] = LoraPair(A, B, 1.0)
        last = BaseUpdate(state.base_version, state.base_version + 1, AdapterState(change))
        return replace(right, base_updates=(*right.base_updates[:-1], last))


@dataclass(frozen=True)
class KeepsOldAdapter(Flora):  # type: ignore[misc]
    """Merges the stack into the base and leaves the same change in the adapter too."""

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        given = list(updates)
        return replace(super().aggregate(state, given), adapter=given[0].adapter)


@dataclass(frozen=True)
class NoVersions(Flora):  # type: ignore[misc]
    """Sends the newest stack alone, whatever the client missed, and takes replies from any base."""

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        return replace(super().plan(state, client), base_updates=state.base_updates[-1:])

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return super().aggregate(state, (replace(update, base_version=state.base_version) for update in updates))


@dataclass(frozen=True)
class UnseededFresh(Flora):  # type: ignore[misc]
    """Draws the fresh A from the process's random state."""

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        plan = super().plan(state, client)
        seed = int(torch.randint(1 << 30, ()))
        return replace(plan, adapter=AdapterState(fresh_pairs(client.layout, seed, torch.float64), plan.adapter.dense))


@dataclass(frozen=True)
class InPlace(Aggregator):
    """The mean, built up inside the first client's tensors."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        FedAvg().aggregate(state, given := list(updates))
        total = sum(update.num_examples for update in given)
        first = given[0].adapter
        for name, value in first.tensors().items():
            value.mul_(given[0].num_examples / total)
            for update in given[1:]:
                value.add_(update.adapter.tensors()[name], alpha=update.num_examples / total)
        return replace(state, adapter=first, round=state.round + 1)


@dataclass(frozen=True)
class LastOnly(Aggregator):
    """A loop that assigns where it should add."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        FedAvg().aggregate(state, given := list(updates))
        return replace(state, adapter=given[-1].adapter, round=state.round + 1)


@dataclass(frozen=True)
class Unweighted(Aggregator):
    """The plain mean over the replies: n_k is not read."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        FedAvg().aggregate(state, given := list(updates))
        return FedAvg().aggregate(state, [replace(update, num_examples=1.0) for update in given])


@dataclass(frozen=True)
class ReadsTwice(Aggregator):
    """Goes over the replies once for the total and once for the sum."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        total = sum(update.num_examples for update in updates)
        mean = WeightedMean()
        for update in updates:
            mean.add(update.adapter.tensors(), update.num_examples / total)
        return FedAvg().aggregate(state, updates) if mean.count else replace(state, round=state.round + 1)


@dataclass(frozen=True)
class KeepsAll(Aggregator):
    """Right, but claims LINEAR while it holds every update."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return FedAvg().aggregate(state, list(updates))


@dataclass(frozen=True)
class ClaimsExact(Aggregator):
    """FedAvg over both factors, sold as exact."""

    claims: ClassVar[Claim] = Claim.EXACT

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return FedAvg().aggregate(state, updates)


@dataclass(frozen=True)
class ClaimsLinear(Aggregator):
    """LoRA-FAIR, sold as a sum."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return Fair().aggregate(state, updates)


@dataclass(frozen=True)
class ClaimsRobust(Aggregator):
    """A mean, sold as robust."""

    claims: ClassVar[Claim] = Claim.ROBUST

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return FedAvg().aggregate(state, updates)


@dataclass(frozen=True)
class HeadFrozenWithA(Aggregator):
    """FFA-LoRA that freezes the head together with A."""

    claims: ClassVar[Claim] = Claim.EXACT | Claim.LINEAR | Claim.MIXED_RANKS

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        return FfaLora().plan(state, client)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        after = FfaLora().aggregate(state, updates)
        return replace(after, adapter=AdapterState(after.adapter.pairs, state.adapter.dense))


@dataclass(frozen=True)
class PadsWithoutScale(Aggregator):
    """FFA-LoRA with mixed ranks: B is padded, and s_k / s left out, on both ways."""

    claims: ClassVar[Claim] = Claim.EXACT | Claim.LINEAR | Claim.MIXED_RANKS

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        require_modules(state, client.layout, client.client_id)
        pairs = {
            name: LoraPair(pair.A[: client.layout[name].rank], pair.B[:, : client.layout[name].rank], theirs.scale)
            for (name, pair), theirs in zip(state.adapter.pairs.items(), client.layout.values(), strict=True)
        }
        return ClientPlan(AdapterState(pairs, state.adapter.dense), trains=TRAINED, sends=TRAINED)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        def unscaled() -> Iterable[ClientUpdate]:
            for update in updates:
                pairs = {
                    name: replace(pair, scale=state.adapter.pairs[name].scale if name in state.adapter.pairs else 1.0)
                    for name, pair in update.adapter.pairs.items()
                }
                yield replace(update, adapter=AdapterState(pairs, update.adapter.dense))

        return FfaLora().aggregate(state, unscaled())


@dataclass(frozen=True)
class TakesAnyRank(Aggregator):
    """FedAvg that cuts larger factors to the global rank and keeps quiet about it."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        return ClientPlan(state.adapter)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        def cut() -> Iterable[ClientUpdate]:
            for update in updates:
                pairs = {}
                for name, pair in update.adapter.pairs.items():
                    mine = state.adapter.pairs.get(name, pair)
                    A, B = pair.A.new_zeros(mine.A.shape[0], pair.A.shape[1]), pair.B.new_zeros(mine.B.shape)
                    r = min(mine.rank, pair.rank)
                    A[:r], B[:, :r] = pair.A[:r], pair.B[:, :r]
                    pairs[name] = LoraPair(A, B, mine.scale)
                yield replace(update, adapter=AdapterState(pairs, update.adapter.dense))

        return FedAvg().aggregate(state, cut())


@dataclass(frozen=True)
class HiddenMemory(Aggregator):
    """Momentum that lives in the process and not in the state."""

    claims: ClassVar[Claim] = Claim.NONE
    seen: dict[str, Any] = field(default_factory=dict)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        after = FedAvg().aggregate(state, updates)
        last = self.seen.get("last", after.adapter).tensors()
        self.seen["last"] = after.adapter
        mixed = {name: 0.9 * value + 0.1 * last[name] for name, value in after.adapter.tensors().items()}
        return replace(after, adapter=after.adapter.with_tensors(mixed))


@dataclass(frozen=True)
class NarrowSum(Aggregator):
    """The mean as a running sum in the senders' own dtype."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        total, sums, checks = 0.0, {}, WeightedMean()
        for update in updates:
            FedAvg().aggregate(state, [update])
            checks.add({name: value.double() for name, value in update.adapter.tensors().items()}, update.num_examples)
            for name, value in update.adapter.tensors().items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * update.num_examples
            total += update.num_examples
        checks.result()
        mean = {name: value / total for name, value in sums.items()}
        return replace(state, adapter=state.adapter.with_tensors(mean), round=state.round + 1)


@dataclass(frozen=True)
class FirstWins(Aggregator):
    """Takes A from whoever answers first."""

    claims: ClassVar[Claim] = Claim.NONE

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        after = FedAvg().aggregate(state, given := list(updates))
        first = {f"{name}:A": pair.A for name, pair in given[0].adapter.pairs.items()}
        return replace(after, adapter=after.adapter.with_tensors(first))


@dataclass(frozen=True)
class SilentBaseChange(Aggregator):
    """Changes the base and does not say so."""

    claims: ClassVar[Claim] = Claim.EXACT

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        FedAvg().plan(state, client)
        seed = derive(state.seed, state.round, client.client_id)
        pairs = fresh_pairs(client.layout, seed, state.adapter.pairs[min(state.adapter.pairs)].A.dtype)
        base_updates = base_update_chain(state.base_updates, client.base_version)
        return ClientPlan(
            AdapterState(pairs, state.adapter.dense), base_version=state.base_version, base_updates=base_updates
        )

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        given = list(updates)
        for update in given:
            FedAvg().aggregate(state, [update])
        return Flora().aggregate(state, given)


@dataclass(frozen=True)
class WrongForSeveral(Aggregator):
    """The mean, a little too long as soon as there is more than one client."""

    claims: ClassVar[Claim] = Claim.NONE

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        after = FedAvg().aggregate(state, given := list(updates))
        longer = {f"{name}:B": pair.B * (1.1 if len(given) > 1 else 1.0) for name, pair in after.adapter.pairs.items()}
        return replace(after, adapter=after.adapter.with_tensors(longer))


@dataclass(frozen=True)
class ClaimsGaugeFree(Aggregator):
    """The mean of the factors, sold as one that sees their products alone."""

    claims: ClassVar[Claim] = Claim.GAUGE_FREE

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return FedAvg().aggregate(state, updates)


@dataclass(frozen=True)
class DropsOne(Aggregator):
    """Drops the one update that moved furthest, however many there are: a count where a share is needed."""

    claims: ClassVar[Claim] = Claim.ROBUST

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        given = received(self, state, updates)
        kept = sorted(given, key=lambda one: one.length)[: max(1, len(given) - 1)]
        return FedAvg().aggregate(state, [one.update for one in kept])


@dataclass(frozen=True)
class AveragesWhatKrumChose(Krum):  # type: ignore[misc]
    """Multi-Krum by products, and then a mean of factors that nobody has looked at."""

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        given = received(self, state, updates)
        n = len(given)
        scores = krum_scores(squared_distances(gram_of_changes(given)).tolist(), max(1, n - int(0.3 * n) - 2))
        best = sorted(range(n), key=lambda i: scores[i])[: max(1, int(0.6 * n))]
        return self.inner.aggregate(state, [given[i].update for i in sorted(best)])


@dataclass(frozen=True)
class MomentumOfPairs(Aggregator):
    """Momentum for A and B alone, sold as a rule for any tensors."""

    claims: ClassVar[Claim] = Claim.ANY_TENSORS

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        after = FedAvg().aggregate(state, updates)
        last, now = state.adapter.tensors(), after.adapter.tensors()
        memory = {
            name: now[name] - last[name] + 0.5 * state.memory.get(name, torch.zeros_like(now[name]))
            for name in state.adapter.tensors(("A", "B"))
        }
        moved = {name: last[name] + step for name, step in memory.items()}
        return replace(after, adapter=after.adapter.with_tensors(moved), memory=memory)


@dataclass(frozen=True)
class KeepsEveryA(Aggregator):
    """Right, but claims LINEAR while it holds the A of every update."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        kept = []

        def seen() -> Iterable[ClientUpdate]:
            for update in updates:
                kept.extend(pair.A for pair in update.adapter.pairs.values())
                yield update
                del update

        return FedAvg().aggregate(state, seen())


@dataclass(frozen=True)
class AveragesKept(Keep):  # type: ignore[misc]
    """Asks clients to keep their heads, and averages what it finds in their place."""

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return FedAvg().aggregate(state, updates)


@dataclass(frozen=True)
class MovesTheStart(Keep):  # type: ignore[misc]
    """Lets late clients begin elsewhere than the others did."""

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        after = super().aggregate(state, updates)
        moved = {name: value * 0.9 for name, value in after.adapter.dense.items()}
        return replace(after, adapter=after.adapter.with_tensors(moved))


@dataclass(frozen=True)
class KeepsUnsaid(Aggregator):
    """Lets clients keep B, and does not say so."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        return Keep(("B",)).plan(state, client)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return Keep(("B",)).aggregate(state, updates)


@dataclass(frozen=True)
class TiltsUnsaid(Aggregator):
    """Sends a tilt beside the adapter, and does not say so."""

    claims: ClassVar[Claim] = Claim.LINEAR

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        plan = FedAvg().plan(state, client)
        return replace(plan, tilt={name: 0 * value for name, value in plan.adapter.tensors(plan.sends).items()})

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return FedAvg().aggregate(state, updates)


@dataclass(frozen=True)
class PersonalByName(Aggregator):
    """Claims that clients have models of their own, and sends all of them."""

    claims: ClassVar[Claim] = Claim.LINEAR | Claim.PERSONAL

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        return FedAvg().aggregate(state, updates)


@dataclass(frozen=True)
class ExactAndPersonal(Keep):  # type: ignore[misc]
    """Claims a common D* of clients who have no common model."""

    claims: ClassVar[Claim] = Claim.LINEAR | Claim.PERSONAL | Claim.EXACT

    def __post_init__(self) -> None:
        """Claim all of it."""
