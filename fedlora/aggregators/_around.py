"""Rules around rules: `strategy = {name = "krum", inner = {name = "flora"}}`.

Three kinds. A *screen* drops, shortens or weights updates and hands the others to its inner rule, which may be any. A
*robust mean* puts another centre in the place of the mean of what is sent; its inner rule gets that as the one update
that there was, and must claim LINEAR therefore. A *server optimiser* (`server_optimisers.py`) makes a step of its own
along the inner rule's result. What a rule around another claims follows from what the inner one claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import PlainValidator
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    load_aggregator,
    names_claiming,
    require_current_base,
    require_same_ranks,
    require_weight,
)
from fedlora.errors import ConfigError, RuleError
from fedlora.lowrank import Terms, gram


def load_inner(value: Any) -> Aggregator:
    """An inner rule from a config's table {name = ..., fields}, from a name alone, or a rule as it is.

    Raises:
        ConfigError: none of these, or see `load_aggregator`.
    """
    if isinstance(value, Aggregator):
        return value
    table = {"name": value} if isinstance(value, str) else value
    if not (isinstance(table, Mapping) and isinstance(table.get("name"), str)):
        raise ConfigError(f'inner must be a rule, such as inner = {{name = "flora"}}, not {value!r}', code="bad-inner")
    return load_aggregator(table["name"], {key: field for key, field in table.items() if key != "name"})


Inner: TypeAlias = Annotated[Aggregator, PlainValidator(load_inner, json_schema_input_type=dict[str, Any] | str)]
"""Type of a field that holds another rule."""


class Around(Aggregator):
    """A rule around `inner`, which plans; its memory is kept under "inner/" beside the outer rule's own."""

    inner: Aggregator

    def inherit(self, kept: Claim, added: Claim = Claim.NONE) -> None:
        """Claim those of the inner rule's claims that are in `kept`, and `added`; for `__post_init__`.

        Raises:
            ConfigError: the clients of the inner rule keep parts, of which a rule around it would not know.
        """
        if Claim.PERSONAL in self.inner.claims:
            raise ConfigError(
                f"{type(self).__name__} is around {type(self.inner).__name__}, whose clients keep parts of what they "
                "train: put that rule around this one",
                code="personal-inside",
            )
        self._claim((self.inner.claims & kept) | added)
        object.__setattr__(self, "keeps_basis", self.inner.keeps_basis)
        object.__setattr__(self, "keeps_units", self.inner.keeps_units)
        object.__setattr__(self, "tilts", type(self).tilts or self.inner.tilts)

    def require_means(self) -> None:
        """Raise `ConfigError` for an inner rule that leaves updates out, of which a rule around it would not know."""
        if Claim.ROBUST in self.inner.claims:
            raise ConfigError(
                f"{type(self).__name__} is around {type(self.inner).__name__}, and would learn from the updates that "
                "this one leaves out: put that rule around this one",
                code="robust-inside",
            )

    def require_steps(self) -> None:
        """Raise `ConfigError` for an inner rule whose result is no step from the adapter."""
        if Claim.CHANGES_BASE in self.inner.claims or not self.inner.keeps_basis:
            why = "changes the base" if Claim.CHANGES_BASE in self.inner.claims else "draws a new basis in each round"
            raise ConfigError(
                f"{type(self).__name__} follows the difference of two adapters, and {type(self.inner).__name__} {why}: "
                "choose an inner rule that averages the adapter, such as fedavg or ffa",
                code="no-step",
            )

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """The inner rule's."""
        return self.outer_state(self.inner.init(adapter, seed=seed))

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The inner rule's."""
        return self.inner.plan(self.inner_state(state), client)

    @staticmethod
    def inner_state(state: GlobalState) -> GlobalState:
        """The state as the inner rule knows it."""
        memory = {
            name.removeprefix("inner/"): value for name, value in state.memory.items() if name.startswith("inner/")
        }
        return replace(state, memory=memory, metrics={})

    @staticmethod
    def outer_state(inner: GlobalState, memory: Mapping[str, Tensor] | None = None) -> GlobalState:
        """The inner rule's state with the outer rule's memory."""
        theirs = {f"inner/{name}": value for name, value in inner.memory.items()}
        return replace(inner, memory={**(memory or {}), **theirs})

    @staticmethod
    def own_memory(state: GlobalState) -> dict[str, Tensor]:
        """The outer rule's memory."""
        return {name: value for name, value in state.memory.items() if not name.startswith("inner/")}


@dataclass(frozen=True)
class Received:
    """An update beside the plan that it answers.

    Args:
        update: as it came.
        plan: makes that plan. It is made anew where the start is looked at: for some rules each client starts from an
            adapter of its own, and all of them together would be as large as the updates.
        values: what the client sent.
        changes: of the start what is not zero, or all clients': pairs whose product is not, and the dense parts.
    """

    update: ClientUpdate
    plan: Callable[[], ClientPlan]
    values: Mapping[str, Tensor]
    changes: AdapterState

    @property
    def start(self) -> AdapterState:
        """The adapter from which the client started."""
        return self.plan().adapter

    @property
    def sent(self) -> dict[str, Tensor]:
        """What the client sent, before the round."""
        plan = self.plan()
        return plan.adapter.tensors(plan.sends)

    def steps(self) -> Iterator[tuple[str, Tensor]]:
        """By how much each sent tensor moved, float64, one in memory at a time."""
        for name, before in self.sent.items():
            yield name, self.values[name].double() - before.double()

    @cached_property
    def length(self) -> float:
        """By how much all sent tensors moved together, as one vector; may be infinite or NaN for a broken update."""
        return math.sqrt(sum(float(step.square().sum()) for _, step in self.steps()))

    @cached_property
    def pairs_length(self) -> float:
        """The same of the factors A and B alone."""
        dense = self.update.adapter.dense
        return math.sqrt(sum(float(step.square().sum()) for name, step in self.steps() if name not in dense))

    def shortened(self, factor: float) -> ClientUpdate:
        """The update with its step times `factor`, in its own dtypes; at 1 the update itself."""
        if factor == 1.0:
            return self.update
        tensors = {
            name: (before.double() + (self.values[name].double() - before.double()) * factor).to(
                self.values[name].dtype
            )
            for name, before in self.sent.items()
        }
        return replace(self.update, adapter=self.update.adapter.with_tensors(tensors))


def received(rule: Aggregator, state: GlobalState, updates: Iterable[ClientUpdate]) -> list[Received]:
    """All updates beside their plans, by client id, so that the order of the replies is not seen.

    Raises:
        RuleError: no update, one that does not fit its plan, or one trained on another version of the base.
    """
    out: list[Received] = []
    for update in updates:
        require_weight(update.num_examples, update.client_id)
        if Claim.CHANGES_BASE in rule.claims:
            require_current_base(state, update)
        make = partial(rule.plan, state, ClientSpec(update.client_id, update.adapter.layout, update.base_version))
        plan, tensors = make(), update.adapter.tensors()
        require_fit(update, plan)
        pairs = {name: pair for name, pair in plan.adapter.pairs.items() if pair.A.any() and pair.B.any()}
        values = {name: tensors[name] for name in plan.adapter.tensors(plan.sends)}
        out.append(Received(update, make, values, AdapterState(pairs, plan.adapter.dense)))
    if not out:
        raise RuleError("there is nothing to aggregate: give at least one client's update", code="no-updates")
    return sorted(out, key=lambda one: one.update.client_id)


def require_fit(update: ClientUpdate, plan: ClientPlan) -> None:
    """Raise `RuleError` unless an update has the tensors of its plan, of their shapes."""
    mine, theirs = plan.adapter.tensors(), update.adapter.tensors()
    if mine.keys() != theirs.keys():
        odd = min(mine.keys() ^ theirs.keys())
        side = "was not sent" if odd in mine else "is not in the adapter"
        raise RuleError(
            f"client {update.client_id}'s update does not fit the global adapter: {odd!r} {side}", code="tensors-differ"
        )
    for name, value in mine.items():
        if not value.is_floating_point():
            raise RuleError(
                f"{name!r} holds {value.dtype} values, which cannot be averaged: leave it out of the adapter",
                code="not-averageable",
            )
        if value.shape != theirs[name].shape:
            raise RuleError(
                f"client {update.client_id}'s {name!r} has shape {tuple(theirs[name].shape)} where it was sent "
                f"{tuple(value.shape)}: all clients must train the same model",
                code="shape-mismatch",
            )


def finite(updates: list[Received]) -> list[Received]:
    """Those without NaN and infinity.

    Raises:
        RuleError: none is.
    """
    kept = [one for one in updates if math.isfinite(one.length)]
    if not kept:
        raise RuleError("no client sent finite values: lower train.lr, or clip gradients", code="not-finite")
    return kept


BLOCK = 2048
"""Numbers of which the clients' values are sorted at once."""
GAUGE_LIMIT = 10.0
"""How many times as far as the median client's the factors of an update may have moved; see `usable`."""


def usable(inner: Aggregator, updates: list[Received]) -> list[Received]:
    """The updates that a rule which looks at products may hand to its inner rule.

    (c A, B / c) is the same change of weights as (A, B) for any c. A GAUGE_FREE inner rule does not care; one that
    averages factors would be led anywhere by a client whose product is like the others' and whose factors are not.
    For such a rule an update whose factors moved `GAUGE_LIMIT` times as far as the median client's is left out.

    Raises:
        RuleError: no update is finite.
    """
    kept = finite(updates)
    if Claim.GAUGE_FREE in inner.claims:
        return kept
    median = sorted(one.pairs_length for one in kept)[(len(kept) - 1) // 2]
    return [one for one in kept if median == 0.0 or one.pairs_length <= GAUGE_LIMIT * median]


def gram_of_changes(updates: list[Received]) -> Tensor:
    """Inner products of the clients' changes, float64 [K, K]: of s B A less the start's, and of the dense parts' steps.

    The products are those of the changes of weights, whatever basis a client's factors are in. The matrix is symmetric
    to the last bit, so that of two clients who lie closest to each other none is nearer by rounding.
    """
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    first = updates[0]
    for name in first.update.adapter.pairs:
        total += gram([_change(one, name) for one in updates])
    for name in first.update.adapter.dense:
        if name in first.values:
            steps = [(one.values[name].double() - one.changes.dense[name].double()).flatten() for one in updates]
            total += (rows := torch.stack(steps)) @ rows.T
    return total.triu() + total.triu(1).T


def _change(one: Received, name: str) -> Terms:
    start = [(-1.0, one.changes.pairs[name])] if name in one.changes.pairs else []
    return [(1.0, one.update.adapter.pairs[name]), *start]


def squared_distances(inner: Tensor) -> Tensor:
    """|D_a - D_b|^2 from the inner products [K, K]; what is at the level of their rounding counts as zero."""
    norms = inner.diagonal()
    sums = norms[:, None] + norms[None]
    apart = sums - 2 * inner
    return torch.where(apart > 16 * torch.finfo(torch.float64).eps * sums, apart, 0.0).fill_diagonal_(0.0)


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The weighted median over the first axis; where two values share the middle, their mean.

    Args:
        values: float64 [K, ...].
        weights: float64 [K], positive.
    """
    half, slack, medians = weights.sum() / 2, 1e-12 * weights.sum(), []
    for ordered, theirs in in_order(values, weights):
        reached = theirs.cumsum(dim=1)
        low = (reached >= half - slack).to(torch.int8).argmax(dim=1, keepdim=True)
        high = (reached > half + slack).to(torch.int8).argmax(dim=1, keepdim=True)
        medians.append((ordered.gather(1, low) + ordered.gather(1, high)).squeeze(1) / 2)
    return torch.cat(medians).reshape(values.shape[1:])


def in_order(values: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The clients' values of each number in ascending order, and their weights in that order, some numbers at a time.

    Blocks stay in the processor's cache, and NumPy sorts their short rows several times as fast as torch.

    Args:
        values: float64 [K, ...], without NaN.
        weights: float64 [K].

    Yields:
        Both as [n, K], of at most `BLOCK` numbers.
    """
    numbers = values.reshape(len(values), -1).T
    for k in range(0, max(1, len(numbers)), BLOCK):
        rows = numbers[k : k + BLOCK].contiguous()
        order = torch.from_numpy(rows.numpy().argsort(axis=1))
        yield rows.gather(1, order), weights[order]


def require_share(rule: str, name: str, share: float) -> None:
    """Raise `ConfigError` unless a share of liars is at least 0 and below 1/2."""
    if not 0 <= share < 0.5:
        raise ConfigError(
            f"{rule}: {name} is the share of clients that may lie, at least 0 and below 0.5, not {share!r}",
            code="out-of-range",
        )


class AroundMean(Around):
    """A rule that puts another centre in the place of the mean, around one that needs the mean alone."""

    def require_linear(self) -> None:
        """Raise `ConfigError` unless the inner rule claims LINEAR; set the claims."""
        if Claim.LINEAR not in self.inner.claims:
            raise ConfigError(
                f"{type(self).__name__} hands its inner rule one update in the place of all, and "
                f"{type(self.inner).__name__} needs each: choose an inner rule that claims LINEAR "
                f"({', '.join(names_claiming(Claim.LINEAR))}), or a screen such as krum",
                code="rule-not-linear",
            )
        self.inherit(Claim.ANY_TENSORS, Claim.ROBUST)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The inner rule's, for clients of the global rank.

        Raises:
            RuleError: a client of another rank.
        """
        require_same_ranks(self, state, client)
        return super().plan(state, client)


def as_one(replies: list[Received], tensors: Mapping[str, Tensor]) -> ClientUpdate:
    """One update that stands for all: the start with some of its tensors replaced, and the sum of the weights."""
    total = sum(one.update.num_examples for one in replies)
    first = replies[0]
    return ClientUpdate(-1, first.start.with_tensors(tensors), total, first.update.base_version)
