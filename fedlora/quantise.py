"""Eight bits for a number: each row of a matrix in whole multiples of its own step.

Shapes: n = rows, w = width of a row. A row lies along the longer side of a matrix: for a LoRA pair these are A's rows
and B's columns, its rank-one units, so that a step is paid for by hundreds of numbers.

Changes are rounded at random without bias, as in QSGD (Alistarh et al. 2017, arXiv 1610.02132, section 3.1), with the
largest magnitude of a row in place of its norm: q = floor(x / s + u), s = max|x| / 127, u uniform on [0, 1), and
E[s q] = x. Values are rounded to the nearest, by at most s / 2, where s is rounded to bfloat16: s q is then exact in
float32, and what is rounded once is not changed by rounding it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LARGEST = 127
"""Magnitude of the largest code; -128 is not used, so that a negated matrix has the negated codes."""


@dataclass(frozen=True)
class Rows:
    """A matrix in eight bits.

    Args:
        steps: what a code of 1 stands for in each row, [n], float32, not negative.
        codes: whole numbers from -127 to 127, [n, w].
    """

    steps: Float[Tensor, "n"]
    codes: Int8[Tensor, "n w"]


def row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Number and width of the rows of a tensor: all but the first axis are one, and the longer side is the width."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    sides = shape[0], math.prod(shape[1:])
    return min(sides), max(sides)


def quantise(values: Tensor, generator: torch.Generator | None) -> Rows:
    """Round a tensor to eight bits.

    Args:
        values: of any shape, on the CPU; not changed. Values that are not finite give steps that are not.
        generator: on the CPU; the codes are a function of it and the values. None: round to the nearest.
    """
    rows = _as_rows(values.float())
    steps = rows.abs().amax(dim=1) / LARGEST if rows.numel() else rows.new_zeros(rows.shape[0])
    if generator is None:  # below the normal numbers no step has the digits that it needs
        steps = torch.where(steps < torch.finfo(torch.float32).tiny, 0.0, steps.bfloat16().float())
    scaled = rows / torch.where(steps > 0, steps, 1.0)[:, None]
    if generator is None:
        scaled.round_()
    else:
        scaled.add_(torch.rand(rows.shape, generator=generator)).floor_()
    return Rows(steps, scaled.nan_to_num_().clamp_(-LARGEST, LARGEST).to(torch.int8))


def dequantise(rows: Rows, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of a shape that `rows` stands for."""
    values = rows.codes.float() * rows.steps[:, None]
    tall = len(shape) > 1 and shape[0] > math.prod(shape[1:])
    return (values.T if tall else values).reshape(shape)


def _as_rows(values: Tensor) -> Tensor:
    if values.ndim < 2:
        return values.reshape(1, -1)
    matrix = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
