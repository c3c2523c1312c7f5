"""Starts a worker again when it dies: at once the first time, then ever later, up to a minute."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

from fedlora.programs import keep_running

WAIT_S = (1.0, 60.0)
"""The first and the longest pause before a restart; it doubles."""
MISTAKE = 1
"""Exit status of a command that said what was wrong: starting it again would say the same."""
PATIENCE_S = 3600.0
"""How long a worker that is asked to end may go on with its present request."""


def supervise(command: Sequence[str], say: Callable[[str], object]) -> int:
    """Keep a command running until SIGTERM or SIGINT.

    Args:
        command: Program and arguments.
        say: Called with a line whenever the program died and is restarted.

    Returns:
        The status with which to exit.
    """
    starts = {"the worker": lambda: subprocess.Popen(command, start_new_session=True)}
    return keep_running(starts, say, pause_s=WAIT_S, final=(0, MISTAKE), grace_s=PATIENCE_S)


def worker_command(socket: str, **options: object) -> list[str]:
    """The command of the worker itself.

    Args:
        socket: Path of its socket.
        options: Of the command line, by name; those that are None are left out.
    """
    more = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "fedlora", "worker", "--socket", socket, *more]
