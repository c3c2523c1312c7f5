"""The command line. Nothing heavy is imported before a command needs it: `fedlora --help` answers at once."""

from __future__ import annotations

import os

from fedlora.cli import (  # noqa: F401 each adds its command to the app
    assets,
    audit,
    chat,
    compare,
    config,
    data,
    deploy,
    evaluate,
    export,
    init,
    node,
    partition,
    plan,
    push,
    report,
    run,
    spectrum,
    strategies,
    sweep,
    version,
    worker,
)
from fedlora.cli._common import app

__all__ = ["app", "main"]

QUIET_LIBRARIES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that wait in a busy loop take the cores from the threads of other processes.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment variables that are set unless the user has: they are read when the libraries are imported."""


def main() -> None:
    """Entry point of the `fedlora` command."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    app()
