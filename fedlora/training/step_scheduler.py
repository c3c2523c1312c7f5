"""Which clients take their next step together.

Clients are independent: step s of one need not go with step s of another. All of a cohort wait with their next batch
known, and from them the one with the most work left goes first, with those whose texts are about as long, until a
budget of tokens is full. The choice depends on the batches alone, never on time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.model import Base

ENTRIES = {"cpu": 786_432, "cuda": 4_194_304}
"""Numbers in one activation of a joint step: about what a processor's caches hold, or what keeps a GPU busy."""


@dataclass(frozen=True)
class Waiting:
    """A client's next batch.

    Args:
        rows: how many.
        tokens: of the longest row.
        left: steps that the client has still to do.
    """

    rows: int
    tokens: int
    left: int


@dataclass(frozen=True)
class Budget:
    """How much goes into one step.

    Args:
        tokens: most of them, padding included; a single client may take more.
        waste: padded tokens that are worth saving one step.
    """

    tokens: int
    waste: int


def step_budget(base: Base) -> Budget:
    """The budget of one joint step, by the device and the width of the adapted layers."""
    width = max((shape.d_in for shape in base.layout().values()), default=ENTRIES["cpu"] // 512)
    tokens = max(512, ENTRIES.get(base.device.type, ENTRIES["cpu"]) // width)
    return Budget(tokens, tokens // 16)


def choose(waiting: Sequence[Waiting], budget: Budget) -> list[int]:
    """Places in `waiting` of the clients that go next, in ascending order; at least one."""
    order = sorted(range(len(waiting)), key=lambda k: (waiting[k].tokens, -waiting[k].left, k))
    leader = max(range(len(waiting)), key=lambda k: (waiting[k].left * waiting[k].rows * waiting[k].tokens, -k))
    shorter, longer = order.index(leader) - 1, order.index(leader) + 1
    chosen, rows, tokens = [leader], waiting[leader].rows, waiting[leader].tokens
    while True:
        options = []  # (padded tokens that it costs, place)
        if shorter >= 0:
            one = waiting[order[shorter]]
            options.append((one.rows * (tokens - one.tokens), shorter))
        if longer < len(order):
            options.append((rows * (waiting[order[longer]].tokens - tokens), longer))
        if not options:
            break
        cost, place = min(options)
        one = waiting[order[place]]
        longest = max(tokens, one.tokens)
        if cost > budget.waste or (rows + one.rows) * longest > budget.tokens:
            break
        chosen.append(order[place])
        rows, tokens = rows + one.rows, longest
        if place == shorter:
            shorter -= 1
        else:
            longer += 1
    return sorted(chosen)
