"""Which change of the base a process has made: versions are numbers, digests say that two versions 7 are the same 7."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from fedlora.aggregators import BaseUpdate, GlobalState, base_update_chain
from fedlora.hashing import tensors_digest
from fedlora.model.base_model import Base
from fedlora.state_io import flatten_base_update


def digest_of(base: Base) -> str:
    """Identity of the base's present weights: "" for the pristine ones, "?" for those that `follow` did not make."""
    version, known = base.history
    if base.base_version == 0:
        return ""
    return known if version == base.base_version else "?"


def can_follow(base: Base, target: str, since: str) -> bool:
    """Whether `follow` can bring the base to `target` with changes that apply to `since`."""
    return digest_of(base) in (target, since) or since == ""


def follow(base: Base, base_updates: Sequence[BaseUpdate], version: int, target: str, since: str) -> None:
    """Bring the base to a version.

    Args:
        base: changed in place; nothing is done if it is there already.
        base_updates: the changes from `since` to `target`.
        version: that `target` has.
        target: digest to reach.
        since: digest to which the changes apply; "" for the pristine base.
    """
    if digest_of(base) == target and base.base_version == version:
        return
    if digest_of(base) != since:
        base.rebase(0, ())
    base.rebase(version, base_updates)
    base.history = (version, target)


def bring_to(base: Base, state: GlobalState, digests: Mapping[int, str]) -> None:
    """Bring the base to a state's version by the shortest way.

    Args:
        base: Changed in place; its adapter stays as it is.
        state: With all changes so far.
        digests: Of the base by version, as this run has made them.
    """
    here = base.base_version if digest_of(base) == digests.get(base.base_version) else 0
    chain = base_update_chain(state.base_updates, here)
    since = digests[here] if not chain or chain[0].since == here else ""
    follow(base, chain, state.base_version, digests[state.base_version], since)


def show(base: Base, state: GlobalState, digests: Mapping[int, str]) -> None:
    """Write a state's model to the base: its version, and its adapter; see `bring_to`."""
    bring_to(base, state, digests)
    base.write(state.adapter)


def next_digest(before: str, old: GlobalState, new: GlobalState) -> str:
    """The digest of the base after an update, from the one before and what was added (not from compaction)."""
    if new.base_version == old.base_version:
        return before
    added = [base_update for base_update in new.base_updates if base_update.since >= old.base_version]
    return chain_digest(before, added or new.base_updates)


def chain_digest(before: str, base_updates: Sequence[BaseUpdate]) -> str:
    """Extend a digest by changes; "" stays "" if there are none."""
    for base_update in base_updates:
        added = tensors_digest(flatten_base_update(base_update)[0])
        before = hashlib.sha256(f"{before}/{added}".encode()).hexdigest()
    return before
