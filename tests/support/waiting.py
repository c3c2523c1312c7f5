"""Wait for what another process or thread does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(holds: Callable[[], object], explain: Callable[[], object] = str, within_s: float = 300.0) -> None:
    """Return as soon as something holds.

    Args:
        holds: Asked again and again.
        explain: What to say where it does not come true.
        within_s: Long enough for a busy machine, seconds.
    """
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"it did not come true within {within_s:g} s: {explain()}"
        time.sleep(0.02)
