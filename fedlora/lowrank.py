"""Sums of low-rank changes of weights, and their singular values, without ever building a d_out x d_in matrix.

Shapes: i = d_in, o = d_out, r = rank of a pair, R = total rank of a sum, K = number of sums, k = singular values kept.
A sum  D = sum_k c_k s_k B_k A_k  is a list of coefficients and pairs. Stacked, it is one product [o, R] [R, i]; QR of
both stacks leaves a core of at most R x R, which has the sum's norm and its singular values.

Everything is computed in float64, whatever the dtype of the factors, and rounded once at the end. Singular vectors
have no sign of their own: here the largest entry of each right singular vector is positive, so that a resumed run,
another machine and another order of the terms choose the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import LoraPair, times_core
from fedlora.errors import RuleError

Terms = Sequence[tuple[float, LoraPair]]
"""Coefficients and pairs of a sum: sum_k c_k s_k B_k A_k."""
BLOCK = 256
"""Columns of a symmetric or triangular product that are multiplied at once."""


def stack(terms: Terms) -> LoraPair:
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
    return LoraPair(A, torch.cat([pair.up for _, pair in terms], dim=1), 1.0)


def frobenius(terms: Terms) -> float:
    """|sum_k c_k s_k B_k A_k|_F in float64, from the factors: QR of both stacks, then the norm of a small core.

    Never builds a d_out x d_in matrix. Costs O((d_in + d_out) R^2).
    """
    terms = [(c, pair) for c, pair in terms if pair.rank]
    if not terms:
        return 0.0
    B, A = stacks(terms)
    return float(torch.linalg.matrix_norm(_r_factor(B) @ _r_factor(A.T).T))


def _r_factor(M: Float[Tensor, "d R"]) -> Float[Tensor, "k R"]:
    R: Tensor = torch.linalg.qr(M, mode="r").R
    return R


def stacks(terms: Terms) -> tuple[Float[Tensor, "o R"], Float[Tensor, "R i"]]:
    """The stacks B and A of a sum's factors in float64, coefficients and scales in A: the sum is B A."""
    B = torch.cat([p.B.double() if p.core is None else times_core(p.B.double(), p.core.double()) for _, p in terms], 1)
    return B, torch.cat([pair.A.double() * (c * pair.scale) for c, pair in terms])


def squared_norm(B: Float[Tensor, "o R"], A: Float[Tensor, "R i"]) -> float:
    """|B A|_F^2 = <B^T B, A A^T>, for less than `frobenius` costs.

    It is off by float64's rounding of |B|_F^2 |A|_F^2, and so not for a sum whose terms nearly cancel.
    """
    found = 0.0
    for _, part in _inner_products(B, A):
        found += 2.0 * float(part.sum()) - float(part[:, :BLOCK].sum())
    return max(found, 0.0)


def _inner_products(B: Float[Tensor, "o R"], A: Float[Tensor, "R i"]) -> Iterator[tuple[int, Float[Tensor, "n m"]]]:
    """<b_j a_j, b_k a_k> of single directions, by blocks of rows j from the diagonal on, each with its first row."""
    for k in range(0, len(A), BLOCK):
        yield k, (B[:, k : k + BLOCK].T @ B[:, k:]) * (A[k : k + BLOCK] @ A[k:].T)


def gram(sums: Sequence[Terms]) -> Float[Tensor, "K K"]:
    """Inner products <D_a, D_b> of sums, float64: those of two pairs are s_i s_j sum((B_i^T B_j) * (A_i A_j^T)).

    A pair that occurs in several sums (a common start) is multiplied once. Costs O((d_in + d_out) R^2).
    """
    pairs = {id(pair): pair for terms in sums for _, pair in terms if pair.rank}
    if not pairs:
        return torch.zeros(len(sums), len(sums), dtype=torch.float64)
    place = {key: number for number, key in enumerate(pairs)}
    B, A = stacks([(1.0, pair) for pair in pairs.values()])
    owner = torch.tensor([place[key] for key, pair in pairs.items() for _ in range(pair.rank)])
    units = torch.empty(len(A), len(A), dtype=torch.float64)
    for k, part in _inner_products(B, A):
        units[k : k + BLOCK, k:] = part
        units[k + BLOCK :, k : k + BLOCK] = part[:, BLOCK:].T
    rows = torch.zeros(len(pairs), units.shape[1], dtype=torch.float64).index_add_(0, owner, units)
    inner = torch.zeros(len(pairs), len(pairs), dtype=torch.float64).index_add_(1, owner, rows)
    weights = torch.zeros(len(sums), len(pairs), dtype=torch.float64)
    for number, terms in enumerate(sums):
        for c, pair in terms:
            if pair.rank:
                weights[number, place[id(pair)]] += c
    return weights @ inner @ weights.T


# ---------------------------------------------------------------------------------------------- singular values


class Svd(NamedTuple):
    """Singular values and vectors of a sum, D = U diag(S) Vh; float64, values descending.

    A value at the level of float64's rounding of the terms is zero: what is left where terms cancel is no direction.
    """

    U: Float[Tensor, "o k"]
    S: Float[Tensor, "k"]
    Vh: Float[Tensor, "k i"]

    @property
    def rank(self) -> int:
        """How many values are not zero."""
        return int((self.S > 0).sum())

    def part(self, start: int) -> Svd:
        """The values from `start` on."""
        return Svd(self.U[:, start:], self.S[start:], self.Vh[start:])

    def pair(
        self,
        rank: int,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
        split: Literal["root", "left"] = "root",
        idle: Float[Tensor, "r i"] | None = None,
    ) -> LoraPair:
        """The best approximation of rank `rank`, in the Frobenius norm (Eckart and Young 1936), as a pair.

        Args:
            rank: of the pair; where there are fewer singular values it is padded.
            scale: of the pair.
            dtype: of the factors.
            split: "root" for B = U sqrt(S), A = sqrt(S) Vh, or "left" for B = U S, A = Vh; over `scale`.
            idle: rows of A for the units whose singular value is zero, so that a pair that is trained on has gradients
                in all of its units: with A = 0 and B = 0 a unit would have none, ever. Default: zeros.

        Raises:
            RuleError: if `rank` is below 1 or `scale` is 0.
        """
        if rank < 1 or scale == 0:
            raise RuleError(
                f"a pair can be compressed to a rank of 1 or more and a scale other than 0, not to rank {rank} and "
                f"scale {scale}",
                code="out-of-range",
            )
        k = min(rank, len(self.S))
        U, S, Vh = self.U[:, :k], self.S[:k], self.Vh[:k]
        A = self.Vh.new_zeros(rank, Vh.shape[1]) if idle is None else idle.double().clone()
        B = self.U.new_zeros(U.shape[0], rank)
        left = S / abs(scale) if split == "left" else (S / abs(scale)).sqrt()
        A[:k] = Vh if split == "left" else left[:, None] * Vh
        B[:, :k] = U * left * math.copysign(1.0, scale)
        if idle is not None:
            A[self.rank :] = idle[self.rank :].double()
        return LoraPair(A.to(dtype), B.to(dtype), scale)


def rank_of_energy(S: Float[Tensor, "k"], energy: float) -> int:
    """The smallest k >= 1 whose first k values hold the share `energy` of sum_i sigma_i^2; all that are not 0 at 1."""
    squares, rank = S.square(), int((S > 0).sum())
    reached = squares.cumsum(0) >= energy * squares.sum()
    return max(1, rank if energy >= 1 else min(rank, int((~reached).sum()) + 1))


LARGE = 512
"""Total rank above which the largest values of a sum are found by the eigenvectors of its core."""


def svd(terms: Terms, keep: int | Callable[[Float[Tensor, "k"]], int] | None = None) -> Svd:
    """The singular values of a sum that are not zero by its shape, at most min(R, o, i); QR of both stacks.

    Args:
        terms: the sum.
        keep: how many of the largest values are wanted, a number or a function of all of them; None: all. Above a
            total rank of `LARGE` that takes half the time, by the eigenvectors of the core times its transpose: what is
            kept is the projection on these, with an error at float64's level, and values below 1e-7 of the largest
            count as zero.
    """
    B, A = stacks(terms)
    if not len(A):
        return Svd(B, B.new_zeros(0), A)
    size = float(B.norm() * A.norm())
    if keep is not None and len(A) > LARGE:
        return _signed(*_largest(B, A, keep), size)
    left, right = torch.geqrf(B), torch.geqrf(A.T)
    U, S, Vh = torch.linalg.svd(_triangle(left) @ _triangle(right).T, full_matrices=False)
    count = _count(S, keep)
    return _signed(_times_q(left, U[:, :count]), S[:count], _times_q(right, Vh[:count].T).T, size)


def _largest(
    B: Float[Tensor, "o R"], A: Float[Tensor, "R i"], keep: int | Callable[[Float[Tensor, "k"]], int]
) -> tuple[Float[Tensor, "o k"], Float[Tensor, "k"], Float[Tensor, "k i"]]:
    """The largest singular values of B A: with B = Q R, the eigenvectors of (R A)(R A)^T are left ones in the basis Q.

    R is the Cholesky factor of B^T B where the columns of B are far from dependent, so that Q = B R^-1 is orthonormal
    at float64's level; where clients send much the same, it comes from Householder's QR, which takes longer.
    """
    factored: tuple[Tensor, Tensor] | None = None
    L, failed = torch.linalg.cholesky_ex(_lower(B.T))
    sizes = L.diagonal()
    if B.shape[0] < B.shape[1] or bool(failed) or not 1e-2 * sizes.max() < sizes.min():
        factored = torch.geqrf(B)
        L = _triangle(factored).T
    columns = range(0, L.shape[1], BLOCK)
    core = torch.cat([L[k:, k : k + BLOCK].T @ A[k:] for k in columns])
    squares, vectors = torch.linalg.eigh(_lower(core))
    S = squares.flip(0).clamp(min=0.0).sqrt()
    S = torch.where(1e-7 * S[0] < S, S, 0.0)
    U = vectors.flip(1)[:, : _count(S, keep)]
    Vh = U.T @ core
    S = torch.where(S[: len(Vh)] > 0, Vh.norm(dim=1), 0.0)
    Q_U = B @ torch.linalg.solve_triangular(L.T, U, upper=True) if factored is None else _times_q(factored, U)
    return Q_U, S, Vh / torch.where(S > 0, S, 1.0)[:, None]


def _lower(X: Float[Tensor, "k n"]) -> Float[Tensor, "k k"]:
    """X X^T, of which only the blocks on and below the diagonal are computed."""
    square = X.new_zeros(len(X), len(X))
    for k in range(0, len(X), BLOCK):
        square[k:, k : k + BLOCK] = X[k:] @ X[k : k + BLOCK].T
    return square


def _count(S: Float[Tensor, "k"], keep: int | Callable[[Float[Tensor, "k"]], int] | None) -> int:
    if keep is None:
        return len(S)
    return keep if isinstance(keep, int) else keep(S)


def _triangle(factored: tuple[Tensor, Tensor]) -> Float[Tensor, "k n"]:
    """R of a matrix that `torch.geqrf` factored."""
    return factored[0][: min(factored[0].shape)].triu()


def _times_q(factored: tuple[Tensor, Tensor], X: Float[Tensor, "k n"]) -> Float[Tensor, "d n"]:
    """Q X of a matrix that `torch.geqrf` factored."""
    H, tau = factored
    if H.shape[0] < H.shape[1]:
        found: Tensor = torch.linalg.householder_product(H[:, : min(H.shape)], tau) @ X
        return found
    return torch.ormqr(H, tau, torch.cat([X, X.new_zeros(H.shape[0] - len(X), X.shape[1])]))


def randomised_svd(terms: Terms, rank: int, seed: int, *, extra: int = 16, turns: int = 2) -> Svd:
    """The first `rank` singular values, from a random range of rank + extra directions: for sums of many clients.

    Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1. Without any turn, the expected error of
    the range is at most sqrt(1 + rank / (extra - 1)) times the best error of that rank in the Frobenius norm (theorem
    10.5): 1.44 at rank 16; each turn raises the singular values that separate range and rest to a power of two more
    (theorem 10.7 for the spectral norm). Costs O((d_in + d_out) R (rank + extra)) where `svd` costs
    O((d_in + d_out) R^2 + R^3).

    Args:
        terms: the sum.
        rank: number of singular values.
        seed: of the random directions; the result is a function of it.
        extra: directions beside `rank`; at least 2.
        turns: power iterations.
    """
    B, A = stacks(terms)
    size = min(rank + extra, *B.shape, *A.shape)
    generator = torch.Generator().manual_seed(seed)
    Q = B @ (A @ torch.randn(A.shape[1], size, generator=generator, dtype=torch.float64))
    for _ in range(turns):
        Q = torch.linalg.qr(A.T @ (B.T @ torch.linalg.qr(Q).Q)).Q
        Q = B @ (A @ Q)
    Q = torch.linalg.qr(Q).Q
    U, S, Vh = torch.linalg.svd((Q.T @ B) @ A, full_matrices=False)
    return _signed((Q @ U)[:, :rank], S[:rank], Vh[:rank], float(B.norm() * A.norm()))


def _signed(U: Tensor, S: Tensor, Vh: Tensor, size: float) -> Svd:
    """With the signs fixed, and without what rounding left; `size` bounds the terms."""
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(Vh)
    noise = 8 * torch.finfo(torch.float64).eps * size
    return Svd(U * signs.T, torch.where(noise < S, S, 0.0), Vh * signs)


def compress(pair: LoraPair, rank: int, scale: float = 1.0) -> LoraPair:
    """The best approximation of a pair by one of at most `rank`; its factors are U sqrt(S) and sqrt(S) V^T.

    Args:
        pair: the change of weights to approximate.
        rank: of the result; a smaller one is zero-padded up to it, so that the result always has this rank.
        scale: the receiver's own alpha / r.

    Returns:
        Both factors in the wider of the pair's two dtypes.

    Raises:
        RuleError: if `rank` is below 1 or `scale` is 0.
    """
    return svd([(1.0, pair)], rank).pair(rank, scale, torch.promote_types(pair.A.dtype, pair.B.dtype))


# ---------------------------------------------------------------------------------------------- running sums


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
                self._terms[name] = [(1.0, svd(terms).pair(limit))]

    def extend(self, other: DeltaSum) -> None:
        """Add all terms of another sum."""
        for name, terms in other._terms.items():
            for coefficient, pair in terms:
                self.add({name: pair}, coefficient)

    def terms(self, name: str) -> list[tuple[float, LoraPair]]:
        """Coefficients and pairs of one module's sum."""
        return list(self._terms.get(name, ()))

    def pop(self, name: str) -> list[tuple[float, LoraPair]]:
        """The same, which this sum then no longer holds: for a result that grows as its terms are let go of."""
        return self._terms.pop(name, [])

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
