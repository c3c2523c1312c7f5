"""How much to train at once: tokens in a joint step, and clients in a cohort.

Both are functions of the config, the data and the machine's size, never of a timing or of the memory that is free at
the moment: other company for a client means other roundings, and a run that is started again must come to the same
bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedlora.devices import train_config
from fedlora.model import Base
from fedlora.training.cohort import why_alone
from fedlora.training.pool import step_budget
from fedlora.training.workbench import Workbench

VARIETY = 4
"""Clients that wait for each that takes part in a step, so that those with texts of like length find each other."""
MOST = 64
COPIES = 8
"""Adapters' worth of memory for a client: values, optimiser's states, gradients, anchor, plan and reply."""
MEMORY_SHARE = 1 / 8


@dataclass(frozen=True)
class CohortChoice:
    """How many clients train at once.

    Attributes:
        clients: K; 1 means one after the other.
        reason: One line, why.
    """

    clients: int
    reason: str


def cohort_size(bench: Workbench, most: int) -> CohortChoice:
    """How many clients of a run train at once in this process.

    Args:
        bench: of the run; its config may say.
        most: as many as a round asks.
    """
    config, base = bench.config, bench.base
    if (alone := why_alone(base)) is not None:
        return CohortChoice(1, f"one after the other: {alone}")
    if config.runtime.cohort != "auto":
        return CohortChoice(config.runtime.cohort, "asked for")
    budget = step_budget(base)
    lengths = bench.data.train.lengths
    typical = float(np.quantile(lengths, 0.9)) if len(lengths) else 1.0  # the longest of a batch sets its length
    clients = len(bench.data.clients)
    rows = float(np.median([train_config(config, k).batch_size for k in range(min(clients, 1000))]))
    in_a_step = int(budget.tokens // (rows * typical))
    if in_a_step < 2:
        return CohortChoice(1, f"one client's {rows:g} x {typical:g} tokens fill a step of {budget.tokens}")
    wanted = in_a_step * (VARIETY if len(np.unique(lengths)) > 1 else 1)
    room = int(MEMORY_SHARE * _memory(base) / (COPIES * base.initial_adapter(config.seed).nbytes()))
    chosen = max(1, min(wanted, room, most, MOST))
    return CohortChoice(chosen, f"{in_a_step} clients of {rows:g} x {typical:g} tokens in a step of {budget.tokens}")


def _memory(base: Base) -> int:
    """Bytes that the machine, or the container, has in all."""
    if base.device.type == "cuda":
        return int(torch.cuda.get_device_properties(base.device).total_memory)
    total = 8 << 30
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(total, int(limit)) if limit.isdecimal() else total
    except OSError:
        return total
