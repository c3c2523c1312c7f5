"""The classes that a checkpoint's head was trained for: their names, and the order of its logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from fedlora.assets import Checkpoint

_GENERIC = re.compile(r"LABEL_\d+")  # transformers' own names where a checkpoint gives none


def trained_classes(model: str | Path | Checkpoint) -> tuple[str, ...]:
    """The names in a checkpoint's `id2label`, by number; () where it has none but transformers' LABEL_0, LABEL_1 ...

    Args:
        model: a folder, hub name or checkpoint. One without a readable config gives (): loading the model says why.
    """
    return _trained_classes(Checkpoint.at(model))


@lru_cache(maxsize=4)
def _trained_classes(checkpoint: Checkpoint) -> tuple[str, ...]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options)
        found = getattr(config, "id2label", None) or {}
        names = tuple(str(found[number]) for number in sorted(found))
    except Exception:  # transformers checks configs by classes of its own; loading the model says what is wrong
        return ()
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
