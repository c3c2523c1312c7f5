"""What the numbers of a rule may be."""

from __future__ import annotations

import math

from fedlora.errors import ConfigError


def require_bounds(rule: str, name: str, value: float | None, inside: bool, wanted: str) -> None:
    """Raise `ConfigError` unless a rule's field is `inside` of what is `wanted`, in words."""
    if not inside:
        raise ConfigError(f"{rule}: {name} must be {wanted}, not {value!r}", code="out-of-range")


def require_positive(rule: str, **fields: float | None) -> None:
    """Raise `ConfigError` for a field that is neither None nor positive and finite."""
    for name, value in fields.items():
        require_bounds(rule, name, value, value is None or 0 < value < math.inf, "positive and finite")


def require_energy(rule: str, energy: float) -> None:
    """Raise `ConfigError` unless a share of sum_i sigma_i^2 is above 0 and at most 1."""
    require_bounds(rule, "energy", energy, 0 < energy <= 1, "above 0 and at most 1")
