"""Corrections of the drift of clients: each client's gradient is tilted towards what all clients want.

Clients with different data run apart in the many steps of a round. Both rules keep a variate for each client, which
says how its gradient differs from the others', and let it train on its loss plus <t_k, w> (`ClientPlan.tilt`):

    SCAFFOLD    y_k <- y_k - eta (g_k(y_k) + c - c_k), K steps from x,       t_k = c - c_k,
                c_k <- c_k - c + (x - y_k) / (K eta),   c <- mean of all c_k,   x <- sum_k p_k y_k;
    FedDyn      y_k = argmin L_k(y) + alpha <h_k, y> + alpha/2 |y - x|^2,    t_k = alpha h_k,
                h_k <- h_k + (y_k - x),   x <- sum_k p_k y_k + mean of all h_k.

Karimireddy et al., "SCAFFOLD", ICML 2020, arXiv 1910.06378, algorithm 1 with option II and eta_g = 1; Acar et al.,
"Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv 2111.04263, algorithm 1, with h_k in the units of
the adapter (the paper's gradient of client k is -alpha h_k).

In both papers the clients hold their variates. Here the server does, since a variate is a function of what the server
sent and received: clients stay without a state, an upload is one adapter as ever, a lost reply changes nothing, and the
variates are in the checkpoint. The server keeps one adapter for each client that ever answered, and sends each client
one more than without. Where a reply is rounded on its way ([wire] up), or shortened by a rule around this one, the
variate is that of the update that the server uses. (With "topk" a change is spread over several rounds, which FedDyn
adds up and SCAFFOLD, whose c_k is the gradient of one round, refuses.) With DP-SGD it is a function of private
releases, and the tilt is added after the noise.

"Mean of all" is over all N clients of the federation, weighted by n_k as the mean of what is sent is, so that both aim
at the minimum of sum_k n_k L_k. Clients that have not answered yet count as 0, with the mean weight of those that have:
for equal weights this is the papers' 1/N.

SCAFFOLD divides by K eta, the sum of a client's learning rates, which the server knows from the config. c_k is then the
mean of K gradients, but under plain SGD alone: not with momentum, AdamW, clipped gradients or a proximal term. FedDyn
changes the objective and not the step, so that it goes with any optimiser.

On factors A and B each is a vector of parameters of its own; around `ffa` or `rolora` the mean is exact.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.aggregators._around import Around, Inner, require_fit
from fedlora.aggregators._base import (
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    Fact,
    GlobalState,
    require_fact,
    require_same_ranks,
    require_weight,
    rules,
)
from fedlora.aggregators.fedavg import FedAvg
from fedlora.errors import ConfigError, RuleError

CLIENT, MEAN, WEIGHT = "client/", "mean/", "weight/"


class Drift(Around):
    """A variate for each client, held by the server: "client/<id>/<tensor>" in the memory, and their mean."""

    claims: ClassVar[Claim] = Claim.ANY_TENSORS
    group: ClassVar[str] = "drift"
    tilts: ClassVar[bool] = True
    asks: ClassVar[frozenset[Fact]] = frozenset({"clients"})

    @abstractmethod
    def tilt(self, own: Tensor, mean: Tensor) -> Tensor:
        """What is added to a client's gradient, float64, by its variate and the mean of all."""

    @abstractmethod
    def variate(self, own: Tensor, mean: Tensor, step: Tensor, update: ClientUpdate) -> Tensor:
        """A client's next variate, float64.

        Args:
            own: its variate in the round.
            mean: of all clients' variates in the round.
            step: y_k - x.
            update: the client's.
        """

    def init(self, adapter: AdapterState, *, seed: int = 0) -> GlobalState:
        """The inner rule's.

        Raises:
            RuleError: clients train factors beside what they send, so that its change is not that of their steps.
        """
        state = super().init(adapter, seed=seed)
        if any(pair.in_blocks for pair in state.adapter.pairs.values()):
            raise RuleError(
                f"{type(self).__name__} corrects the gradients of what clients send, and {type(self.inner).__name__}'s "
                "send products of cores and trained factors: choose an inner rule without factors, such as fedsb",
                code="no-step",
            )
        return state

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The inner rule's, tilted.

        Raises:
            RuleError: a client of another rank than the global one.
        """
        require_same_ranks(self, state, client)
        plan, memory = super().plan(state, client), state.memory
        tilt: dict[str, Tensor] = {}
        for name, value in plan.adapter.tensors(plan.sends).items():
            own, mean = _held(memory, f"{_of(client.client_id)}{name}", value), _held(memory, f"{MEAN}{name}", value)
            if (term := self.tilt(own, mean)).any():
                tilt[name] = term.to(value.dtype)
        return replace(plan, tilt=tilt, asks=plan.asks | self.asks)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """The inner rule's, and the variates of those who answered.

        Raises:
            RuleError: see the inner rule.
        """
        memory, clients = self.own_memory(state), [0.0]
        after = self.inner.aggregate(self.inner_state(state), self._seen(state, updates, memory, clients))
        self._remember_means(memory, clients[0])
        return self.outer_state(self.moved(state, after, memory), memory)

    def moved(self, state: GlobalState, after: GlobalState, memory: Mapping[str, Tensor]) -> GlobalState:
        """The inner rule's result, corrected; here it stays as it is."""
        return after

    def _seen(
        self, state: GlobalState, updates: Iterable[ClientUpdate], memory: dict[str, Tensor], clients: list[float]
    ) -> Iterator[ClientUpdate]:
        """The updates as they come; their clients' variates go into `memory`, the number of clients into `clients`."""
        for update in updates:
            require_weight(update.num_examples, update.client_id)
            plan = self.plan(state, ClientSpec(update.client_id, update.adapter.layout, update.base_version))
            require_fit(update, plan)
            clients[0] = require_fact(update, "clients")
            after, who = update.adapter.tensors(), _of(update.client_id)
            starts = plan.adapter.tensors(plan.sends)
            # What stays is allocated before what is freed again: in turn they would leave the heap full of holes.
            kept = {
                name: torch.empty_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
                for name, value in starts.items()
            }
            for name, before in starts.items():
                own, mean = (_held(state.memory, f"{key}{name}", before) for key in (who, MEAN))
                kept[name].copy_(self.variate(own, mean, after[name].double() - before.double(), update))
            memory.update({f"{who}{name}": value for name, value in kept.items()})
            memory[f"{WEIGHT}{update.client_id}"] = torch.tensor(update.num_examples, dtype=torch.float64)
            yield update
            del update

    @staticmethod
    def _remember_means(memory: dict[str, Tensor], clients: float) -> None:
        """Put the mean of all clients' variates into `memory`."""
        weights = {key.removeprefix(WEIGHT): float(memory[key]) for key in sorted(memory) if key.startswith(WEIGHT)}
        total = math.fsum(weights.values()) * max(1.0, clients / len(weights))
        means: dict[str, Tensor] = {}
        for key in [key for key in memory if key.startswith(CLIENT)]:
            client_id, name = key.removeprefix(CLIENT).split("/", 1)
            mean = means.get(f"{MEAN}{name}", 0.0)
            means[f"{MEAN}{name}"] = mean + memory[key].double() * (weights[client_id] / total)
        memory.update(means)


@final
@rules.register("scaffold")
@dataclass(frozen=True)
class Scaffold(Drift):
    """y_k <- y_k - eta (g_k + c - c_k), c_k <- c_k - c + (x - y_k) / (K eta), by plain SGD.

    Args:
        inner: a rule that leaves the base and the adapter's basis alone.

    Raises:
        ConfigError: the inner rule's result is no step from the adapter, or it is a robust rule.
    """

    inner: Inner = field(default_factory=FedAvg)

    asks: ClassVar[frozenset[Fact]] = frozenset({"clients", "rates"})
    paper: ClassVar[str] = "Karimireddy et al., ICML 2020, arXiv 1910.06378"

    def __post_init__(self) -> None:
        self.require_steps()
        self.require_means()
        self.inherit(Claim.EXACT | Claim.ANY_TENSORS)

    def tilt(self, own: Tensor, mean: Tensor) -> Tensor:
        """c - c_k."""
        return mean - own

    def variate(self, own: Tensor, mean: Tensor, step: Tensor, update: ClientUpdate) -> Tensor:
        """Option II of algorithm 1."""
        return own - mean - step / require_fact(update, "rates")


@final
@rules.register("feddyn")
@dataclass(frozen=True)
class FedDyn(Drift):
    """argmin L_k(y) + alpha <h_k, y> + alpha/2 |y - x|^2, h_k <- h_k + (y_k - x), x <- mean of y_k + mean of all h_k.

    Args:
        alpha: > 0, weight of the dynamic regulariser.
        inner: a rule that leaves the base and the adapter's basis alone.

    Raises:
        ConfigError: alpha is not positive, the inner rule's result is no step from the adapter, or it is a
            robust rule.
    """

    alpha: float = 0.1
    inner: Inner = field(default_factory=FedAvg)

    paper: ClassVar[str] = "Acar et al., ICLR 2021, arXiv 2111.04263"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"feddyn: alpha must be positive and finite, not {self.alpha!r}: without a regulariser use fedavg",
                code="out-of-range",
            )
        self.require_steps()
        self.require_means()
        self.inherit(Claim.ANY_TENSORS)

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The inner rule's, tilted, with alpha as the weight of the proximal term."""
        return replace(super().plan(state, client), proximal_mu=self.alpha)

    def tilt(self, own: Tensor, mean: Tensor) -> Tensor:
        """alpha h_k."""
        return self.alpha * own

    def variate(self, own: Tensor, mean: Tensor, step: Tensor, update: ClientUpdate) -> Tensor:
        """h_k + (y_k - x)."""
        return own + step

    def moved(self, state: GlobalState, after: GlobalState, memory: Mapping[str, Tensor]) -> GlobalState:
        """The mean of all h_k is added to what was sent in this round."""
        sent = self.plan(state, ClientSpec(0, state.adapter.layout, state.base_version)).sends
        moved = {
            name: (value.double() + memory[f"{MEAN}{name}"]).to(value.dtype)
            for name, value in after.adapter.tensors(sent).items()
        }
        return replace(after, adapter=after.adapter.with_tensors(moved))


def _of(client_id: int) -> str:
    return f"{CLIENT}{client_id}/"


def _held(memory: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of the memory, float64; zero where there is none yet."""
    found = memory.get(name)
    return torch.zeros_like(like, dtype=torch.float64) if found is None else found.double()
