"""The arms of peers.py: processes that wait for a line and then play a turn, and what they use of the processor."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
PFL = "pfl==0.6.0"
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads would be counted, and steal time
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # its own choice is 15, which counts where others use the cores too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Arm:
    """One way to train a round.

    Args:
        name: for people.
        dtype: of the base.
        group: the processes that it uses; arms may share them.
        turn: what these are told.
    """

    name: str
    dtype: str
    group: Processes
    turn: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.dtype}"


@dataclass
class Processes:
    """Processes that work together; started by `start`, ended by `stop`.

    Args:
        commands: of each, with what its environment has besides.
        log: where their standard error goes.
    """

    commands: list[tuple[list[str], dict[str, str]]]
    log: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)
    start_seconds: float = 0.0

    def start(self) -> None:
        """Start them, and wait until they are ready."""
        begin = time.perf_counter()
        with self.log.open("a") as log:
            for command, extra in self.commands:
                variables = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", **extra}
                pipe = subprocess.PIPE
                self.running.append(
                    subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=variables, cwd=HERE)
                )
        self._wait("@ready")
        self.start_seconds = time.perf_counter() - begin

    def play(self, turn: dict[str, Any]) -> tuple[float, float]:
        """Wall and CPU seconds of one turn of all of them."""
        before, begin = self._cpu(), time.perf_counter()
        for process in self.running:
            assert process.stdin is not None
            process.stdin.write(json.dumps(turn) + "\n")
            process.stdin.flush()
        self._wait("@done")
        wall, after = time.perf_counter() - begin, self._cpu()
        return wall, sum(seconds - before.get(process, 0.0) for process, seconds in after.items())

    def stop(self) -> None:
        """End them and whatever they started."""
        family = [child for process in self.running for child in _family(process.pid)]
        for process in self.running:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.running:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in psutil.wait_procs(family, timeout=5)[1]:
            child.kill()
        self.running.clear()

    def _wait(self, word: str) -> None:
        for process in self.running:
            assert process.stdout is not None
            while (line := process.stdout.readline()).strip() != word:
                if not line:
                    last = (self.log.read_text().strip() or "it said nothing").splitlines()[-1]
                    raise SystemExit(f"{Path(process.args[1]).name} ended: {last}")  # type: ignore[index]

    def _cpu(self) -> dict[psutil.Process, float]:
        seconds = {}
        for member in (member for process in self.running for member in _family(process.pid)):
            try:
                times = member.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds[member] = times.user + times.system
        return seconds


def _family(pid: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def fedlora_processes(folder: Path, processes: int, kernels: str, dtype: str) -> Processes:
    """The server; it trains in one process of two threads, its own, or starts two of one thread."""
    command = [sys.executable, str(HERE / "peer_ours.py"), str(folder), str(processes), kernels, dtype]
    log = folder / f"fedlora-{processes}-{dtype}.log"
    return Processes([(command, {"OMP_NUM_THREADS": "2"})], log)


def flower_processes(folder: Path, clients: int, place: str) -> Processes:
    """The driver; it starts Ray, which starts the actors."""
    command = [sys.executable, str(HERE / "peer_flower.py"), str(folder), str(clients), place]
    return Processes([(command, {"FLWR_HOME": str(folder / "flower")})], folder / "flower.log")


def pfl_processes(folder: Path, clients: int, dtype: str, python: Path) -> Processes:
    """Two processes that know each other."""
    addresses = ",".join(f"127.0.0.1:{_free_port()}" for _ in range(2))
    commands = [
        (
            [str(python), str(HERE / "peer_pfl.py"), str(folder), str(clients), dtype],
            {"PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank), "PYTHONPATH": ""},
        )
        for rank in range(2)
    ]
    return Processes(commands, folder / f"pfl-{dtype}.log")


def pfl_python(folder: Path) -> Path:
    """The interpreter of a virtual environment with pfl; made if it is not there.

    It sees this interpreter's packages too, so that all arms have the same torch; what pfl wants in another version it
    gets in its own.
    """
    import sysconfig

    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(own) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if subprocess.run([str(python), "-c", "import pfl"], capture_output=True, check=False).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PFL], check=True)
    return python


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
