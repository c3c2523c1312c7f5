"""Audits of user-level privacy, aimed at one client: the worlds for `audit.audit_two_worlds`.

A worst case is a client with the largest weight whose update, far above the clip norm, points along a direction where
nobody else's does. What an attacker sees is the global model along that direction, and the clip norm where it adapts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedlora.adapter import AdapterState
from fedlora.aggregators import ClientUpdate, GlobalState
from fedlora.privacy.server_dp import CLIP, ServerDP


def client_worlds(
    rule: ServerDP,
    weights: Sequence[float],
    *,
    rounds: int = 1,
    noise_for: float | None = None,
    count_noise: float = 1.0,
) -> Callable[[bool], float]:
    """Aggregates with and without what the first client sends: an update that changes nothing takes its place.

    Args:
        rule: under audit; it must give the global model the mean of its updates (FedAvg does).
        weights: of the clients that answer; the first one is attacked.
        rounds: how many rounds the attacker sees.
        noise_for: a mutant: noise for this largest share of a client, instead of the one that really is there.
        count_noise: a mutant, if not 1: this part of the count query's noise (adaptive clipping).

    Returns:
        world -> the log-likelihood ratio of what all rounds showed, up to a constant: where the global model went
        along the client's direction and, under adaptive clipping, where the clip norm went, each by its own noise.
    """
    start = AdapterState({}, {"line": torch.zeros(1, dtype=torch.float64)})
    share, largest = weights[0] / sum(weights), max(weights) / sum(weights)
    model_part = 1.0 if noise_for is None else noise_for / largest

    def merged(state: GlobalState, there: bool) -> GlobalState:
        far = 50.0 * float(state.memory[CLIP]) * there
        sent = AdapterState({}, {"line": torch.full((1,), far, dtype=torch.float64)})
        updates = [ClientUpdate(0, sent, weights[0])]
        updates += [ClientUpdate(k, start, weight) for k, weight in enumerate(weights[1:], start=1)]
        return rule.aggregate(state, updates)

    def by_model(after: GlobalState, there: bool) -> float:
        unit = after.metrics["clip_norm"] * largest  # in which the noise is z_D
        signal = share / largest
        moved = float(after.adapter.dense["line"]) / unit
        moved = signal * there + (moved - signal * there) * model_part
        return moved * signal / (rule.update_multiplier * model_part) ** 2

    def by_clip(before: GlobalState, after: GlobalState, there: bool) -> float:
        if not rule.adaptive:
            return 0.0
        step = math.log(float(before.memory[CLIP]) / float(after.memory[CLIP])) / rule.clip_lr
        exact = len(weights) - there
        unclipped = exact + ((step + rule.quantile) * len(weights) - exact) * count_noise
        return -unclipped / (rule.count_multiplier * count_noise) ** 2

    def output(there: bool) -> float:
        state, total = rule.init(start), 0.0
        for _ in range(rounds):
            after = merged(state, there)
            total += by_model(after, there) + by_clip(state, after, there)
            state = replace(after, adapter=start)
        return total

    return output
