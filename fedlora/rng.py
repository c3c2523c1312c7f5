"""Randomness is an argument: every random draw in a run comes from a key that names it.

A key is the run's seed plus words and numbers ("train", round, client); two engines, a resumed run and a real
deployment draw the same numbers because they name the same key, whatever ran before them in the process.
Noise for differential privacy never comes from here (see `fedlora.privacy`).
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *key: str | int) -> int:
    """A 63-bit seed for one purpose.

    Args:
        seed: the run's seed.
        key: what the draw is for, for example `("batches", round, client)`.

    Example:
        >>> derive(0, "init") == derive(0, "init"), derive(0, "init") == derive(1, "init")
        (True, False)
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
