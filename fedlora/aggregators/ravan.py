"""RAVAN: Fed-SB with several small cores in the place of a large one, each with a trained factor.

Raje, Askin, Jhunjhunwala, Joshi, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025,
arXiv 2506.05568:

    dW_k = s sum_h f_kh B_h R_kh A_h,    R_h <- sum_k p_k f_kh R_kh,    f_h <- 1,
    so that  s sum_h B_h R_h A_h = sum_k p_k dW_k.

The heads h split the r units of a pair, r / heads to each: [B_1, B_2, ...] is B, and the cores R_h are the blocks of a
block-diagonal one. r² / heads numbers of each module travel, for an update of rank r. The factors f_h are trained with
the blocks, start at 1 in each round and never travel: a client sends the products (`fedlora.training.block_factors`).

The start is Fed-SB's: A's rows and B's columns are orthonormal, over all heads, and the cores are zero. No two heads
share a direction, so that  |dW|² = s² sum_h |f_h R_h|². Descriptions of the paper and implementations by others give
the same start (Gram-Schmidt on random draws, R_h = 0, f_h = 1), and say that the paper compares it with independent
normal draws, constants and a subspace that all heads share. Not verified, since neither the paper's full text nor its
authors' code could be read: whether its vectors have length 1, and which start each of its tables has.

Not from the paper: weights p_k by `server.weighting`; heads of equal size, and one s = alpha / r around all. The paper
lets a weak client train some of its heads alone; here every client trains all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fedlora.adapter import LoraPair
from fedlora.aggregators._base import rules
from fedlora.aggregators._bounds import require_bounds
from fedlora.aggregators.fedsb import Cored
from fedlora.errors import RuleError


@final
@rules.register("ravan")
@dataclass(frozen=True)
class Ravan(Cored):
    """A and B are frozen; the cores of several heads, (r / heads)² each, are averaged, and so are dense parts.

    Args:
        heads: that share the rank of each module, which it divides; 1 or more.

    Raises:
        ConfigError: heads is below 1.
    """

    heads: int = 4

    paper: ClassVar[str] = "Raje et al., NeurIPS 2025, arXiv 2506.05568"

    def __post_init__(self) -> None:
        require_bounds("ravan", "heads", self.heads, self.heads >= 1, "1 or more")

    def core(self, name: str, pair: LoraPair) -> Tensor:
        """Zeros [heads, r / heads, r / heads].

        Raises:
            RuleError: heads does not divide the rank.
        """
        size, left = divmod(pair.rank, self.heads)
        if left:
            raise RuleError(
                f"ravan: {self.heads} heads cannot share the rank {pair.rank} of {name!r}: let strategy.heads divide "
                "adapter.rank and the entries of adapter.rank_pattern",
                code="heads-and-rank",
            )
        return pair.A.new_zeros(self.heads, size, size)
