"""What a rule sends, counted by playing two rounds of it with made-up updates instead of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedlora.adapter import AdapterState, Layout
from fedlora.aggregators import Aggregator, ClientPlan, ClientSpec, ClientUpdate, GlobalState
from fedlora.config import WireConfig
from fedlora.federation.protocol import PartDigests, TrainRequest, request_tensors, tensors_nbytes
from fedlora.rng import derive

FLOAT32 = WireConfig()
ROUNDS = 3
"""The first is not counted: in it every client gets what is sent only once. Rules may alternate, so two are."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of tensors for one client in one round, the mean over clients and rounds.

    Args:
        up: from the client.
        down: to the client.
        first_down: to the client in the first round.
    """

    up: float
    down: float
    first_down: float


def measure_traffic(
    rule: Aggregator, initial: AdapterState, layouts: Sequence[Layout], wire: WireConfig = FLOAT32
) -> Traffic:
    """Play a few rounds with all clients.

    Args:
        rule: to be measured.
        initial: the global adapter before the first round.
        layouts: of each client.
        wire: of the config.

    Raises:
        RuleError: the rule cannot serve these layouts.
    """
    state = rule.init(initial)
    held: list[frozenset[str]] = [frozenset() for _ in layouts]
    versions = [0] * len(layouts)
    up = down = first = 0.0
    for number in range(1, ROUNDS + 1):
        digests_of, updates = PartDigests(), []
        for k, layout in enumerate(layouts):
            plan = rule.plan(state, ClientSpec(k, layout, versions[k]))
            digests = digests_of(plan)
            mine = {part for part, digest in digests.items() if digest in held[k]}
            received = tensors_nbytes(request_tensors(plan, mine), wire.down)
            held[k] = frozenset(digests.values())
            if number == 1:
                first += received
            else:
                down += received
                up += TrainRequest(plan, number, k, wire=wire.up, fraction=wire.fraction).reply_nbytes
            versions[k] = plan.base_version
            moved, facts = _moved(plan, derive(number, "traffic", k)), dict.fromkeys(plan.asks, 1.0)
            updates.append(ClientUpdate(k, moved, 1.0, plan.base_version, facts=facts))
        state = _merge(rule, state, updates, number)
    counted = len(layouts) * (ROUNDS - 1)
    return Traffic(up / counted, down / counted, first / len(layouts))


def _moved(plan: ClientPlan, seed: int) -> AdapterState:
    """The plan's adapter with a little noise on what would be trained."""
    generator = torch.Generator().manual_seed(seed)
    trained = plan.adapter.tensors(plan.trains)
    noise = {name: 0.01 * torch.randn(value.shape, generator=generator) for name, value in trained.items()}
    return plan.adapter.with_tensors({name: value + noise[name].to(value.dtype) for name, value in trained.items()})


def _merge(rule: Aggregator, state: GlobalState, updates: Sequence[ClientUpdate], number: int) -> GlobalState:
    return replace(rule.aggregate(state, iter(updates)), round=number)
