"""Fairness: clients on which the model does badly count for more.

Both rules read F_k, the mean loss of the round's start x on client k's training examples (`ClientUpdate.facts`,
"start_loss"). With n_k the client's weight and y_k what it sends:

    q-FedAvg    minimise sum_k n_k F_k^(q+1) / (q+1):       D_k = F_k^q L (x - y_k),
                h_k = q F_k^(q-1) L^2 |x - y_k|^2 + L F_k^q,         x <- x - sum_k n_k D_k / sum_k n_k h_k;
    AFL         minimise max_lambda sum_k lambda_k F_k:     x <- sum_k lambda_k y_k / sum_k lambda_k,
                lambda <- the projection of lambda + gamma F on the simplex.

Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020, arXiv 1905.10497, algorithm 2,
which samples clients by n_k and sums uniformly; here they are sampled uniformly and the sums are weighted, so that
q = 0 is the inner rule. Mohri, Sivek, Suresh, "Agnostic Federated Learning", ICML 2019, arXiv 1902.00146, section 4.2,
with one client for each domain and clients' training in the place of the step on x; the state is the last iterate,
not the average of all.

The step of q-FedAvg is the mean step, weighted by n_k F_k^q, times a factor of at most 1,

    sum_k n_k F_k^q / (sum_k n_k F_k^q + q L sum_k n_k F_k^(q-1) |x - y_k|^2),

so that a client which claims too large a loss can draw x to its own y_k and no further. In AFL one that does not
answer in a round counts with the mean loss of those who did, so that no loss outlives its round; lambda_k is in the
memory as "weight/<id>", and "weight/others" for those who never answered.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

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
from fedlora.aggregators._bounds import require_bounds, require_positive
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.server_optimisers import moved_inner
from fedlora.errors import RuleError

logger = logging.getLogger(__name__)

WEIGHT, OTHERS = "weight/", "weight/others"
NO_WEIGHT = 1e-30
"""Of a client whose lambda is 0: nothing beside any other, and an equal share where nobody has more."""
LARGEST_Q = 20.0
"""With the smallest loss that is reported, 1e-10, and larger exponents a weight would be zero."""
LARGEST_RATE = 1e6


class Fairness(Around):
    """A rule whose clients report their loss before training."""

    claims: ClassVar[Claim] = Claim.ANY_TENSORS
    group: ClassVar[str] = "fairness"
    asks: ClassVar[frozenset[Fact]] = frozenset({"start_loss"})

    def plan(self, state: GlobalState, client: ClientSpec) -> ClientPlan:
        """The inner rule's.

        Raises:
            RuleError: a client of another rank than the global one.
        """
        require_same_ranks(self, state, client)
        plan = super().plan(state, client)
        return replace(plan, asks=plan.asks | self.asks)


@final
@rules.register("qfedavg")
@dataclass(frozen=True)
class QFedAvg(Fairness):
    """The inner rule's step with the weights n_k F_k^q, shortened.

    Args:
        q: from 0 (the inner rule) to 20; the larger, the more the clients with a large loss count.
        lipschitz: L > 0, the paper's bound on the curvature of a client's loss, for which it takes 1 / train.lr of SGD.
        inner: a rule that leaves the base and the adapter's basis alone.

    Raises:
        ConfigError: a number is out of its range, the inner rule's result is no step, or it is a robust rule.
    """

    q: float = 1.0
    lipschitz: float = 1.0
    inner: Inner = field(default_factory=FedAvg)

    paper: ClassVar[str] = "Li et al., ICLR 2020, arXiv 1905.10497"

    def __post_init__(self) -> None:
        require_bounds("qfedavg", "q", self.q, 0 <= self.q <= LARGEST_Q, f"from 0 to {LARGEST_Q:g}")
        require_positive("qfedavg", lipschitz=self.lipschitz)
        self.require_steps()
        self.require_means()
        self.inherit(Claim.ANY_TENSORS)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """Algorithm 2, one update in memory at a time if the inner rule is LINEAR.

        Raises:
            RuleError: see the inner rule; or an update does not say its loss, or one that is too large for this q.
        """
        sums = [0.0, 0.0]

        def weighted() -> Iterator[ClientUpdate]:
            for update in updates:
                plan = self.plan(state, ClientSpec(update.client_id, update.adapter.layout, update.base_version))
                require_fit(update, plan)
                n, loss = require_weight(update.num_examples, update.client_id), require_fact(update, "start_loss")
                after, value = update.adapter.tensors(), n * self._power(loss)
                sums[0] += value
                sums[1] += (
                    n
                    * loss ** (self.q - 1)
                    * math.fsum(
                        float((after[name].double() - before.double()).square().sum())
                        for name, before in plan.adapter.tensors(plan.sends).items()
                    )
                )
                yield replace(update, num_examples=value)
                del update

        def share() -> float:
            return sums[0] / (sums[0] + self.q * self.lipschitz * sums[1])

        after = moved_inner(self, state, weighted(), lambda _, x, y: torch.lerp(x, y, share()))
        metrics = {**after.metrics, "qfedavg/step": share()}
        return self.outer_state(replace(after, metrics=metrics), self.own_memory(state))

    def _power(self, loss: float) -> float:
        try:
            return float(loss**self.q)
        except OverflowError:
            raise RuleError(
                f"qfedavg: a loss of {loss:g} to the power of q = {self.q:g} is beyond all numbers: lower q",
                code="out-of-range",
            ) from None


@final
@rules.register("afl")
@dataclass(frozen=True)
class Afl(Fairness):
    """The inner rule with the weights lambda_k, which grow by gamma F_k and are projected on the simplex.

    Args:
        rate: gamma, above 0 and up to 1e6, by which a loss moves its client's weight; weights add up to 1 over all
            clients.
        inner: any rule of clients of one rank that leaves no updates out.

    Raises:
        ConfigError: the rate is out of its range, or the inner rule is robust.
    """

    rate: float = 0.1
    inner: Inner = field(default_factory=FedAvg)

    asks: ClassVar[frozenset[Fact]] = frozenset({"start_loss", "clients"})
    paper: ClassVar[str] = "Mohri et al., ICML 2019, arXiv 1902.00146"

    def __post_init__(self) -> None:
        require_positive("afl", rate=self.rate)
        require_bounds("afl", "rate", self.rate, self.rate <= LARGEST_RATE, f"at most {LARGEST_RATE:g}")
        self.require_means()
        self.inherit(Claim.ANY_TENSORS | Claim.CHANGES_BASE | Claim.GAUGE_FREE)

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """One round; where all who answered have the weight 0, they count equally, and a warning says so.

        Raises:
            RuleError: see the inner rule; or an update does not say its loss.
        """
        memory = self.own_memory(state)
        found, clients, most = dict[str, float](), [0.0], [0.0]

        def weighted() -> Iterator[ClientUpdate]:
            for update in updates:
                require_weight(update.num_examples, update.client_id)
                plan = self.plan(state, ClientSpec(update.client_id, update.adapter.layout, update.base_version))
                require_fit(update, plan)
                clients[0] = require_fact(update, "clients")
                found[str(update.client_id)] = require_fact(update, "start_loss")
                weight = memory.get(f"{WEIGHT}{update.client_id}", memory.get(OTHERS))
                value = 1 / clients[0] if weight is None else float(weight)
                most[0] = max(most[0], value)
                yield replace(update, num_examples=max(value, NO_WEIGHT))
                del update

        after = self.inner.aggregate(self.inner_state(state), weighted())
        if not most[0]:
            said = "round %d: all %d clients that answered have the weight 0 in afl, and count equally"
            logger.warning(said, after.round, len(found))
        self._move_weights(memory, found, clients[0])
        metrics = {**after.metrics, "afl/largest_weight": max(_of(memory, WEIGHT).values())}
        return self.outer_state(replace(after, metrics=metrics), memory)

    def _move_weights(self, memory: dict[str, Tensor], found: dict[str, float], clients: float) -> None:
        names = sorted({*_of(memory, WEIGHT), *found})
        others = max(0, round(clients) - len(names))
        unseen, mean = float(memory.get(OTHERS, 1 / clients)), math.fsum(found.values()) / len(found)
        before = [float(memory.get(f"{WEIGHT}{name}", unseen)) for name in names] + [unseen] * others
        raised = [found.get(name, mean) for name in names] + [mean] * others
        moved = torch.tensor(before, dtype=torch.float64) + self.rate * torch.tensor(raised, dtype=torch.float64)
        weights = on_simplex(moved)
        for place, name in enumerate(names):
            memory[f"{WEIGHT}{name}"] = weights[place].clone()
        memory[OTHERS] = weights[-1].clone() if others else torch.zeros((), dtype=torch.float64)


def on_simplex(point: Tensor) -> Tensor:
    """The point of {w >= 0, sum w = 1} that lies closest to a vector, float64 [n].

    Duchi, Shalev-Shwartz, Singer, Chandra, ICML 2008, figure 1.
    """
    point = point - point.max()  # the same closest point, and 1 is not lost beside large entries
    ordered = point.sort(descending=True).values
    over = (ordered.cumsum(0) - 1) / torch.arange(1, len(point) + 1, dtype=point.dtype)
    last = int((ordered > over).nonzero().amax())
    return (point - over[last]).clamp(min=0.0)


def _of(memory: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """A number of each client that ever answered."""
    found = {key: value for key, value in memory.items() if key.startswith(prefix) and key != OTHERS}
    return {key.removeprefix(prefix): float(value) for key, value in found.items()}
