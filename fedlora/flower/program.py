"""Runs one of Flower's programs with patient calls: `python -m fedlora.flower.program flower-supernode ...`.

The program, its options and what it does are Flower's own; see `fedlora.flower.patience` for the calls. Besides:

- A SuperNode whose loop or heartbeat has ended stays as a process, offline for ever. Here the process ends with them,
  with status 70, so that whoever started it (`fedlora deploy up`, a container's restart policy) starts it again.
- `--reached FILE` touches a file whenever the SuperLink answers the node, for a health check.
- A SuperExec starts the server's app in the same way.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from fedlora.flower.patience import install

logger = logging.getLogger("flwr")

ENDED = 70
"""Exit status of a SuperNode that has ended by itself."""
MODULE = "fedlora.flower.program"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program that the arguments name."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Run one of Flower's programs.")
    parser.add_argument("--reached", type=Path, help="file to touch whenever the SuperLink answers")
    parser.add_argument("program", choices=["flower-supernode", "flower-superexec", "flwr-serverapp"])
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    install(given.reached)
    (script,) = entry_points(group="console_scripts", name=given.program)
    sys.argv = [given.program, *given.rest]
    if given.program == "flower-superexec":
        _start_server_apps_patiently()
    if given.program == "flower-supernode":
        _run_supernode(script.load())
    script.load()()


def _run_supernode(program: Callable[[], object]) -> NoReturn:
    """Run a SuperNode, and end the process with its loop or one of its threads, of which the heartbeat is one."""

    def hook(died: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(died)
        _end(f"a thread of it died of {died.exc_type.__name__}")

    threading.excepthook = hook
    try:
        program()
    except SystemExit:
        raise  # Flower's own way to end, which stops its threads
    except BaseException:
        logger.exception("the SuperNode's loop raised")
    _end("its loop has ended")


def _end(why: str) -> NoReturn:
    logger.error("the SuperNode ends with status %d, to be started again: %s", ENDED, why)
    logging.shutdown()
    os._exit(ENDED)  # its API's thread would keep the process


def _start_server_apps_patiently() -> None:
    """Of what a SuperExec starts, the server's app calls the SuperLink."""
    from flwr.supercore.superexec.executor import subprocess_executor

    def popen(words: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
        prefix = [sys.executable, "-m", MODULE] if words[0] == "flwr-serverapp" else []
        return subprocess.Popen([*prefix, *words], **how)

    vars(subprocess_executor)["subprocess"] = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
