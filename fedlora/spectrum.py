"""What an update does to a weight's spectrum.

Shapes: i = d_in, o = d_out, m = min(i, o), n = the singular vectors that are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TOP, EPSILON = 10, 0.5
"""How many of the new weight's leading singular vectors are looked at, and below which cosine one is new."""


@dataclass(frozen=True)
class Spectrum:
    """One layer's update.

    Args:
        size: |D| / |W0|, Frobenius norms.
        effective_rank: of D.
        intruders: how many of the leading singular vectors of W0 + D are new.
    """

    size: float
    effective_rank: float
    intruders: int


def spectrum(
    base: Float[Tensor, "o i"], update: Float[Tensor, "o i"], *, top: int = TOP, epsilon: float = EPSILON
) -> Spectrum:
    """Compare a weight before and after an update.

    Args:
        base: W0.
        update: D; the new weight is W0 + D.
        top: see `intruder_dimensions`.
        epsilon: see there.
    """
    base, update = base.double(), update.double()
    return Spectrum(
        size=float(update.norm() / base.norm()),
        effective_rank=effective_rank(torch.linalg.svdvals(update)),
        intruders=intruder_dimensions(base, base + update, top=top, epsilon=epsilon),
    )


def effective_rank(singular_values: Float[Tensor, "m"]) -> float:
    """exp(H(p)) with p = s / sum(s): Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.

    r for r equal values, 1 for a single one, 0 for no update at all.
    """
    values = singular_values.double()
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def intruder_dimensions(
    before: Float[Tensor, "o i"], after: Float[Tensor, "o i"], *, top: int = TOP, epsilon: float = EPSILON
) -> int:
    """How many of the `top` left singular vectors of the new weight are like none of the old one's.

    A singular vector y of the new weight intrudes if max_j |cos(y, x_j)| < epsilon over all left singular vectors x_j
    of the old weight: Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, arXiv
    2410.21228, who look at the first 10. LoRA brings such vectors, full fine-tuning hardly does, and forgetting goes
    with them.

    Args:
        before: the old weight.
        after: the new one.
        top: by singular value; all where there are fewer.
        epsilon: between 0 and 1.
    """
    old = torch.linalg.svd(before.double(), full_matrices=False).U
    new = torch.linalg.svd(after.double(), full_matrices=False).U[:, :top]
    return int(((old.T @ new).abs().amax(dim=0) < epsilon).sum())
