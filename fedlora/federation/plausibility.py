"""What a client's reply may be beside what the others sent: bounds that one client cannot move.

A reply that passes every check of its own can still decide the round alone: values of 1e19, ten million claimed
examples, a loss of 1e308. All bounds here are functions of medians that are known *before* a round begins, so that
they do not depend on the order of arrival and need no reply to wait for another; they are the same in one process,
in several, over a SuperLink and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, Final

FEWEST = 3
"""Of fewer clients a median says nothing: one of two would be half of it."""
FIRST = 10.0
"""In the first round, where nothing is known of the others, `max_norm_ratio` applies to ten times the start's norm."""
SMALLEST = 1e-3
"""Changes below `max_norm_ratio` times this share of the start's norm are never too large."""
UPDATE_NORM = "update_norm"
"""Figure of a client in the metrics: the L2 norm of what it changed."""
LOSS_RATIO = 1000.0
"""A loss above so many times the clients' median (of which at least 1 counts) is no loss of this model."""
START_LOSS: Final = "start_loss"
"""Figure of a client, where the rule asks for it: the mean loss on its training examples before training."""
COUNTED_LOSS = "start_loss_counted"
"""Figure of a client beside it: as what it counts, where that is less."""
START_LOSS_RATIO = 10.0
"""A client's reported loss counts as at most this many times the median client's."""
SMALLEST_LOSS = 1e-10
"""Added to it, as q-FedAvg's authors do: a power of zero, or a weight of zero, is nothing to divide by."""


@dataclass(frozen=True)
class Expectations:
    """What is known before a round begins.

    Args:
        median_change: Of the clients in the rounds before; None: it is not known.
        claims: Client -> examples that it said it has, of all clients.
        median_loss: `median_loss`; None: it is not known, and the server waits for the round's own.
    """

    median_change: float | None = None
    claims: Mapping[int, int] = field(default_factory=dict)
    median_loss: float | None = None


def median_change(records: Iterable[Mapping[str, Any]]) -> float | None:
    """The median norm of the changes in the last round in which at least `FEWEST` clients answered.

    Args:
        records: lines of metrics, oldest first.
    """
    found = None
    for record in records:
        norms = [row[UPDATE_NORM] for row in record.get("clients", {}).values() if UPDATE_NORM in row]
        if len(norms) >= FEWEST:
            found = median_low(norms)
    return found


def largest_change(start_norm: float, before: float | None, ratio: float) -> float:
    """The largest L2 norm that a client's change may have.

    Args:
        start_norm: of all tensors of the adapter that it was sent; the result grows with it.
        before: `median_change` of the rounds before; None: of the first, and where too few answer.
        ratio: `server.max_norm_ratio`.
    """
    start_norm = max(start_norm, 1.0)
    return ratio * (FIRST * start_norm if before is None else max(before, SMALLEST * start_norm))


def largest_weight(client_id: int, claims: Mapping[int, int], ratio: float) -> float:
    """The most that a client may weigh: `ratio` times the median of all, or a third of all others together.

    The larger of both, so that among many clients, where no single one decides, large ones count in full.

    Args:
        client_id: whose weight it is.
        claims: client -> examples that its node said it has.
        ratio: `server.max_weight_ratio`.
    """
    if len(claims) < FEWEST:
        return math.inf
    others = sum(count for other, count in claims.items() if other != client_id)
    return max(ratio * median_low(claims.values()), others / 3)


def median_loss(records: Iterable[Mapping[str, Any]]) -> float | None:
    """The largest median of `START_LOSS` of all rounds in which at least `FEWEST` clients reported it.

    Of the losses as they counted: a round in which most clients lie moves the bound by `START_LOSS_RATIO` at most. And
    not the last round's: a model that does well on most clients may be as bad on some as it was at the start.

    Args:
        records: lines of metrics.
    """
    rows = [[row for row in record.get("clients", {}).values() if START_LOSS in row] for record in records]
    every = [[row.get(COUNTED_LOSS, row[START_LOSS]) for row in those] for those in rows]
    return max((median_low(losses) for losses in every if len(losses) >= FEWEST), default=None)


def largest_loss(before: float | None) -> float:
    """The most that a client's loss before training counts: `START_LOSS_RATIO` times `median_loss`.

    Args:
        before: `median_loss` of the rounds before, and of the first round itself; None: where too few answer.
    """
    return math.inf if before is None else START_LOSS_RATIO * before


def no_losses(losses: Mapping[int, float]) -> list[int]:
    """The clients whose loss is left out of the mean: far from all others', whatever its sign."""
    typical = max(1.0, median_low(map(abs, losses.values()))) if losses else 1.0
    return sorted(client_id for client_id, loss in losses.items() if abs(loss) > LOSS_RATIO * typical)
