"""The algebra of low-rank updates: torch only, no files, no network, no model.

Shapes: i = d_in, o = d_out, r = rank of a pair, R = total rank of a stack.
A pair stands for the change of weights  dW = s B A,  with A [r, i], B [o, r] and scale s = alpha / r
(alpha / sqrt(r) for rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
Products of factors are never multiplied out here, except in `LoraPair.delta`, which is for merging into a base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.errors import RuleError, nearest
from fedlora.rng import derive

Part = Literal["A", "B", "dense"]
"""A part of an adapter that can be trained or sent on its own."""
ALL_PARTS: frozenset[Part] = frozenset(("A", "B", "dense"))


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
    """One layer's low-rank change of weights, dW = scale * B @ A.

    Args:
        A: down projection, [r, d_in].
        B: up projection, [d_out, r].
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Raises:
        RuleError: if the factors' shapes do not fit each other, or the scale is not finite.
    """

    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    scale: float

    def __post_init__(self) -> None:
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
    def shape(self) -> PairShape:
        """Shape and scale, without the values."""
        return PairShape(int(self.B.shape[0]), int(self.A.shape[1]), self.rank, self.scale)

    def delta(self) -> Float[Tensor, "o i"]:
        """The dense change of weights, in float32 or wider: only for merging into a base."""
        wide = accumulator(self.A.dtype)
        return (self.B.to(wide) @ self.A.to(wide)) * self.scale


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

    def tensors(self, parts: Iterable[Part] = ALL_PARTS) -> dict[str, Tensor]:
        """The named tensors of some parts: `"<module>:A"`, `"<module>:B"`, and the dense ones by their own name."""
        chosen = set(parts)
        out: dict[str, Tensor] = {}
        for name, pair in self.pairs.items():
            if "A" in chosen:
                out[f"{name}:A"] = pair.A
            if "B" in chosen:
                out[f"{name}:B"] = pair.B
        if "dense" in chosen:
            out.update(self.dense)
        return out

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
            name: replace(pair, A=tensors.get(f"{name}:A", pair.A), B=tensors.get(f"{name}:B", pair.B))
            for name, pair in self.pairs.items()
        }
        return AdapterState(pairs, {name: tensors.get(name, value) for name, value in self.dense.items()})

    def nbytes(self, parts: Iterable[Part] = ALL_PARTS) -> int:
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


# ---------------------------------------------------------------------------------------------- sums in factored form


def stack(terms: Sequence[tuple[float, LoraPair]]) -> LoraPair:
    """sum_k c_k s_k B_k A_k as one pair of rank sum_k r_k and scale 1; coefficient and scale go into A alone.

    FLoRA's stacking (Wang et al. 2024, arXiv 2409.05976, section 3.2): [B_1, B_2, ...] [A_1; A_2; ...] is the sum of
    the products, so a coefficient on both sides would be squared.

    Args:
        terms: coefficient and pair; at least one.

    Returns:
        A [R, i] in float32 or wider (scaling a float16 or bfloat16 factor in its own dtype would round it once more),
        B [o, R] as the clients sent it.

    Raises:
        RuleError: if there is no term.
    """
    if not terms:
        raise RuleError("there is nothing to stack: give at least one LoRA pair", code="no-updates")
    dtype = torch.float32
    for _, pair in terms:
        dtype = torch.promote_types(dtype, pair.A.dtype)
    A = torch.cat([(pair.A.double() * (c * pair.scale)).to(dtype) for c, pair in terms])
    return LoraPair(A, torch.cat([pair.B for _, pair in terms], dim=1), 1.0)


def frobenius(terms: Sequence[tuple[float, LoraPair]]) -> float:
    """|sum_k c_k s_k B_k A_k|_F in float64, from the factors: QR of both stacks, then the norm of a small core.

    Never builds a d_out x d_in matrix. Costs O((d_in + d_out) R^2).
    """
    terms = [(c, pair) for c, pair in terms if pair.rank]
    if not terms:
        return 0.0
    A = torch.cat([pair.A.double() * (c * pair.scale) for c, pair in terms])
    B = torch.cat([pair.B.double() for _, pair in terms], dim=1)
    return float(torch.linalg.matrix_norm(_r_factor(B) @ _r_factor(A.T).T))


def _r_factor(M: Float[Tensor, "d R"]) -> Float[Tensor, "k R"]:
    R: Tensor = torch.linalg.qr(M, mode="r").R
    return R


def compress(pair: LoraPair, rank: int, scale: float = 1.0) -> LoraPair:
    """The best approximation of a pair by one of at most `rank`, in the Frobenius norm (Eckart and Young 1936).

    QR of both factors and the SVD of the small core; U sqrt(S) and sqrt(S) V^T are the new factors, divided so that
    `scale` applies.

    Args:
        pair: the change of weights to approximate.
        rank: of the result; a smaller one is zero-padded up to it, so that the result always has this rank.
        scale: the receiver's own alpha / r.

    Returns:
        Both factors in the wider of the pair's two dtypes.

    Raises:
        RuleError: if `rank` is below 1 or `scale` is 0.
    """
    if rank < 1 or scale == 0:
        raise RuleError(
            f"a pair can be compressed to a rank of 1 or more and a scale other than 0, not to rank {rank} and scale "
            f"{scale}",
            code="out-of-range",
        )
    o, i = pair.B.shape[0], pair.A.shape[1]
    dtype = torch.promote_types(pair.A.dtype, pair.B.dtype)
    A, B = pair.A.new_zeros(rank, i, dtype=dtype), pair.B.new_zeros(o, rank, dtype=dtype)
    if pair.rank:
        QB, RB = torch.linalg.qr(pair.B.double())
        QA, RA = torch.linalg.qr(pair.A.double().T)
        U, S, Vh = torch.linalg.svd(RB @ RA.T * (pair.scale / scale), full_matrices=False)
        k = min(rank, len(S))
        root = S[:k].sqrt()
        A[:k] = (root[:, None] * (Vh[:k] @ QA.T)).to(dtype)
        B[:, :k] = (QB @ U[:, :k] * root).to(dtype)
    return LoraPair(A, B, scale)


class DeltaSum:
    """A running sum of changes of weights in factored form: sum_k c_k s_k B_k A_k for each module.

    The factors are kept as lists; when a module's total rank passes twice min(d_in, d_out), where the factors are no
    smaller than a dense matrix any more, they are compressed exactly (to float64 rounding) to rank min(d_in, d_out).
    Memory is bounded by the layers' shapes, not by the number of clients.
    """

    def __init__(self) -> None:
        self._terms: dict[str, list[tuple[float, LoraPair]]] = {}

    def add(self, pairs: Mapping[str, LoraPair], coefficient: float = 1.0) -> None:
        """Add `coefficient` times the change of each pair; the tensors are kept by reference, not copied."""
        for name, pair in pairs.items():
            terms = self._terms.setdefault(name, [])
            terms.append((coefficient, pair))
            limit = min(pair.B.shape[0], pair.A.shape[1])
            if sum(p.rank for _, p in terms) > 2 * limit:
                A = torch.cat([p.A.double() * (c * p.scale) for c, p in terms])
                B = torch.cat([p.B.double() for _, p in terms], dim=1)
                self._terms[name] = [(1.0, compress(LoraPair(A, B, 1.0), limit))]

    def extend(self, other: DeltaSum) -> None:
        """Add all terms of another sum."""
        for name, terms in other._terms.items():
            for coefficient, pair in terms:
                self.add({name: pair}, coefficient)

    def terms(self, name: str) -> list[tuple[float, LoraPair]]:
        """Coefficients and pairs of one module's sum."""
        return list(self._terms.get(name, ()))

    @property
    def names(self) -> frozenset[str]:
        """Modules with at least one term."""
        return frozenset(self._terms)


def relative_error(actual: DeltaSum, ideal: DeltaSum, weight: float = 1.0) -> float:
    """|D - D*|_F / |D*|_F over all modules together, D* being `ideal` divided by `weight`.

    0 / 0 counts as 0: nothing was asked for, and nothing was done.
    """
    gap = size = 0.0
    for name in sorted(actual.names | ideal.names):  # a set of names has another order in each process
        wanted = [(c / weight, pair) for c, pair in ideal.terms(name)]
        size += frobenius(wanted) ** 2
        gap += frobenius([*actual.terms(name), *((-c, pair) for c, pair in wanted)]) ** 2
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return math.sqrt(gap / size)
