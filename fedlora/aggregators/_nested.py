"""Mixed ranks by nesting: a client of rank r_k has the first r_k of the global adapter's r units, in its own scale.

s_k [s/s_k B[:, :r_k]] A[:r_k] = s B[:, :r_k] A[:r_k],      s_k B_k A_k = s [s_k/s B_k, 0] [A_k; 0].
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, Layout, LoraPair
from fedlora.aggregators._base import ClientUpdate, GlobalState, WeightedMean, require_modules, require_weight
from fedlora.errors import RuleError


def nested_start(state: GlobalState, layout: Layout, client_id: int) -> AdapterState:
    """The first r_k units of the global adapter in the client's layout; the global pair itself where it has the same.

    Raises:
        RuleError: see `require_nested`.
    """
    require_nested(state, layout, client_id)
    pairs: dict[str, LoraPair] = {}
    for name, pair in state.adapter.pairs.items():
        theirs = layout[name]
        if theirs != pair.shape:
            B = pair.B[:, : theirs.rank] * (pair.scale / theirs.scale)
            pair = LoraPair(pair.A[: theirs.rank], B, theirs.scale)
        pairs[name] = pair
    return AdapterState(pairs, state.adapter.dense)


def padded_rows(pair: LoraPair, like: LoraPair) -> Tensor:
    """[A_k; 0] of a global pair's shape, in float64."""
    A = pair.A.new_zeros(like.A.shape, dtype=torch.float64)
    A[: pair.rank] = pair.A
    return A


def padded_columns(pair: LoraPair, like: LoraPair) -> Tensor:
    """[s_k/s B_k, 0] of a global pair's shape and scale, in float64."""
    B = pair.B.new_zeros(like.B.shape, dtype=torch.float64)
    B[:, : pair.rank] = pair.B
    return B.mul_(pair.scale / like.scale)


def require_nested(state: GlobalState, layout: Layout, client_id: int) -> None:
    """Raise `RuleError` unless a layout has the global modules, no rank above the global one, and scales but 0."""
    require_modules(state, layout, client_id)
    for name, shape in state.adapter.layout.items():
        theirs = layout[name]
        if theirs.rank > shape.rank:
            raise RuleError(
                f"client {client_id} has rank {theirs.rank} for {name!r}, above the global rank {shape.rank}: "
                "set the global rank to the largest of the clients'",
                code="rank-above-global",
            )
        if theirs.scale == 0 or shape.scale == 0:
            raise RuleError(
                f"the scale of {name!r} is 0 for client {client_id} or globally: set alpha above 0",
                code="scale-is-zero",
            )


def collect(
    state: GlobalState, updates: Iterable[ClientUpdate]
) -> tuple[dict[str, Tensor], dict[str, list[tuple[float, LoraPair]]]]:
    """For rules that need all factors at once: the mean of the dense parts, and for each module (n_k, pair).

    The pairs come in the order of client ids, so that the order of the replies changes no bit. They are kept as they
    came: memory grows with the number of clients.

    Raises:
        RuleError: no update, or one that does not fit.
    """
    mean = WeightedMean()
    kept: list[tuple[int, float, AdapterState]] = []
    for update in updates:
        require_weight(update.num_examples, update.client_id)
        require_nested(state, update.adapter.layout, update.client_id)
        mean.add(update.adapter.dense, update.num_examples)
        kept.append((update.client_id, update.num_examples, AdapterState(update.adapter.pairs)))
    dense = mean.result(like=state.adapter.dense)
    kept.sort(key=lambda reply: reply[0])
    return dense, {name: [(weight, adapter.pairs[name]) for _, weight, adapter in kept] for name in state.adapter.pairs}


def shares(terms: Iterable[tuple[float, LoraPair]]) -> list[tuple[float, LoraPair]]:
    """The same pairs with the weights p_k = n_k / sum n."""
    terms = list(terms)
    total = sum(weight for weight, _ in terms)
    return [(weight / total, pair) for weight, pair in terms]
