"""What a rule is: three pure functions over frozen state, and the claims that it makes.

A rule imports torch and `fedlora.adapter`, nothing else. It never changes its inputs, draws no random number that its
state does not name, and reads the updates once, in the order given, so that the server can fold replies as they come.

Notation in all rules: client k holds A_k [r_k, d_in], B_k [d_out, r_k], s_k, and the weight
p_k = n_k / sum of n over the updates given; D* = sum_k p_k s_k B_k A_k.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fedlora.adapter import (
    ALL_PARTS,
    AdapterState,
    Layout,
    Part,
)
from fedlora.errors import RuleError
from fedlora.registry import Registry


class Claim(enum.Flag):
    """What a rule promises. The contract tests check each claim, and the rest of the program asks them."""

    NONE = 0
    EXACT = enum.auto()
    """The broadcast makes exactly the change D* (aggregation error at rounding level)."""
    LINEAR = enum.auto()
    """Only weighted sums of what clients send are needed: some updates of one layout may as well come as one, their
    weighted mean with the sum of their weights. Secure aggregation, central privacy, and one sum for each process of a
    simulation stand on it."""
    MIXED_RANKS = enum.auto()
    """Clients may have different ranks."""
    CHANGES_BASE = enum.auto()
    """The base model's weights change; clients follow a version log."""
    ROBUST = enum.auto()
    """A minority of arbitrary updates moves the result by a bounded amount."""
    ANY_TENSORS = enum.auto()
    """Every tensor is treated alike, so that other methods than LoRA can be averaged, whose tensors are no pairs."""
    GAUGE_FREE = enum.auto()
    """Only the products B A of what clients send matter: (G A, B G^-1) is the same update as (A, B)."""
    PERSONAL = enum.auto()
    """Clients keep parts of what they train, so that each has a model of its own; the state's is that of a client that
    has not trained yet."""


@dataclass(frozen=True)
class BaseUpdate:
    """A change of the base weights, W <- W + s B A for `change.pairs`, W <- W + dW for `change.dense`.

    It takes a base from version `since` to `version`; one that starts at 0 starts from the pristine base, whatever was
    there. `fedlora.aggregators.accumulate` follows it. `change.dense` holds full-rank changes [d_out, d_in] by *module*
    name.

    Raises:
        RuleError: unless 0 <= since < version.
    """

    since: int
    version: int
    change: AdapterState

    def __post_init__(self) -> None:
        if not 0 <= self.since < self.version:
            raise RuleError(
                f"a base update must lead from a version to a later one, not from {self.since} to {self.version}",
                code="base-update-backwards",
            )


@dataclass(frozen=True)
class GlobalState:
    """Everything that a resume needs; tensors and numbers only.

    Args:
        adapter: the global adapter, at the rank of the config.
        seed: from which the rule derives any draw.
        round: number of rounds done.
        base_updates: those so far, as a chain from version 0 to `base_version`.
        memory: a rule's own tensors (momentum, ...).
        metrics: what the last `aggregate` measured about itself, for the metrics file.
    """

    adapter: AdapterState
    seed: int = 0
    round: int = 0
    base_updates: tuple[BaseUpdate, ...] = ()
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def base_version(self) -> int:
        """Version of the base that the next round trains on."""
        return self.base_updates[-1].version if self.base_updates else 0


@dataclass(frozen=True)
class ClientSpec:
    """What a rule may know of a client when it plans for it.

    Args:
        client_id: stable over rounds.
        layout: module name -> shape and scale of the pairs that this client trains (its own rank).
        base_version: the version of the base that the client already holds.
    """

    client_id: int
    layout: Layout
    base_version: int = 0


Fact: TypeAlias = Literal["rates", "clients", "start_loss"]
"""What a rule may ask to know of a client's training; see `ClientUpdate.facts`."""


@dataclass(frozen=True)
class ClientPlan:
    """What the server asks of a client in one round, as data.

    Args:
        adapter: where training starts, in the client's own layout.
        trains: parts that receive gradients; the others are frozen for the round.
        sends: parts, or names of single tensors, that come back, a subset of `trains`; the server fills the rest in
            from `adapter`. What is trained and not sent stays with the client: there it starts the next time, and from
            `adapter` in its first round only.
        base_version: the version of the base on which the client must train.
        base_updates: the changes that take the client's base there.
        fresh_seed: if given, `adapter.pairs` are `fresh_pairs(layout, fresh_seed)`, and need not travel.
        proximal_mu: FedProx's mu (Li et al. 2020, arXiv 1812.06127, equation (2)); 0 for none.
        tilt: tensors t, by names of what is sent, that are added to each step's gradient: the client minimises its loss
            plus <t, w>.
        asks: what the rule has to know of the client's training; see `ClientUpdate.facts`.
        first: parts that the client trains first and alone, and then no more; not all of `trains`.
        first_times: how many times as long as the others.
    """

    adapter: AdapterState
    trains: frozenset[Part] = ALL_PARTS
    sends: frozenset[str] = ALL_PARTS
    base_version: int = 0
    base_updates: tuple[BaseUpdate, ...] = ()
    fresh_seed: int | None = None
    proximal_mu: float = 0.0
    tilt: Mapping[str, Tensor] = field(default_factory=dict)
    asks: frozenset[Fact] = frozenset()
    first: frozenset[Part] = frozenset()
    first_times: int = 1

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        """What stays with the client, as it is before the client's first round."""
        sent = self.adapter.tensors(self.sends)
        return {name: value for name, value in self.adapter.tensors(self.trains).items() if name not in sent}


@dataclass(frozen=True)
class ClientUpdate:
    """One client's trained adapter, already validated.

    Args:
        client_id: whose.
        adapter: the complete adapter after training (parts that were not sent are those of the plan).
        num_examples: the weight n_k > 0 (1 for every client under uniform weighting).
        base_version: of the base that it was trained on.
        metrics: what the client measured, for the metrics file; rules must not depend on it.
        facts: what the plan asked for, as the server checked it or knows it by itself, positive: "rates", the sum of
            the learning rates of the client's steps; "clients", the number of clients of the federation; "start_loss",
            the mean loss of the plan's model on the client's training examples, which the client reports and the
            server bounds (`fedlora.federation.plausibility.largest_loss`).
    """

    client_id: int
    adapter: AdapterState
    num_examples: float
    base_version: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[Fact, float] = field(default_factory=dict)


class Aggregator(ABC):
    """One aggregation rule. Subclasses are frozen dataclasses; their fields are their config."""

    claims: ClassVar[Claim] = Claim.NONE
    """What the rule promises with its default fields; `_claim` sets what an instance promises with its own."""
    paper: ClassVar[str] = ""
    """Authors, venue and year, arXiv number."""
    group: ClassVar[str] = ""
    """Heading under which `fedlora strategies` lists the rule; if empty, one that follows from its claims."""
    keeps_basis: ClassVar[bool] = True
    """Whether unit i of the new adapter goes on from unit i of the old one, so that their difference is a step. Rules
    that draw a new basis, such as singular vectors, say no."""
    keeps_units: ClassVar[bool] = True
    """Whether unit i of a client's plan is the same unit of the global adapter in each round."""
    tilts: ClassVar[bool] = False
    """Whether plans have a `tilt`, which is sent beside the adapter and is as large."""

    def _claim(self, claims: Claim) -> None:
        """Set what this instance claims, where that depends on its fields: for `__post_init__`."""
        object.__setattr__(self, "claims", claims)

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """The state before the first round.

        Args:
            adapter: the initial global adapter, at the rank of the config.
            seed: from which the rule derives its own draws.

        Raises:
            RuleError: the rule claims CHANGES_BASE, which a DoRA adapter does not survive.
        """
        if Claim.CHANGES_BASE in self.claims:
            require_no_magnitudes(self, adapter)
        return GlobalState(adapter=adapter, seed=seed)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """What to ask of one client in the next round: by default, to train and send all of the global adapter."""
        require_same_ranks(self, state, client)
        return ClientPlan(state.adapter)

    @abstractmethod
    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The next state.

        Args:
            state: never changed.
            updates: read once, in order; each can be dropped after it was read.

        Raises:
            RuleError: if there is no update, or one does not fit.
        """


rules: Registry[Aggregator] = Registry("aggregation rule", Aggregator, "fedlora.aggregators")


def load_aggregator(name: str, fields: Mapping[str, Any] | None = None) -> Aggregator:
    """The rule of a config.

    Args:
        name: a built-in name ("fedavg"), an entry point's name, or "module:Class".
        fields: the rule's own fields.

    Raises:
        ConfigError: an unknown name (with the nearest valid one), a class that is no rule, a wrong field.
    """
    return rules.build(name, fields or {})


def names_claiming(claim: Claim) -> list[str]:
    """The names of the rules that make a claim, sorted: for messages that say what to choose instead."""
    return [name for name, cls in rules.items() if claim in cls.claims]


def require_same_ranks(rule: Aggregator, state: GlobalState, client: ClientSpec) -> None:
    """Raise `RuleError` unless the client's layout is the global one: for rules that do not claim MIXED_RANKS."""
    require_modules(state, client.layout, client.client_id)
    for name, shape in state.adapter.layout.items():
        if client.layout[name] != shape:
            theirs = client.layout[name]
            raise RuleError(
                f"{type(rule).__name__} needs the same rank and scale for every client, and client "
                f"{client.client_id} has rank {theirs.rank} and scale {theirs.scale:g} for {name!r} where the global "
                f"adapter has {shape.rank} and {shape.scale:g}: make them equal, or choose a rule that accepts mixed "
                f"ranks ({', '.join(names_claiming(Claim.MIXED_RANKS))})",
                code="mixed-ranks",
            )


def require_modules(state: GlobalState, layout: Layout, client_id: int) -> None:
    """Raise `RuleError` unless a layout has the global adapter's modules, each of its d_out and d_in."""
    mine = state.adapter.layout
    if layout.keys() != mine.keys():
        odd = min(layout.keys() ^ mine.keys())
        who = f"client {client_id}" if odd in mine else "the global adapter"
        raise RuleError(
            f"{who} has no adapter on {odd!r}: give all clients the same target modules", code="modules-differ"
        )
    for name, shape in layout.items():
        if (shape.d_out, shape.d_in) != (mine[name].d_out, mine[name].d_in):
            raise RuleError(
                f"the layer {name!r} is [{shape.d_out}, {shape.d_in}] for client {client_id} and "
                f"[{mine[name].d_out}, {mine[name].d_in}] in the global adapter: all clients must adapt the same "
                "base model",
                code="shape-mismatch",
            )


def require_current_base(state: GlobalState, update: ClientUpdate) -> None:
    """Raise `RuleError` for an update that was trained on another version of the base than the state's."""
    if update.base_version != state.base_version:
        raise RuleError(
            f"client {update.client_id} trained on version {update.base_version} of the base, which is now "
            f"at {state.base_version}: drop its update; its next plan brings the base updates that it lacks",
            code="stale-base",
        )


def require_no_magnitudes(rule: Aggregator, adapter: AdapterState) -> None:
    """Raise `RuleError` for a DoRA adapter: for rules that claim CHANGES_BASE.

    DoRA (Liu et al. 2024, arXiv 2402.09353, equation (5)) divides by the norm of base plus update. A base update
    would change that norm under a magnitude vector that was trained for the old one. Rules that leave the base
    alone average the vectors as the dense parts that they are.
    """
    for name in adapter.dense:
        if "lora_magnitude_vector" in name:
            raise RuleError(
                f"{type(rule).__name__} changes the base weights, for whose old norm DoRA's {name!r} was trained: "
                "use plain LoRA, or choose a rule that leaves the base unchanged",
                code="dora-unsupported",
            )


def require_weight(weight: float, client_id: int | None = None) -> float:
    """The weight n_k; `RuleError` unless it is positive and finite."""
    if not (math.isfinite(weight) and weight > 0):
        who = "an update" if client_id is None else f"client {client_id}'s update"
        raise RuleError(f"the weight of {who} must be positive and finite, not {weight!r}", code="bad-weight")
    return weight


def require_fact(update: ClientUpdate, name: Fact) -> float:
    """What an update says of the client's training; `RuleError` if it does not say so, or not a positive number."""
    value = update.facts.get(name, math.nan)
    if not (math.isfinite(value) and value > 0):
        raise RuleError(
            f"client {update.client_id}'s update does not say {name!r}, for which its plan asks: give it in "
            "ClientUpdate.facts, positive and finite",
            code="fact-missing",
        )
    return value


class WeightedMean:
    """A running weighted mean of named tensors: sum_k n_k x_k / sum_k n_k, one update in memory at a time.

    Sums are kept in float64 whatever the senders' dtype, so that many small terms are not lost, and the order of the
    terms is not seen once the result is rounded.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Fold one update in.

        Raises:
            RuleError: if the weight is not positive and finite, names or shapes differ from the first update's, or a
                tensor is not of floats.
        """
        require_weight(weight)
        if self.count and tensors.keys() != self._sums.keys():
            odd = min(tensors.keys() ^ self._sums.keys())
            raise RuleError(
                f"the updates do not hold the same tensors, {odd!r} is missing from some: let all clients send the "
                "same ones",
                code="tensors-differ",
            )
        for name, value in tensors.items():
            if not value.is_floating_point():
                raise RuleError(
                    f"{name!r} holds {value.dtype} values, which cannot be averaged: leave it out of the adapter",
                    code="not-averageable",
                )
            if name not in self._sums:
                self._dtypes[name] = value.dtype
                self._sums[name] = torch.zeros_like(value, dtype=torch.float64)
            if value.shape != self._sums[name].shape:
                raise RuleError(
                    f"{name!r} has shape {tuple(value.shape)} in one update and {tuple(self._sums[name].shape)} in "
                    "another: all clients must train the same model",
                    code="shape-mismatch",
                )
            self._sums[name].add_(value, alpha=weight)
        self.total += weight
        self.count += 1

    def exact(self) -> dict[str, Tensor]:
        """The mean in float64, for one who goes on adding.

        Raises:
            RuleError: if nothing was added.
        """
        if not self.count:
            raise RuleError("there is nothing to aggregate: give at least one client's update", code="no-updates")
        return {name: total / self.total for name, total in self._sums.items()}

    def result(self, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The mean, rounded once.

        Args:
            like: tensors of the names, shapes and dtypes that the result must have; without it, the dtypes are those of
                the first update.

        Raises:
            RuleError: if nothing was added, or the updates do not fit `like`.
        """
        exact = self.exact()
        if like is not None:
            if like.keys() != self._sums.keys():
                odd = min(like.keys() ^ self._sums.keys())
                side = "was not sent" if odd in like else "is not in the adapter"
                raise RuleError(f"the updates do not fit the global adapter: {odd!r} {side}", code="tensors-differ")
            for name, value in like.items():
                if value.shape != self._sums[name].shape:
                    raise RuleError(
                        f"the updates do not fit the global adapter: {name!r} has shape "
                        f"{tuple(self._sums[name].shape)} in the updates and {tuple(value.shape)} in the adapter",
                        code="shape-mismatch",
                    )
        dtypes = self._dtypes if like is None else {name: value.dtype for name, value in like.items()}
        return {name: mean.to(dtypes[name]) for name, mean in exact.items()}
