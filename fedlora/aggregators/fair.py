"""LoRA-FAIR: average the factors as FedAvg does, then correct B by a residual towards the ideal update.

Bian, Wang, Zhang, Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement",
ICCV 2025, arXiv 2411.14961, equation (8):

    R = argmin_R  S(D*, (B + R) A) + lambda |R|,      A = sum_k p_k A_k,  B = sum_k p_k B_k;

A and B + R are sent out, the base stays as it is. In the units of D*/s, all that is needed of D* [d_out, d_in] is
C = D* A^T / s = sum_k p_k s_k/s B_k (A_k A^T) [d_out, r] and its norm, so D* is never built. G = A A^T [r, r].

`solver = "closed"`: S is the squared Frobenius distance and the penalty lambda |R|_F^2, a ridge regression with r x r
solves only,

    minimise |D*/s - (B + R) A|_F^2 + lambda |R|_F^2,      R = (C - B G) (G + lambda I)^-1.

lambda is added to the eigenvalues of G: of the correction along a direction of A with squared singular value g, the
part g / (g + lambda) is made. It is therefore not free of units: small or large against |A|^2. For PEFT's Kaiming A, G
is about I/3 whatever d_in is, and the paper's 0.01 keeps 97%.

`solver = "cosine"`: the paper's objective, S = 1 - cos(D*, (B + R) A) over all entries and the penalty lambda |R|_F, by
gradient descent from R = 0 (a random start would stay in the result: the objective is flat in many directions). Here
lambda is measured against the slope of the cosine, about 1 / |B|_F: a correction that gains less than lambda per unit
of |R|_F is not made at all. The cosine does not see lengths, so (B + R) A keeps about the length of B A.

The two agree where they should: as lambda grows both are FedAvg; where FedAvg is exact already (one client, equal
clients) both leave R = 0; at lambda = 0 both turn (B + R) A into the direction of the projection of D* on the row space
of A, which has the largest cosine that any B can reach. In between they weigh different things against R, and differ.

DoRA's magnitude vectors are averaged with the other dense parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import LoraPair
from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    require_same_ranks,
    rules,
)
from fedlora.aggregators._bounds import require_bounds
from fedlora.errors import ConfigError, RuleError
from fedlora.lowrank import DeltaSum, squared_norm, stacks


@final
@rules.register("fair")
@dataclass(frozen=True)
class Fair(Aggregator):
    """A <- sum_k p_k A_k, B <- sum_k p_k B_k + R; dense parts are averaged.

    `aggregate` needs all factors at once (C needs the mean A, known at the end): memory grows with the number of
    clients, up to where a stack is as large as two dense matrices and `DeltaSum` compresses it.

    Metrics, summed over modules: "fair/objective", the minimised value at the result, "fair/regulariser", the penalty
    in it, "fair/objective_before", the value at R = 0, which is FedAvg's; and "fair/correction", |R|_F / |B|_F over all
    modules together.

    Args:
        regularisation: lambda >= 0, against the correction; see above for its units.
        solver: "closed" or "cosine".
        steps: of gradient descent, for "cosine".
        lr: its learning rate.

    Raises:
        ConfigError: if a field is out of its range.
    """

    regularisation: float = 0.01
    solver: Literal["closed", "cosine"] = "closed"
    steps: int = 1000
    lr: float = 0.01

    claims: ClassVar[Claim] = Claim.NONE
    paper: ClassVar[str] = "Bian et al., ICCV 2025, arXiv 2411.14961"

    def __post_init__(self) -> None:
        right = 0 <= self.regularisation < math.inf
        require_bounds("fair", "regularisation", self.regularisation, right, "finite and not negative")
        if self.solver not in ("closed", "cosine"):
            raise ConfigError(f"fair: solver must be 'closed' or 'cosine', not {self.solver!r}", code="unknown-name")
        if self.steps < 0 or not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(
                f"fair: steps must be at least 0 and lr above 0, not {self.steps!r} and {self.lr!r}",
                code="out-of-range",
            )

        if self.solver == "closed" and (self.steps, self.lr) != (Fair.steps, Fair.lr):
            raise ConfigError(
                "fair: steps and lr apply to solver = 'cosine' only, not to 'closed': remove them",
                code="key-without-effect",
            )

    def aggregate(self, state: GlobalState, updates: Iterable[ClientUpdate]) -> GlobalState:
        """Equation (8) for each module.

        Raises:
            RuleError: if there is no update, one does not fit, or the descent diverged.
        """
        mean, ideal = WeightedMean(), DeltaSum()
        for update in updates:
            require_same_ranks(self, state, ClientSpec(update.client_id, update.adapter.layout))
            mean.add(update.adapter.tensors(), update.num_examples)
            ideal.add(update.adapter.pairs, update.num_examples)
        averaged = state.adapter.with_tensors(mean.result(like=state.adapter.tensors()))
        corrected: dict[str, Tensor] = {}
        metrics = dict.fromkeys(("fair/objective", "fair/regulariser", "fair/objective_before"), 0.0)
        moved = size = 0.0
        for name, pair in averaged.pairs.items():
            if pair.scale == 0:
                continue
            terms = [(c / mean.total / pair.scale, theirs) for c, theirs in ideal.pop(name)]
            R, before, after, penalty = self._correct(pair, terms)
            if not math.isfinite(after + penalty):
                raise RuleError(
                    f"fair: gradient descent diverged for {name!r}: lower lr (now {self.lr:g})", code="solver-diverged"
                )
            corrected[f"{name}:B"] = (pair.B.double() + R).to(pair.B.dtype)
            metrics["fair/objective"] += after + penalty
            metrics["fair/regulariser"] += penalty
            metrics["fair/objective_before"] += before
            moved += float(R.square().sum())
            size += float(pair.B.double().square().sum())
        metrics["fair/correction"] = math.sqrt(moved / size) if size else 0.0
        return replace(state, adapter=averaged.with_tensors(corrected), round=state.round + 1, metrics=metrics)

    def _correct(self, pair: LoraPair, terms: list[tuple[float, LoraPair]]) -> tuple[Tensor, float, float, float]:
        """R, and S at R = 0, S at R, and the penalty at R."""
        A, B = pair.A.double(), pair.B.double()
        theirs_B, theirs_A = stacks(terms)
        G, C = A @ A.T, theirs_B @ (theirs_A @ A.T)
        square = squared_norm(theirs_B, theirs_A)
        if self.solver == "closed":
            noise = max(torch.finfo(pair.A.dtype).eps ** 2, torch.finfo(torch.float64).eps)
            R = ridge_residual(B, C, G, self.regularisation, noise)
            penalty = self.regularisation * _inner(R, R)
            before, after = (max(0.0, square - _inner(2 * C - X @ G, X)) for X in (B, B + R))
        else:
            R = cosine_residual(B, C, G, math.sqrt(square), self.regularisation, self.steps, self.lr)
            penalty = self.regularisation * math.sqrt(_inner(R, R))
            before, after = (1.0 - _cosine(X, C, G, math.sqrt(square)) for X in (B, B + R))
        return R, before, after, penalty


def ridge_residual(
    B: Float[Tensor, "o r"], C: Float[Tensor, "o r"], G: Float[Tensor, "r r"], penalty: float, noise: float
) -> Float[Tensor, "o r"]:
    """R = (C - B G) (G + lambda I)^-1, by the eigenvectors of G.

    C - B G = (D*/s - B A) A^T has no part along the null space of A. Leaving that space out therefore gives the
    smallest of all minimisers where G is singular and lambda 0, and changes nothing elsewhere.

    Args:
        B: mean B.
        C: D* A^T / s.
        G: A A^T.
        penalty: lambda.
        noise: eigenvalues of G below this, relative to r times the largest one, are rounding and count as 0.
    """
    values, V = torch.linalg.eigh(G)
    seen = values > noise * len(values) * values.amax()
    inverse = torch.where(seen, 1.0 / torch.where(seen, values + penalty, 1.0), 0.0)
    residual: Tensor = (C - B @ G) @ (V * inverse) @ V.T
    return residual


def cosine_residual(
    B: Float[Tensor, "o r"],
    C: Float[Tensor, "o r"],
    G: Float[Tensor, "r r"],
    target: float,
    penalty: float,
    steps: int,
    lr: float,
) -> Float[Tensor, "o r"]:
    """R after `steps` of gradient descent from zero on 1 - cos(D*, (B + R) A) + lambda |R|_F.

    With X = B + R: <D*, X A> = <C, X> and |X A|^2 = <X G, X>, so a step costs O(d_out r^2). The penalty, which has no
    gradient at its own minimum R = 0, acts by its proximal map: after each step R is shortened by lr lambda. (Its
    gradient, lambda R / |R|_F, would make R jump about zero by lr lambda for ever.) Where D* or X A is zero there is no
    angle and no gradient, and R stays.

    Args:
        B: mean B.
        C: D* A^T / s.
        G: A A^T.
        target: |D*|_F / s.
        penalty: lambda.
        steps: number of steps.
        lr: length of a step.
    """
    R = torch.zeros_like(B)
    for _ in range(steps):
        X = B + R
        XG = X @ G
        square = _inner(XG, X)
        if target == 0.0 or not square > 0.0:
            break
        length = target * math.sqrt(square)
        R = R + lr * (C / length - XG * (_inner(C, X) / (length * square)))
        size = math.sqrt(_inner(R, R))
        if penalty and size:
            R = R * max(0.0, 1.0 - lr * penalty / size)
    return R


def _inner(X: Tensor, Y: Tensor) -> float:
    return float((X * Y).sum())


def _cosine(X: Tensor, C: Tensor, G: Tensor, target: float) -> float:
    """cos(D*, X A); 0 where there is no angle."""
    size = target * math.sqrt(max(_inner(X @ G, X), 0.0))
    return _inner(C, X) / size if size else 0.0
