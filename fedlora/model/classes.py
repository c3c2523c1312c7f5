"""The classes that a checkpoint's head was trained for: their names, and the order of its logits."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedlora.assets import Checkpoint, cached_per_checkpoint

_GENERIC = re.compile(r"LABEL_\d+")  # transformers' own names where a checkpoint gives none


@cached_per_checkpoint
def trained_classes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names in a checkpoint's `id2label`, by number; () where it has none but transformers' LABEL_0, LABEL_1 ...

    One without a readable config gives (): loading the model says why.
    """
    found = checkpoint.config_value("id2label") or {}
    names = tuple(str(found[number]) for number in sorted(found))
    return () if all(_GENERIC.fullmatch(name) for name in names) else names


def in_trained_order(names: Sequence[str], trained: Sequence[str]) -> tuple[str, ...] | None:
    """The same names in a checkpoint's order, whatever their case; None where the checkpoint's classes are others."""
    mine = {name.strip().casefold(): name for name in names}
    order = [name.strip().casefold() for name in trained]
    if len(mine) != len(names) or len(order) != len(mine) or set(order) != mine.keys():
        return None
    return tuple(mine[name] for name in order)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the classes are 0, 1, 2 ...: numbers of logits, for which no name has to match."""
    return list(names) == [str(number) for number in range(len(names))]
