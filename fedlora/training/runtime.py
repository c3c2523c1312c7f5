"""The machine: device, threads and determinism, set when a workspace is opened, and recorded."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from fedlora.config import RuntimeConfig
from fedlora.errors import ConfigError
from fedlora.model import resolve_device

LARGEST = 32 << 20  # bytes; of a block that glibc can be told to take from its own heap
KEPT = 1 << 30  # bytes; of freed memory that stays with the process


@dataclass(frozen=True)
class Machine:
    """What `setup` chose.

    Args:
        device: on which the base computes.
        threads: of torch.
        usable_cores: on which this process may run.
        omp_wait_policy: OMP_WAIT_POLICY as the environment had it.
        keeps_memory: whether freed memory stays with the process; see `keep_memory`.
        deterministic: whether the device's kernels repeat themselves.
    """

    device: torch.device
    threads: int
    usable_cores: int
    omp_wait_policy: str | None
    keeps_memory: bool
    deterministic: bool

    @property
    def facts(self) -> dict[str, Any]:
        """For the run directory."""
        return {**asdict(self), "device": str(self.device)}


def setup(config: RuntimeConfig) -> Machine:
    """Choose the device, set torch's threads, and make the device's kernels repeat themselves.

    Threads: `runtime.threads`, else the environment's OMP_NUM_THREADS, else the cores that this process may use.
    Waiting threads of two processes on the same cores steal each other's time unless OMP_WAIT_POLICY is PASSIVE. OpenMP
    reads it before torch is imported; it is set here for the processes that this one starts.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    device = resolve_device(config.device)
    threads = config.threads or own_cores()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    kept = keep_memory()
    waits = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; needed by the next line
        # With warn_only torch's fused attention would take its faster backward pass, which does not repeat itself.
        torch.use_deterministic_algorithms(config.deterministic)
        # Nothing here reads what it has not written, and filling it is a kernel for each empty tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return Machine(
        device=device,
        threads=threads,
        usable_cores=usable_cores(),
        omp_wait_policy=waits,
        keeps_memory=kept,
        deterministic=device.type == "cpu" or (device.type == "cuda" and config.deterministic),
    )


def keep_memory() -> bool:
    """Let the C library keep up to a gigabyte of freed memory, as torch itself does on a GPU.

    A training step asks for the same activations as the step before. glibc gives them back to the system in between,
    and each comes again as empty pages that the system has to clear: 3 to 8 % of a small encoder's step.

    Returns:
        Whether that was done: on Linux with glibc, unless the environment already says what glibc shall do.
    """
    said = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))
    if sys.platform != "linux" or said:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    return mallopt is not None and bool(mallopt(mmap_threshold, LARGEST)) and bool(mallopt(trim_threshold, KEPT))


@cache
def pass_over_libraries() -> None:
    """Take what is imported by now, and PEFT and transformers, out of the garbage collector's rounds; once a process.

    They are nine tenths of all objects and live as long as the process. A full collection looks at each of them, a
    quarter of a second every few hundred small clients; without them it takes a millisecond. Call it before the first
    model is loaded: what is passed over is not freed if only the collector could tell that nobody uses it.
    """
    import peft  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    gc.collect()  # or what is garbage now would stay for good
    gc.freeze()


def own_cores() -> int:
    """Cores that this run may count on: as many threads as the environment's OMP_NUM_THREADS allows, or all usable.

    Raises:
        ConfigError: OMP_NUM_THREADS is no number, nor a list of them (of which the first counts here).
    """
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if said and not said.isdecimal():
        raise ConfigError(
            f"OMP_NUM_THREADS is {said!r} in the environment: set it to a number of threads, or unset it",
            code="bad-environment",
        )
    return int(said or 0) or usable_cores()


def usable_cores() -> int:
    """Cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
