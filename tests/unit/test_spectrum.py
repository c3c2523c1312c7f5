from __future__ import annotations

import math

import pytest
import torch

from fedlora.spectrum import effective_rank, intruder_dimensions, spectrum


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()).Q


def test_the_effective_rank_by_hand() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    # Shares 3/4 and 1/4: exp of their entropy.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy))


def test_a_new_direction_that_is_strong_is_an_intruder() -> None:
    # The old weight knows the first 6 directions of 12; the update brings the 9th, above all of them, and the 10th.
    U, V = orthogonal(12, 0), orthogonal(8, 1)
    old = U[:, :6] @ torch.diag(torch.linspace(3, 1, 6).double()) @ V[:, :6].T
    new = 5.0 * torch.outer(U[:, 8], V[:, 6]) + 0.5 * torch.outer(U[:, 9], V[:, 7])
    padded = old + 1e-9 * torch.outer(U[:, 6], V[:, 6]) + 1e-9 * torch.outer(U[:, 7], V[:, 7])
    assert intruder_dimensions(padded, padded + new, top=1) == 1
    assert intruder_dimensions(padded, padded + new, top=7) == 1  # the 10th direction is the weakest, the eighth
    assert intruder_dimensions(padded, padded + new, top=8) == 2
    assert spectrum(padded, new, top=8).intruders == 2


def test_scaling_and_small_changes_bring_nothing_new() -> None:
    base = orthogonal(10, 0) @ torch.diag(torch.linspace(10, 1, 10).double()) @ orthogonal(10, 1)
    assert intruder_dimensions(base, 3 * base) == 0
    small = 1e-3 * torch.randn(10, 10, generator=torch.Generator().manual_seed(2)).double()
    assert intruder_dimensions(base, base + small) == 0
    assert spectrum(base, base, top=5).size == pytest.approx(1)


def test_how_many_are_new_grows_with_the_bar() -> None:
    draw = torch.Generator().manual_seed(3)
    old, new = (torch.randn(20, 12, generator=draw) for _ in range(2))
    found = [intruder_dimensions(old, new, epsilon=bar) for bar in (0.05, 0.3, 0.5, 0.7, 0.999)]
    assert found == sorted(found)
    assert found[-1] == 10
    assert found[0] == 0


def test_turning_the_inputs_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(4)
    base, update = (
        torch.randn(9, 9, generator=draw),
        torch.randn(9, 2, generator=draw) @ torch.randn(2, 9, generator=draw),
    )
    turn = orthogonal(9, 5)
    one, other = spectrum(base, update), spectrum(base.double() @ turn, update.double() @ turn)
    assert one.intruders == other.intruders
    assert one.effective_rank == pytest.approx(other.effective_rank)
    assert one.effective_rank <= 2 + 1e-5  # of rank 2
