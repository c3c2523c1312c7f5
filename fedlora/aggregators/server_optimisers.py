"""Server optimisers: the mean step of the clients is a gradient for an optimiser of the server's own.

FedAdagrad, FedAdam, FedYogi: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2.
FedAvgM: Hsu, Qi, Brown, 2019, arXiv 1909.06335, equation (2). For each tensor x that is sent, with the result y of the
inner rule and Delta = y - x,

    m <- beta1 m + (1 - beta1) Delta
    v <- v + Delta^2                                       (Adagrad)
         v - (1 - beta2) Delta^2 sign(v - Delta^2)         (Yogi)
         beta2 v + (1 - beta2) Delta^2                     (Adam)
    x <- x + lr m / (sqrt v + tau),      v = tau^2 at the start, and no bias correction;

    v <- momentum v + Delta,  x <- x + lr v                (FedAvgM).

Delta is the difference of float64 numbers, before anything is rounded to the adapter's dtype. m and v are kept in
`GlobalState.memory`. What the inner rule does not send in a round (FFA-LoRA's A, RoLoRA's idle factor) does not move.

The inner rule must leave the base alone, and unit i of its result must go on from unit i of the adapter: singular
vectors are drawn anew in each round, and their difference to the last ones is no step. Where B starts at zero, the
first step of an entry is about lr long whatever Delta is: for LoRA lr lies between 1e-3 and 1e-2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.aggregators._around import Around, Inner
from fedlora.aggregators._base import Claim, ClientSpec, ClientUpdate, GlobalState, rules
from fedlora.aggregators._bounds import require_bounds, require_positive
from fedlora.aggregators.fedavg import FedAvg

REDDI = "Reddi et al., ICLR 2021, arXiv 2003.00295"
Moments = dict[str, Tensor]


class ServerOptimiser(Around):
    """A step of the server along the inner rule's result."""

    claims: ClassVar[Claim] = Claim.LINEAR | Claim.ANY_TENSORS
    group: ClassVar[str] = "server optimiser"

    def require_steps(self) -> None:
        """See `Around`; and set the claims."""
        super().require_steps()
        self.inherit(Claim.LINEAR | Claim.MIXED_RANKS | Claim.ANY_TENSORS | Claim.ROBUST)

    @abstractmethod
    def step(self, name: str, delta: Tensor, memory: Moments) -> Tensor:
        """By how much a tensor moves, float64.

        Args:
            name: of the tensor; its moments are "m/<name>" and "v/<name>" in `memory`.
            delta: of the inner rule.
            memory: of the last round; the new moments are written into it.
        """

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's result as a step, one update in memory at a time if the inner rule is LINEAR.

        Raises:
            RuleError: see the inner rule.
        """
        memory = self.own_memory(state)
        after = moved_inner(self, state, updates, lambda name, x, y: x + self.step(name, y - x, memory))
        return self.outer_state(after, memory)


def moved_inner(
    rule: Around, state: GlobalState, updates: Iterable[ClientUpdate], move: Callable[[str, Tensor, Tensor], Tensor]
) -> GlobalState:
    """The state of the inner rule's round, with other values for what clients send; float64 until the end.

    Args:
        rule: around the inner rule.
        state: before the round.
        updates: read once, before `move` is called.
        move: the value for a tensor of this name, from x before the round and the inner rule's result y.
    """
    sent = rule.plan(state, ClientSpec(0, state.adapter.layout, state.base_version)).sends
    wide = replace(rule.inner_state(state), adapter=_wide(state.adapter))
    after = rule.inner.aggregate(wide, _widened(updates))
    before, result = wide.adapter.tensors(sent), after.adapter.tensors()
    moved = {name: move(name, x, result[name]) for name, x in before.items()}
    like = state.adapter.tensors()
    rounded = {name: moved.get(name, value).to(like[name].dtype) for name, value in result.items()}
    return replace(after, adapter=state.adapter.with_tensors(rounded))


def _wide(adapter: AdapterState) -> AdapterState:
    tensors = adapter.tensors().items()
    return adapter.with_tensors({name: value.double() for name, value in tensors if value.is_floating_point()})


def _widened(updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
    for update in updates:
        yield replace(update, adapter=_wide(update.adapter))
        del update


@final
@rules.register("fedavgm")
@dataclass(frozen=True)
class FedAvgM(ServerOptimiser):
    """v <- momentum v + Delta, x <- x + lr v.

    Args:
        lr: of the server.
        momentum: beta.
        inner: a rule that leaves the base and the adapter's basis alone; at momentum 0 and lr 1 this is the rule.

    Raises:
        ConfigError: a number out of range, or an inner rule whose result is no step.
    """

    lr: float = 1.0
    momentum: float = 0.9
    inner: Inner = field(default_factory=FedAvg)

    paper: ClassVar[str] = "Hsu, Qi, Brown 2019, arXiv 1909.06335"

    def __post_init__(self) -> None:
        require_positive("fedavgm", lr=self.lr)
        _require_decay("fedavgm", "momentum", self.momentum)
        self.require_steps()

    def step(self, name: str, delta: Tensor, memory: Moments) -> Tensor:
        """Equation (2)."""
        v = self.momentum * memory.get(f"v/{name}", torch.zeros_like(delta)) + delta
        memory[f"v/{name}"] = v
        return self.lr * v


@dataclass(frozen=True)
class Adaptive(ServerOptimiser):
    """Algorithm 2 of Reddi et al.

    Args:
        lr: eta, of the server.
        beta1: of the first moment.
        tau: added to the root of the second moment.
        inner: a rule that leaves the base and the adapter's basis alone.
    """

    lr: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3
    inner: Inner = field(default_factory=FedAvg)

    paper: ClassVar[str] = REDDI

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        require_positive(name, lr=self.lr, tau=self.tau)
        _require_decay(name, "beta1", self.beta1)
        self.require_steps()

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The new second moment from the old one and Delta^2."""

    def step(self, name: str, delta: Tensor, memory: Moments) -> Tensor:
        """One round of algorithm 2."""
        m = self.beta1 * memory.get(f"m/{name}", torch.zeros_like(delta)) + (1 - self.beta1) * delta
        v = self.second(memory.get(f"v/{name}", torch.full_like(delta, self.tau**2)), delta.square())
        memory[f"m/{name}"], memory[f"v/{name}"] = m, v
        return self.lr * m / (v.sqrt() + self.tau)


@final
@rules.register("fedadagrad")
@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """v <- v + Delta^2, x <- x + lr m / (sqrt v + tau); the paper's experiments have beta1 = 0."""

    beta1: float = 0.0

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The sum of all squares."""
        return v + square


@final
@rules.register("fedadam")
@dataclass(frozen=True)
class FedAdam(Adaptive):
    """v <- beta2 v + (1 - beta2) Delta^2, x <- x + lr m / (sqrt v + tau).

    Args:
        beta2: of the second moment.
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        _require_decay("fedadam", "beta2", self.beta2)
        super().__post_init__()

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The running mean of the squares."""
        return self.beta2 * v + (1 - self.beta2) * square


@final
@rules.register("fedyogi")
@dataclass(frozen=True)
class FedYogi(Adaptive):
    """v <- v - (1 - beta2) Delta^2 sign(v - Delta^2), x <- x + lr m / (sqrt v + tau).

    Args:
        beta2: of the second moment.
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        _require_decay("fedyogi", "beta2", self.beta2)
        super().__post_init__()

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Towards the square, by a step that does not grow with the distance."""
        return v - (1 - self.beta2) * square * torch.sign(v - square)


def _require_decay(rule: str, name: str, value: float) -> None:
    require_bounds(rule, name, value, 0 <= value < 1, "at least 0 and below 1")
