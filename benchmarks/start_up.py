"""Where the time goes from the command to its first training figure, with a cold and a warm cache.

    python benchmarks/start_up.py                                    # the quickstart, its processes as it chooses them
    python benchmarks/start_up.py --config fedavg --set runtime.processes=1

Each arm is a process of its own that stops after the first round. Cold: a cache folder that has the assets alone, as
after `fedlora assets`; warm: the same folder again. CPU seconds are those of the server's process; the clock's, up to
the end of a phase, have the others in them. Model and texts may be in the system's file cache in both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN = time.time(), time.process_time()
PHASES = ("imports", "texts", "model", "kernels, trials", "pool, folder", "base model evaluated", "first round")


def trace(config: str, overrides: list[str]) -> None:
    """Run until the first training figure; print the end of each phase in seconds of the clock and of CPU."""
    from fedlora import data
    from fedlora.api import train
    from fedlora.callbacks import Callback
    from fedlora.config import load_config
    from fedlora.federation import server
    from fedlora.training import workspace

    ends: dict[str, tuple[float, float]] = {}

    def end(phase: str) -> None:
        ends[phase] = time.time() - BEGIN[0], time.process_time() - BEGIN[1]

    def traced(module: Any, name: str, phase: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def run(*args: Any, **more: Any) -> Any:
            found = real(*args, **more)
            end(phase)
            return found

        setattr(module, name, run)

    class FirstRound(Callback):
        def started(self, *_: Any) -> None:
            end("pool, folder")

        def round_ended(self, record: Any) -> None:
            end("first round" if record["round"] else "base model evaluated")
            if record["round"]:
                raise KeyboardInterrupt

    traced(data, "load_data", "texts")
    traced(workspace, "load_base", "model")
    traced(workspace, "install", "kernels, trials")
    assert server  # imported before the clock of the first phase stops, as the command does
    end("imports")
    try:
        train(load_config(config, overrides), FirstRound(), overwrite=True)
    except KeyboardInterrupt:
        print(json.dumps(ends))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as of fedlora run")
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trace:
        trace(args.config, args.set)
        return
    from _shapes import machine

    from fedlora.files import cache_dir

    arms: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        (cache / "assets").symlink_to(cache_dir() / "assets")
        command = [sys.executable, __file__, "--trace", "--config", args.config]
        for arm in ("cold", "warm"):
            words = [*command, "--set", *args.set, f"output={folder}/runs"]
            environment = {**os.environ, "FEDLORA_CACHE": str(cache)}
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            arms[arm] = json.loads(done.stdout.splitlines()[-1])
    print(machine())
    print(f"\n| {args.config} | {' | '.join(f'{arm}: CPU | ends at' for arm in arms)} |")
    print("|---|" + "---|---|" * len(arms))
    before = dict.fromkeys(arms, 0.0)
    for phase in PHASES:
        cells = []
        for arm, ends in arms.items():
            clock, cpu = ends[phase]
            cells.append(f"{cpu - before[arm]:.1f} s | {clock:.1f} s")
            before[arm] = cpu
        print(f"| {phase} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
