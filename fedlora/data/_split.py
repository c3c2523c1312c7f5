"""Which examples are kept for the test and for validation, by the server and by each client.

Shapes: n = examples, g = groups of a domain, c = classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from fedlora.config import RunConfig
from fedlora.errors import DataError
from fedlora.partition._base import largest_remainder
from fedlora.rng import derive

MOST_EXCHANGES = 100_000
"""Pairs of groups above which none are exchanged: among so many, single ones come near enough."""


def split_test(
    size: int,
    fraction: float,
    seed: int,
    *,
    groups: np.ndarray | None = None,
    domains: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """A mask of the test examples, bool [n]: `fraction` of each domain, with the domain's own shares of the classes.

    Where examples are grouped, groups go to the test as wholes: they are looked at in an order of the seed's, and one
    is taken if it brings the counts of the classes nearer to those wanted. No domain loses all of its groups. A group
    that stands in several domains counts to the domain of its first example.

    Args:
        size: number of examples.
        fraction: of the examples for the test.
        seed: of the run.
        groups: group of each example [n]; None if each stands for itself.
        domains: domain of each example [n]; None if there is but one.
        labels: class of each example [n], int64; None where there are none.

    Raises:
        DataError: no example would be in the test.
    """
    mask, units = _mask(size, fraction, seed, "test", groups, domains, labels)
    if not mask.any():
        raise DataError(
            f"data.test_fraction = {fraction} of {size} examples in {units} groups leaves no test example: raise "
            "it, or give data.test",
            code="empty-test-set",
        )
    return mask


@dataclass(frozen=True)
class Split:
    """The shares of the examples that nobody trains on, 0 for none.

    Args:
        server_test: of the source, with the server.
        server_validation: of what is left of the source, with the server.
        client_test: of each client's examples, with the client.
        client_validation: of what is left of them, with the client.
    """

    server_test: float = 0.0
    server_validation: float = 0.0
    client_test: float = 0.0
    client_validation: float = 0.0

    @classmethod
    def of(cls, config: RunConfig) -> Split:
        """As a run's config says."""
        data, on = config.data, config.evaluation.on
        validation = data.validation_fraction if config.selection is not None else 0.0
        return cls(
            server_test=data.test_fraction if on != "clients" and data.test is None else 0.0,
            server_validation=validation if on != "clients" else 0.0,
            client_test=data.test_fraction if config.evaluation.at_clients else 0.0,
            client_validation=validation if on == "clients" else 0.0,
        )


def keep_apart(
    rows: Int[np.ndarray, "n"],
    fraction: float,
    seed: int,
    purpose: str,
    *,
    groups: np.ndarray | None = None,
    domains: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "k"]]:
    """Some examples in two parts, as `split_test` divides them: what is left, and what is kept apart (maybe nothing).

    Args:
        rows: their positions in `groups`, `domains` and `labels`, ascending.
        fraction: to be kept apart.
        seed: of the draw.
        purpose: names the draw.
        groups: of all examples; None if each stands for itself.
        domains: of all examples; None if there is but one.
        labels: of all examples; None where there are none.
    """
    groups, domains, labels = (None if of is None else of[rows] for of in (groups, domains, labels))
    mask, _ = _mask(len(rows), fraction, seed, purpose, groups, domains, labels)
    return rows[~mask], rows[mask]


def own_parts(
    clients: Sequence[Int[np.ndarray, "n"]], split: Split, seed: int, facts: Mapping[str, np.ndarray | None]
) -> tuple[list[Int[np.ndarray, "m"]], dict[str, list[Int[np.ndarray, "k"]]]]:
    """What each client trains on, and by "test" and "validation" what it keeps apart.

    Args:
        clients: positions of each client's examples, ascending.
        split: the shares.
        seed: of the run.
        facts: "groups", "domains" and "labels" of all examples, as for `keep_apart`.
    """
    shares, apart = list(clients), {}
    for part, fraction in (("test", split.client_test), ("validation", split.client_validation)):
        if fraction:
            # The same draw for all: a node that reads its own file does not know whose it is.
            cut = [keep_apart(share, fraction, derive(seed, "own"), part, **facts) for share in shares]
            shares, apart[part] = [kept for kept, _ in cut], [away for _, away in cut]
    return shares, apart


def describe_split(mask: np.ndarray, fraction: float, groups: np.ndarray | None) -> str:
    """What is unusual about a test set that was cut off in whole groups; empty if nothing is.

    Args:
        mask: of the test examples, bool [n].
        fraction: that was asked for.
        groups: group of each example [n], or None.
    """
    if groups is None:
        return ""
    share, number = mask.mean(), len(np.unique(groups[mask]))
    if 0.5 * fraction <= share <= 1.5 * fraction and number > 1:
        return ""
    whose = "all of one group" if number == 1 else f"of {number} groups"
    return (
        f"the test set is {mask.sum():,} of {len(mask):,} examples ({100 * share:.1f}%), {whose}: with whole groups "
        f"(data.group) there is no better way to {100 * fraction:g}%; give data.test, or another data.test_fraction"
    )


def _mask(
    size: int,
    fraction: float,
    seed: int,
    purpose: str,
    groups: np.ndarray | None,
    domains: np.ndarray | None,
    labels: np.ndarray | None,
) -> tuple[np.ndarray, int]:
    """See `split_test`; a mask, bool [n], and how many groups there are."""
    classes = np.zeros(size, dtype=np.int64) if labels is None else labels
    if groups is None:
        first, units = np.arange(size), np.arange(size)
    else:
        _, first, units = np.unique(groups, return_index=True, return_inverse=True)
    counts = np.zeros((len(first), int(classes.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(counts, (units, classes), 1)
    homes = np.zeros(len(first), dtype=np.int64) if domains is None else domains[first]
    chosen = np.zeros(len(first), dtype=bool)
    for home in np.unique(homes):
        generator = np.random.default_rng(derive(seed, purpose, str(home)))
        members = generator.permutation(np.flatnonzero(homes == home))
        take = _examples if groups is None else _groups
        chosen[members[take(counts[members], fraction)]] = True
    return np.asarray(chosen[units]), len(first)


def _examples(counts: Int[np.ndarray, "g c"], fraction: float) -> np.ndarray:
    """Places of the single examples to take: of each class its share, of all at most all but one."""
    sizes = counts.sum(axis=0)
    total = min(round(fraction * len(counts)), len(counts) - 1)
    numbers = largest_remainder(sizes.astype(float), total)
    return np.concatenate([np.flatnonzero(counts[:, k])[:number] for k, number in enumerate(numbers)])


def _groups(counts: Int[np.ndarray, "g c"], fraction: float) -> np.ndarray:
    """Places of the groups to take, at most all but one: no group more, less or exchanged would come nearer."""
    taken = np.zeros(len(counts), dtype=bool)
    lacking = fraction * counts.sum(axis=0)
    for place, group in enumerate(counts):
        # |lacking - group|^2 < |lacking|^2: the group brings the test nearer to what is wanted.
        if group @ group < 2 * (group @ lacking):
            lacking, taken[place] = lacking - group, True
    while (move := _better(counts, taken, lacking)) is not None:
        for place in move:
            lacking = lacking + (counts[place] if taken[place] else -counts[place])
            taken[place] = not taken[place]
    if taken.all():
        taken[int(np.argmin(counts.sum(axis=1)))] = False
    return np.flatnonzero(taken)


def _better(counts: Int[np.ndarray, "g c"], taken: np.ndarray, lacking: np.ndarray) -> tuple[int, ...] | None:
    """The group to take or give back, or the two to exchange, that bring the test nearest; None if none does."""
    now = float(lacking @ lacking)
    signs = np.where(taken, 1.0, -1.0)[:, None]
    single = ((lacking + signs * counts) ** 2).sum(axis=1)
    best = float(single.min())
    move: tuple[int, ...] = (int(single.argmin()),)
    inside, outside = np.flatnonzero(taken), np.flatnonzero(~taken)
    if 0 < len(inside) * len(outside) <= MOST_EXCHANGES:
        pairs = ((lacking + counts[inside][:, None] - counts[outside][None]) ** 2).sum(axis=2)
        if float(pairs.min()) < best:
            one, other = np.unravel_index(int(pairs.argmin()), pairs.shape)
            best, move = float(pairs.min()), (int(inside[one]), int(outside[other]))
    return move if best < now - 1e-9 else None
