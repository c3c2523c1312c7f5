"""Audits of user-level privacy, aimed at one client: the worlds for `audit.audit_two_worlds`.

A worst case is a client with the largest weight whose update, far above the clip norm, points along a direction where
nobody else's does. What an attacker sees is the global model along that direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.privacy.central import Central


def client_worlds(
    rule: Central, weights: Sequence[float], *, rounds: int = 1, noise_for: float | None = None
) -> Callable[[bool], float]:
    """Merges with and without what the first client sends.

    Args:
        rule: under audit; it must give the global model the mean of its updates (FedAvg does).
        weights: of the clients that answer; the first one is attacked.
        rounds: how many rounds the attacker sees.
        noise_for: a mutant: noise for this largest share of a client, instead of the one that really is there.

    Returns:
        world -> where the global model went along the client's direction, over all rounds.
    """
    start = AdapterState({}, {"line": torch.zeros(1, dtype=torch.float64)})
    share, largest = weights[0] / sum(weights), max(weights) / sum(weights)

    def merged(state: GlobalState, there: bool) -> GlobalState:
        sent = AdapterState({}, {"line": torch.full((1,), 50.0 * rule.clip_norm * there, dtype=torch.float64)})
        updates = [ClientUpdate(0, sent, weights[0])]
        updates += [ClientUpdate(k, start, weight) for k, weight in enumerate(weights[1:], start=1)]
        return rule.merge(state, updates)

    def output(there: bool) -> float:
        state, total = rule.init(start), 0.0
        for _ in range(rounds):
            after = merged(state, there)
            moved = float(after.adapter.dense["line"])
            if noise_for is not None:
                exact = after.metrics["clip_norm"] * share * there
                moved = exact + (moved - exact) * noise_for / largest
            total += moved
            state = replace(after, adapter=start)
        return total

    return output
