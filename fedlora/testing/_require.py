"""Assertions that say what was expected, with and without pytest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedlora.errors import RuleError


def require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"{message} (a law that the rule breaks on purpose is named in its test's `exempt`)")


def require_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float, what: str) -> None:
    """Same names, and each tensor within `bound` of the expected one's norm (0.0: the same values, all of them)."""
    require(got.keys() == expected.keys(), f"{what}: {sorted(got)} instead of {sorted(expected)}")
    for name, value in got.items():
        wanted = expected[name]
        require(value.shape == wanted.shape, f"{what}: {name} is {tuple(value.shape)}, not {tuple(wanted.shape)}")
        gap, size = float((value.double() - wanted.double()).norm()), float(wanted.double().norm())
        require(gap <= bound * size, f"{what}: {name} differs by {gap:.2e} of {size:.2e}")


def refuses(what: str, call: Any) -> None:
    try:
        call()
    except RuleError:
        return
    raise AssertionError(f"{what} was not refused: RuleError expected")
