"""Which rows of a step are computed together: those of like length, whoever's they are, so that little is padded.

The rows of all clients' current batches are sorted by length and cut into groups, one forward and backward pass each.
More groups pad less, and each costs a pass: the cut is the cheapest by `PassCost`, a function of the model's width and
the kind of device. Nothing is timed: the groups follow from the lengths alone, so that a run repeats bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from fedlora.model import Base
from fedlora.speedups.unpadding import unpads
from fedlora.training.stacked_lora import cannot_stack

ENTRIES = {"cpu": 786_432, "cuda": 4_194_304}
"""Numbers in one activation of a pass: about what a processor's caches hold, or what keeps a GPU busy."""
LAUNCH = {"cpu": 1.5e6, "cuda": 1.5e9}
"""What starting a pass's kernels costs, in tokens times width squared, in which the cost of a token's products grows.

Measured on a CPU, one thread, AVX2 and AVX512 (encoders of widths 64 and 384: 400 and 40 to 50 tokens in all, within
16% of a pass's time); on a GPU it is what 5 microseconds a kernel come to."""
WEIGHTS = 32
"""Tokens whose products take as long as reading the frozen weights does."""
ATTENTION = 6
"""Width of the model times this: tokens of a row at which attention costs as much as all else does."""
UNPADDED = 0.05
"""What a place of padding costs of a token where the layers leave it out: copies for the attention."""


@dataclass(frozen=True)
class PassCost:
    """What a forward and backward pass over some rows costs, in tokens of a wide product.

    Args:
        fixed: of a pass, whatever is in it.
        attention: length at which attention over a row costs as much as all else; `inf`: never.
        most: tokens of a pass, padding included; a single row may have more.
        rows: of a pass, whoever's they are; 0: as many as its tokens allow.
        padding: what a place of padding costs of a token; below 1 the layers leave it out
            (`fedlora.speedups.unpadding`).
    """

    fixed: float
    attention: float
    most: int
    rows: int = 0
    padding: float = 1.0

    def room(self, length: int) -> int:
        """How many rows of a length a pass may have."""
        by_tokens = max(1, self.most // length)
        return min(by_tokens, self.rows) if self.rows else by_tokens


def pass_cost(base: Base) -> PassCost:
    """The costs of a base, by the device and the model's width."""
    kind = base.device.type if base.device.type in ENTRIES else "cpu"
    width = _width(base, kind)
    most = base.pass_tokens or pass_tokens(base, kind)
    launch = LAUNCH[kind] / width**2
    narrow = launch > WEIGHTS  # its passes are launches more than products, and leaving padding out starts more kernels
    padding = UNPADDED if not narrow and leaves_padding_out(base) else 1.0
    return PassCost(WEIGHTS + launch, ATTENTION * width, most, padding=padding)


def leaves_padding_out(base: Base) -> bool:
    """Whether a base's layers do in training: rows of tokens need stacked adapters, and what is kept holds padding."""
    known = base.cache is None and base.coupled is None and base.needs_padding is None
    return known and unpads(base.model) and cannot_stack(base) is None


def pass_tokens(base: Base, kind: str) -> int:
    """Tokens of a pass that a kind of device computes well."""
    return max(512, ENTRIES[kind] // _width(base, kind))


def _width(base: Base, kind: str) -> int:
    """Of hidden states on a GPU, which reads all of a layer's activations from memory; on a CPU, by whose caches
    `ENTRIES` was measured, of the widest input of an adapted layer."""
    if kind != "cpu":
        config: Any = base.model.config
        hidden = getattr(config.get_text_config(), "hidden_size", None)
        if isinstance(hidden, int):
            return hidden
    return max((shape.d_in for shape in base.layout().values()), default=ENTRIES["cpu"] // 512)


def cut(tokens: Int[np.ndarray, "n"], cost: PassCost) -> list[np.ndarray]:
    """The cheapest cut of a step into passes.

    Args:
        tokens: length of each row.
        cost: of a pass.

    Returns:
        Places in `tokens` of each pass, its longest last; passes in ascending order of length.
    """
    tokens = np.maximum(tokens, 1)
    if len(tokens) and (tokens == tokens[0]).all():
        return _even(np.arange(len(tokens)), cost.room(int(tokens[0])))
    order = np.argsort(tokens, kind="stable")
    lengths, firsts = np.unique(tokens[order], return_index=True)
    before = np.array([*firsts, len(order)])  # rows that are shorter
    shorter = np.array([0, *np.cumsum(lengths * np.diff(before))])  # and their tokens
    best, start = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=np.int64)
    for end, length in enumerate(lengths.tolist(), start=1):
        held = before[end] - before[:end]
        passes = np.ceil(held / cost.room(length))
        places, real = held * length, shorter[end] - shorter[:end]
        each = real + cost.padding * (places - real) + places * (length / cost.attention)
        sums = best[:end] + passes * cost.fixed + each
        start[end] = int(sums.argmin())
        best[end] = sums[start[end]]
    found: list[np.ndarray] = []
    ends, end = [*firsts, len(order)], len(lengths)
    while end:
        begin = int(start[end])
        places = order[ends[begin] : ends[end]]
        found[:0] = _even(places, cost.room(int(lengths[end - 1])))
        end = begin
    return found


def _even(places: np.ndarray, room: int) -> list[np.ndarray]:
    """As few passes as there is room for, of like size."""
    return [places] if len(places) <= room else np.array_split(places, -(-len(places) // room))
