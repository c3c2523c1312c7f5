"""Base updates: following their log, catching up, compacting, and measuring what a round did.

The base of a client is always W = W0 + acc, where `acc` is what `accumulate` makes of the updates. A log is a chain of
`BaseUpdate`, each starting where the one before it ends; the first starts at version 0, the pristine base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators._base import BaseUpdate, ClientPlan, GlobalState
from fedlora.errors import RuleError
from fedlora.lowrank import DeltaSum, compress, relative_error, stack


def accumulate(acc: Mapping[str, Tensor], base_update: BaseUpdate) -> dict[str, Tensor]:
    """What a base has changed by after one more update: acc <- acc + dW, in float32 (float64 for float64 factors).

    The base itself is always W = W0 + acc, from the pristine W0 and in one addition: adding each change to a bfloat16
    weight would lose a third of a change of 1e-4. Server and clients use this one function, so that a client that
    followed every update and one that got the compacted sum hold the same bits.

    Args:
        acc: module name -> change so far [d_out, d_in]; not read if the update starts at version 0.
        base_update: the next of the chain.

    Returns:
        The new changes. Tensors may be shared with `acc` and `aggregate`: do not change them in place.
    """
    out = {} if base_update.since == 0 else dict(acc)
    for name, pair in base_update.change.pairs.items():
        delta = pair.delta().to(_wide(pair))
        out[name] = out[name] + delta if name in out else delta
    for name, dense in base_update.change.dense.items():
        out[name] = out[name] + dense if name in out else dense
    return out


def base_update_chain(base_updates: Sequence[BaseUpdate], since: int) -> tuple[BaseUpdate, ...]:
    """The part of a log that takes a base from version `since` to its end.

    A base that has a version from inside a compacted stretch, or one that the log does not know, starts again from
    version 0 (the first entry's `since`).
    """
    if since == (base_updates[-1].version if base_updates else 0):
        return ()
    starts = [base_update.since for base_update in base_updates]
    return tuple(base_updates[starts.index(since) :]) if since in starts else tuple(base_updates)


def catch_up(base_updates: Sequence[BaseUpdate], since: int) -> tuple[BaseUpdate, ...]:
    """What to send to a client whose base has version `since`: `base_update_chain`, or its sum where that is smaller.

    When the missing stacks are larger than one dense change for each module, one update from version 0 carries the
    dense sum instead; both roads end with the same bits (see `accumulate`).
    """
    chain = base_update_chain(base_updates, since)
    if sum(base_update.change.nbytes() for base_update in chain) <= _dense_nbytes(base_updates):
        return chain
    return (_fold(base_updates),)


def on_current_base(plan: ClientPlan, state: GlobalState, held: int) -> ClientPlan:
    """A plan on the state's version of the base, for a client whose base has version `held`."""
    return replace(plan, base_version=state.base_version, base_updates=catch_up(state.base_updates, held))


def with_change(state: GlobalState, adapter: AdapterState, change: Mapping[str, LoraPair]) -> GlobalState:
    """The state after a round that gave a new adapter and changed the base.

    Args:
        state: before the round.
        adapter: the new one.
        change: of the base, module name -> pair.
    """
    update = BaseUpdate(state.base_version, state.base_version + 1, AdapterState(change))
    return replace(state, adapter=adapter, round=state.round + 1, base_updates=compact((*state.base_updates, update)))


def compact(base_updates: Sequence[BaseUpdate]) -> tuple[BaseUpdate, ...]:
    """The same log in bounded memory: the oldest stacks become one dense change where that is smaller.

    The last update stays as it is, and so do those before it while together they are no larger than one dense change
    for each module: a client that lacks more than these is better served with the dense sum (`catch_up`).
    """
    limit = _dense_nbytes(base_updates)
    first, size = len(base_updates), 0
    while first and not base_updates[first - 1].change.dense:
        size += base_updates[first - 1].change.nbytes()
        if size > limit and first < len(base_updates):
            break
        first -= 1
    if first == 0 or (first == 1 and not base_updates[0].change.pairs):
        return tuple(base_updates)
    return (_fold(base_updates[:first]), *base_updates[first:])


def _fold(base_updates: Sequence[BaseUpdate]) -> BaseUpdate:
    acc: dict[str, Tensor] = {}
    for base_update in base_updates:
        acc = accumulate(acc, base_update)
    return BaseUpdate(0, base_updates[-1].version, AdapterState(dense=acc))


def _wide(pair: LoraPair) -> torch.dtype:
    return torch.promote_types(torch.float32, torch.promote_types(pair.A.dtype, pair.B.dtype))


def _dense_nbytes(base_updates: Sequence[BaseUpdate]) -> int:
    """Bytes of one dense change for each module that any of the updates changes."""
    sizes: dict[str, int] = {}
    for base_update in base_updates:
        for name, pair in base_update.change.pairs.items():
            sizes[name] = max(sizes.get(name, 0), pair.B.shape[0] * pair.A.shape[1] * _wide(pair).itemsize)
        for name, dense in base_update.change.dense.items():
            sizes[name] = max(sizes.get(name, 0), dense.numel() * dense.element_size())
    return sum(sizes.values())


def broadcast_change(before: GlobalState, after: GlobalState) -> DeltaSum:
    """D: the change of weights, over the base of `before`, that clients hold once they follow `after`.

    Raises:
        RuleError: if the log of `after` was compacted across the version of `before`.
    """
    change = DeltaSum()
    change.add(after.adapter.pairs)
    new = base_update_chain(after.base_updates, before.base_version)
    if new and new[0].since != before.base_version:
        raise RuleError(
            f"the base updates since version {before.base_version} were compacted with earlier ones, so that the "
            "last change cannot be told apart: compare consecutive states",
            code="log-compacted",
        )
    for base_update in new:
        change.add(base_update.change.pairs)
        change.add({name: as_pair(dense) for name, dense in base_update.change.dense.items()})
    return change


def equivalent_adapter(state: GlobalState, max_rank: int) -> tuple[AdapterState, float]:
    """One adapter on the original base that does what base changes and adapter do together.

    Args:
        state: whose `base_updates` and `adapter` are folded into one.
        max_rank: the largest rank that the result may have.

    Returns:
        The adapter (each pair with scale 1, and compressed by SVD where its total rank is above `max_rank`), and the
        relative error |D - D'|_F / |D|_F of it, which is at rounding level where nothing was cut and 0.0 without any
        base update.

    Raises:
        RuleError: if `max_rank` is below 1.
    """
    if not state.base_updates:
        return state.adapter.plain(), 0.0
    pairs: dict[str, LoraPair] = {}
    whole, kept = DeltaSum(), DeltaSum()
    changed = {
        name for base_update in state.base_updates for name in (*base_update.change.pairs, *base_update.change.dense)
    }
    for name in dict.fromkeys((*state.adapter.pairs, *sorted(changed))):
        parts: list[tuple[float, LoraPair]] = []
        if name in state.adapter.pairs:
            parts.append((1.0, state.adapter.pairs[name]))
        for base_update in state.base_updates:
            if name in base_update.change.pairs:
                parts.append((1.0, base_update.change.pairs[name]))
            if name in base_update.change.dense:
                parts.append((1.0, as_pair(base_update.change.dense[name])))
        total = stack([(c, pair) for c, pair in parts if pair.B.any()] or parts[:1])
        pairs[name] = compress(total, min(max_rank, total.rank, total.B.shape[0], total.A.shape[1]))
        whole.add({name: total})
        kept.add({name: pairs[name]})
    return AdapterState(pairs, state.adapter.dense), relative_error(kept, whole)


def as_pair(dense: Tensor) -> LoraPair:
    """A dense [d_out, d_in] change as a pair, by an identity on its smaller side."""
    o, i = dense.shape
    if o <= i:
        return LoraPair(dense, torch.eye(o, dtype=dense.dtype, device=dense.device), 1.0)
    return LoraPair(torch.eye(i, dtype=dense.dtype, device=dense.device), dense, 1.0)
