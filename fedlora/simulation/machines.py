"""Machines on which processes train, and how many of these have room there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One machine.

    Args:
        cores: that processes may use.
        gpus: that they may use.
    """

    cores: int
    gpus: int = 0


def room(machines: Sequence[Machine], threads: int, *, gpus: bool) -> int:
    """How many processes have room.

    Args:
        machines: where; a process is on one of them.
        threads: of a process, each of which has a core.
        gpus: whether each needs a GPU as well.
    """
    return sum(min(m.cores // threads, m.gpus) if gpus else m.cores // threads for m in machines)


def most_threads(machines: Sequence[Machine], processes: int, *, gpus: bool) -> int:
    """With how many threads each so many processes have room; 1 where there is none."""
    largest = max((machine.cores for machine in machines), default=1)
    return next((t for t in range(largest, 1, -1) if room(machines, t, gpus=gpus) >= processes), 1)
