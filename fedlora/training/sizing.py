"""How much to train at once: tokens in a joint step, and clients in a cohort.

Both are functions of the config and the machine alone, never of a timing: another company for a client means other
roundings, and a run that is started again must come to the same bytes.
"""

from __future__ import annotations

from fedlora.model import Base
from fedlora.training.pool import Budget

ENTRIES = 786_432
"""Numbers in one activation of a joint step on a CPU, about what its caches hold."""


def step_budget(base: Base) -> Budget:
    """The budget of one joint step, by the width of the adapted layers."""
    width = max(shape.d_in for shape in base.layout().values())
    tokens = max(512, ENTRIES // width)
    return Budget(tokens, tokens // 16)
