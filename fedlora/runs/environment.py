"""What a run depended on besides its config: versions, processor, threads, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedlora import __version__
from fedlora.config import RunConfig
from fedlora.passed_in import copies_in

PACKAGES = ("torch", "transformers", "peft", "flwr", "flwr-datasets", "datasets", "opacus", "numpy", "safetensors")


def describe_environment(config: RunConfig) -> dict[str, Any]:
    """Facts for `environment.json`; no names of people, hosts or folders."""
    return {
        "fedlora": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": config.runtime.threads or torch.get_num_threads(),
        "cuda": _gpu(config.runtime.device),
        "kernels": config.runtime.kernels,
        "cohort": config.runtime.cohort,
        "processes": config.runtime.processes,
        "backend": config.runtime.backend,
        "attention": config.runtime.attention,
        "prefix_cache": config.runtime.prefix_cache,
        "seed": config.seed,
        "passed_in": copies_in(config.model.name, config.data.source, config.data.test),
    }


def _gpu(device: str) -> str | None:
    """The name of the GPU of a run; None where it has none. A run on the CPU does not start CUDA."""
    if not device.startswith(("auto", "cuda")) or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device if ":" in device else None)


@cache
def version_of(name: str) -> str | None:
    """An installed package's version; None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model name, on Linux from the kernel, elsewhere from Python."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instructions() -> str:
    """The vector instructions that torch uses, and bounds that the environment sets to its libraries."""
    bounds = {name: os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")}
    said = [f"{name}={value}" for name, value in bounds.items() if value]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *said])


def _commit() -> str | None:
    """The commit of fedlora's own checkout, with "+changes" if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *command],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()
