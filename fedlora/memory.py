"""How much memory this machine, or its GPU, has and has left; and how wide its numbers are."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch


def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype that a device computes in: Apple's MPS has no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def total_bytes(device: torch.device) -> int:
    """Memory that a GPU, the machine, or the container has in all: the same whatever else runs."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = 8 << 30
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(total, int(limit)) if limit.isdecimal() else total
    except OSError:
        return total


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a device's tensors go; a guess of 4 GiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def give_back() -> None:
    """Give freed memory between what is still held back to the system, where the C library can (glibc on Linux).

    It keeps what many small tensors have left for later ones, which may be too large for the holes.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
