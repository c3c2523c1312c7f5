"""What follows from a plan is found once for all clients that are asked the same, and is the same as for each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_federations import MakeConfig

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import BaseUpdate, ClientPlan
from fedlora.federation.client_pool import ClientInfo, RoundRequest
from fedlora.federation.initial_state import first_state
from fedlora.federation.load_rule import load_rule
from fedlora.federation.planner import Held, Planner, shared_plans
from fedlora.federation.protocol import PartDigests
from fedlora.training.workspace import open_workspace

UPDATE = BaseUpdate(0, 1, AdapterState({"m": LoraPair(torch.ones(1, 3), torch.ones(2, 1), 1.0)}))
PLAN = ClientPlan(AdapterState({"m": LoraPair(torch.ones(1, 3), torch.zeros(2, 1), 1.0)}), base_updates=(UPDATE,))


def test_a_plan_that_asks_the_same_is_the_last_one() -> None:
    shared = shared_plans()
    assert shared(PLAN) is PLAN
    assert shared(replace(PLAN, base_updates=(UPDATE,))) is PLAN


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": PLAN.adapter.clone()},
        {"trains": frozenset({"B"})},
        {"sends": frozenset({"B"})},
        {"base_version": 1},
        {"base_updates": ()},
        {"base_updates": (replace(UPDATE, change=UPDATE.change.clone()),)},
        {"fresh_seed": 1},
        {"proximal_mu": 0.1},
        {"tilt": {"m:A": torch.ones(1, 3)}},
        {"asks": frozenset({"rates"})},
        {"first": frozenset({"B"})},
        {"first_times": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_that_asks_anything_else_is_itself(change: dict[str, object]) -> None:
    shared, other = shared_plans(), replace(PLAN, **change)
    shared(PLAN)
    assert shared(other) is other
    assert shared(PLAN) is PLAN


@pytest.mark.parametrize(
    "settings",
    [(), ("wire.down=int8",), ("strategy.name=ffa", "clients.ranks=[2,1,2]"), ("train.keep_optimizer=true",)],
)
def test_the_bytes_of_each_request_are_those_of_its_own_head(
    tiny_config: MakeConfig, settings: tuple[str, ...]
) -> None:
    config = tiny_config(*settings, "partition.clients=3")
    workspace, rule = open_workspace(config), load_rule(config)
    planner, state = Planner(config, rule, workspace, run="0123"), first_state(rule, workspace.base, 0)
    held, sizes = [Held() for _ in range(3)], set[int]()
    for number in (1, 2, 10):
        for client_id in (0, 1, 2):
            asked = RoundRequest(number, (0, 1, 2), state, kept_rounds={1: number - 1})
            # Numbers of clients have other lengths, too.
            found = planner.request(asked, ClientInfo(10**client_id), held[client_id])
            assert found.digests == PartDigests()(found.plan)
            assert planner.outcome(found).bytes_down == found.nbytes
            sizes.add(found.nbytes)
            if client_id:
                held[client_id].receive(found)
    assert len(sizes) > 3
