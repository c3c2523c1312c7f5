"""The algebra of low-rank updates: torch only, no files, no network, no model.

Shapes: i = d_in, o = d_out, r = rank of a pair, R = total rank of a stack.
A pair stands for the change of weights  dW = s B A,  with A [r, i], B [o, r] and scale s = alpha / r
(alpha / sqrt(r) for rsLoRA, Kalajdzievski 2023, arXiv 2312.03732). With a core R [r, r] it is  dW = s B R A; R may be
given as the blocks [h, r / h, r / h] of a block-diagonal matrix.
Products of factors are never multiplied out here, except in `LoraPair.delta`, which is for merging into a base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.errors import RuleError, nearest
from fedlora.rng import derive

Part = Literal["A", "B", "R", "dense"]
"""A part of an adapter that can be trained or sent on its own."""
ALL_PARTS: frozenset[Part] = frozenset(("A", "B", "dense"))
"""The parts of an adapter without cores."""
EVERY_PART: frozenset[Part] = ALL_PARTS | {"R"}


@dataclass(frozen=True)
class PairShape:
    """Shape and scale of one pair, without its values: A is [rank, d_in], B is [d_out, rank]."""

    d_out: int
    d_in: int
    rank: int
    scale: float


Layout = Mapping[str, PairShape]
"""What a client's adapter looks like: module name -> shape. Clients with different ranks have different layouts."""


@dataclass(frozen=True)
class LoraPair:
    """One layer's low-rank change of weights, dW = scale * B @ A, or scale * B @ core @ A.

    Args:
        A: down projection, [r, d_in].
        B: up projection, [d_out, r].
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        core: R, [r, r], which is trained between frozen factors, or its blocks [h, r / h, r / h] where it is
            block-diagonal; None: the identity.

    Raises:
        RuleError: if the factors' shapes do not fit each other, or the scale is not finite.
    """

    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    scale: float
    core: Float[Tensor, "r r"] | Float[Tensor, "h q q"] | None = None

    def __post_init__(self) -> None:
        if self.core is not None and not _is_core(self.core.shape, self.A.shape[0]):
            raise RuleError(
                f"a core {tuple(self.core.shape)} does not go between A {tuple(self.A.shape)} and B "
                f"{tuple(self.B.shape)}: it must be [r, r], or [h, r / h, r / h]",
                code="not-a-lora-pair",
            )
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise RuleError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are not a LoRA pair: A must be [r, d_in] and B "
                "[d_out, r]",
                code="not-a-lora-pair",
            )
        if not math.isfinite(self.scale):
            raise RuleError(f"the scale of a LoRA pair must be finite, not {self.scale!r}", code="scale-not-finite")

    @property
    def rank(self) -> int:
        """r, the number of rank-one units (0 for an empty change)."""
        return int(self.A.shape[0])

    @property
    def in_blocks(self) -> bool:
        """Whether the core is given as the blocks of a block-diagonal one."""
        return self.core is not None and self.core.ndim == 3

    @property
    def up(self) -> Float[Tensor, "o r"]:
        """B, or B R."""
        return self.B if self.core is None else times_core(self.B, self.core)

    @property
    def shape(self) -> PairShape:
        """Shape and scale, without the values."""
        return PairShape(int(self.B.shape[0]), int(self.A.shape[1]), self.rank, self.scale)

    def delta(self) -> Float[Tensor, "o i"]:
        """The dense change of weights, in float32 or wider: only for merging into a base."""
        wide = accumulator(self.A.dtype)
        B = self.B.to(wide) if self.core is None else times_core(self.B.to(wide), self.core.to(wide))
        return (B @ self.A.to(wide)) * self.scale


def times_core(B: Float[Tensor, "*k o r"], core: Tensor) -> Float[Tensor, "*k o r"]:
    """B R, with R [*k, r, r] or the blocks [*k, h, r / h, r / h] of a block-diagonal matrix."""
    if core.ndim == B.ndim:
        return B @ core
    blocks = B.view(*B.shape[:-1], *core.shape[-3:-1]).transpose(-3, -2)
    units: Tensor = (blocks @ core).transpose(-3, -2)
    return units.flatten(-2)


def _is_core(shape: Sequence[int], rank: int) -> bool:
    return tuple(shape) == (rank, rank) or (len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] == rank)


@dataclass(frozen=True)
class AdapterState:
    """All that one client trains: low-rank pairs by module name, and dense tensors by parameter name.

    Args:
        pairs: module name -> `LoraPair`.
        dense: parameter name -> tensor, for what is averaged as itself (heads, biases, norms, `modules_to_save`).
    """

    pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", MappingProxyType(dict(self.pairs)))
        object.__setattr__(self, "dense", MappingProxyType(dict(self.dense)))

    def __reduce__(self) -> tuple[type[AdapterState], tuple[dict[str, LoraPair], dict[str, Tensor]]]:
        return AdapterState, (dict(self.pairs), dict(self.dense))

    @cached_property
    def layout(self) -> Layout:
        """Shapes and scales of the pairs."""
        return MappingProxyType({name: pair.shape for name, pair in self.pairs.items()})

    @cached_property
    def _named(self) -> tuple[tuple[str, Part, Tensor], ...]:
        """Name and part of each tensor."""
        found: list[tuple[str, Part, Tensor]] = []
        for name, pair in self.pairs.items():
            found += [(f"{name}:A", "A", pair.A), (f"{name}:B", "B", pair.B)]
            if pair.core is not None:
                found.append((f"{name}:R", "R", pair.core))
        return (*found, *((name, "dense", value) for name, value in self.dense.items()))

    def tensors(self, parts: Iterable[str] = EVERY_PART) -> dict[str, Tensor]:
        """The named tensors of some parts: `"<module>:A"`, `"<module>:B"`, `"<module>:R"` where there are cores, and
        the dense ones by their own name.

        Args:
            parts: of type `Part`, or names of single tensors.
        """
        chosen = set(parts)
        return {name: value for name, part, value in self._named if part in chosen or name in chosen}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> AdapterState:
        """The same adapter with some of its tensors replaced (names as in `tensors`).

        Raises:
            RuleError: if a name is not one of this adapter's.
        """
        unknown = tensors.keys() - self.tensors().keys()
        if unknown:
            raise RuleError(
                f"the adapter has no tensor {min(unknown)!r}; {nearest(min(unknown), self.tensors())}",
                code="no-such-tensor",
            )
        pairs = {
            name: LoraPair(
                tensors.get(f"{name}:A", pair.A),
                tensors.get(f"{name}:B", pair.B),
                pair.scale,
                tensors.get(f"{name}:R", pair.core) if pair.core is not None else None,
            )
            for name, pair in self.pairs.items()
        }
        return AdapterState(pairs, {name: tensors.get(name, value) for name, value in self.dense.items()})

    def plain(self) -> AdapterState:
        """The same change of weights without cores, each B R in the place of B."""
        if all(pair.core is None for pair in self.pairs.values()):
            return self
        return AdapterState({name: LoraPair(p.A, p.up, p.scale) for name, p in self.pairs.items()}, self.dense)

    def nbytes(self, parts: Iterable[str] = EVERY_PART) -> int:
        """Bytes of the chosen parts as they are stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors(parts).values())

    def clone(self) -> AdapterState:
        """A copy that shares no memory with this one."""
        return self.with_tensors({name: value.detach().clone() for name, value in self.tensors().items()})


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which one product of factors is formed: float64 for float64 and float32, float32 for the half types.

    Means over clients are kept in float64 whatever the dtype: see `fedlora.aggregators.WeightedMean`.
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


# ---------------------------------------------------------------------------------------------- fresh pairs


def fresh_pair(shape: PairShape, seed: int, dtype: torch.dtype = torch.float32) -> LoraPair:
    """A new pair as PEFT draws it: Kaiming-uniform A with a = sqrt(5), zero B.

    Hu et al. 2021, arXiv 2106.09685, section 4.1.

    Args:
        shape: of the pair.
        seed: the draw is a function of it alone, the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(shape.d_in)
    A = torch.empty(shape.rank, shape.d_in, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    return LoraPair(A.to(dtype), torch.zeros(shape.d_out, shape.rank, dtype=dtype), shape.scale)


def fresh_pairs(layout: Layout, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, LoraPair]:
    """`fresh_pair` for each module, each from its own key."""
    return {name: fresh_pair(shape, derive(seed, "fresh", name), dtype) for name, shape in layout.items()}
