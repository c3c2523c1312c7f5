"""Where a LoRA variant's A and B start from.

Shapes: i = d_in, o = d_out, r = rank. Every start is a function of the seed and of the pristine weight alone, drawn
once, on the server, and shipped.

A start with s B A != 0 (PiSSA, OLoRA) changes what the model says, unless the base gives up what the adapter starts
with. That is `residual`: a base update that takes W0 to W0 - s B0 A0, as version 1 of the base. It travels like any
other update, so that clients need no SVD of their own, whose signs and last bits would differ between machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pair
from fedlora.aggregators import BaseUpdate
from fedlora.errors import ModelError

Weight = Callable[[], Float[Tensor, "o i"]]
"""Gives the pristine weight in float32 or wider."""


def gaussian(shape: PairShape, seed: int, dtype: torch.dtype, _weight: Weight) -> LoraPair:
    """A from N(0, 1 / r²), zero B: PEFT's "gaussian"."""
    A = torch.randn(shape.rank, shape.d_in, generator=torch.Generator().manual_seed(seed)) / shape.rank
    return LoraPair(A.to(dtype), torch.zeros(shape.d_out, shape.rank, dtype=dtype), shape.scale)


def orthogonal(shape: PairShape, seed: int, dtype: torch.dtype, _weight: Weight) -> LoraPair:
    """A = X Q_odd / 10 and B = Y Q_even / 10 with the rows of one orthogonal Q, so that B A = 0: PEFT's "orthogonal".

    Raises:
        ModelError: if the rank is odd.
    """
    if shape.rank % 2:
        raise ModelError(
            f"method 'orthogonal' needs an even rank, not {shape.rank}: change adapter.rank", code="odd-rank"
        )
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(shape.rank, shape.rank, generator=generator, dtype=torch.float64)).Q
    half = shape.rank // 2
    X = torch.randn(shape.d_in, half, generator=generator, dtype=torch.float64)
    Y = torch.randn(shape.d_out, half, generator=generator, dtype=torch.float64)
    return LoraPair((X @ Q[0::2]).T.to(dtype) / 10, (Y @ Q[1::2]).to(dtype) / 10, shape.scale)


def pissa(shape: PairShape, _seed: int, dtype: torch.dtype, weight: Weight) -> LoraPair:
    """s B A is the best rank-r approximation of W: B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T.

    Meng et al. 2024, arXiv 2404.02948, equations (2) and (3).
    """
    U, S, Vh = torch.linalg.svd(weight(), full_matrices=False)
    _require_rank(shape, len(S))
    root = (S[: shape.rank] / shape.scale).sqrt()
    return LoraPair((root[:, None] * Vh[: shape.rank]).to(dtype), (U[:, : shape.rank] * root).to(dtype), shape.scale)


def olora(shape: PairShape, _seed: int, dtype: torch.dtype, weight: Weight) -> LoraPair:
    """B = Q_r [o, r] and A = R_r [r, i] of the QR decomposition W = Q R.

    Büyükakyüz 2024, arXiv 2406.01775, Algorithm 1.
    """
    Q, R = torch.linalg.qr(weight())
    _require_rank(shape, len(R))
    return LoraPair(R[: shape.rank].to(dtype).contiguous(), Q[:, : shape.rank].to(dtype).contiguous(), shape.scale)


def _kaiming(shape: PairShape, seed: int, dtype: torch.dtype, _weight: Weight) -> LoraPair:
    return fresh_pair(shape, seed, dtype)


STARTS: Mapping[str, Callable[[PairShape, int, torch.dtype, Weight], LoraPair]] = {
    "kaiming": _kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}


def residual(adapter: AdapterState) -> tuple[BaseUpdate, ...]:
    """The base update that takes s B A of a starting adapter out of the base; none if the adapter changes nothing."""
    pairs = {
        name: LoraPair(pair.A, -pair.B, pair.scale)
        for name, pair in adapter.pairs.items()
        if not _changes_nothing(pair)
    }
    return (BaseUpdate(0, 1, AdapterState(pairs)),) if pairs else ()


def _changes_nothing(pair: LoraPair) -> bool:
    if not pair.B.any():
        return True
    size = torch.linalg.matrix_norm(pair.A.double()) * torch.linalg.matrix_norm(pair.B.double())
    # B A = 0 by construction ("orthogonal") leaves the rounding of the factors.
    rounding = 64 * torch.finfo(pair.A.dtype).eps * math.sqrt(pair.rank)
    return bool(torch.linalg.matrix_norm(pair.B.double() @ pair.A.double()) <= rounding * size)


def _require_rank(shape: PairShape, most: int) -> None:
    if shape.rank > most:
        raise ModelError(
            f"rank {shape.rank} is larger than a weight of {shape.d_out} x {shape.d_in} can have: lower adapter.rank",
            code="rank-too-large",
        )
