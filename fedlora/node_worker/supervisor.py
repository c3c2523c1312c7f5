"""Starts a worker again when it dies: at once the first time, then ever later, up to a minute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

PARENT = "FEDLORA_WORKER_PARENT"
"""In a worker's environment: the process id of its supervisor, without which it has no business."""
WAIT_S = (1.0, 60.0)
"""The first and the longest pause before a restart; it doubles."""
LIVED_S = 60.0
"""After a life of so many seconds the pauses begin anew."""
MISTAKE = 1
"""Exit status of a command that said what was wrong: starting it again would say the same."""


def supervise(command: Sequence[str], say: Callable[[str], object]) -> int:
    """Keep a command running until SIGTERM or SIGINT.

    Args:
        command: Program and arguments.
        say: Called with a line whenever the program died and is restarted.

    Returns:
        The status with which to exit.
    """
    child: subprocess.Popen[bytes] | None = None
    asked = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        asked.set()
        if child is not None and child.poll() is None:
            child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    pause = WAIT_S[0]
    try:
        while True:
            started = time.monotonic()
            child = subprocess.Popen(command, env={**os.environ, PARENT: str(os.getpid())}, start_new_session=True)
            if asked.is_set():  # while it was being started
                child.terminate()
            status = child.wait()
            if asked.is_set() or status in (0, MISTAKE):
                return 0 if asked.is_set() else status
            if time.monotonic() - started > LIVED_S:
                pause = WAIT_S[0]
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            say(f"the worker {how}; starting it again in {pause:g} s")
            if asked.wait(pause):
                return 0
            pause = min(2 * pause, WAIT_S[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def worker_command(socket: str, device: str | None) -> list[str]:
    """The command of the worker itself."""
    return [sys.executable, "-m", "fedlora", "worker", "--socket", socket, *(("--device", device) if device else ())]


def stop_without_parent(stop: Callable[[], object], every_s: float = 1.0) -> None:
    """In a worker that is supervised: stop when the supervisor is gone, even if it was killed."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(every_s)
        stop()

    threading.Thread(target=watch, daemon=True, name="parent").start()
