"""Many runs, each once: results go to one JSON-lines file, and a run that is there already is not repeated.

A run's key is a hash of its whole config, so that a change of the setting makes new runs and keeps the old ones.
Processes of one thread each: small matrices gain little from a second thread and much from a second process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fedlora.config import RunConfig


def results(file: Path, runs: Iterable[RunConfig], *, processes: int) -> dict[str, dict[str, Any]]:
    """Do the runs that are missing in `file`.

    Args:
        file: JSON lines, one a run, appended to as runs end.
        runs: resolved configs.
        processes: how many at once.

    Returns:
        `key(config)` -> what `measure` returned, for all of `runs`.
    """
    wanted = {key(config): config for config in runs}
    done = read(file)
    todo = [config.to_toml() for name, config in wanted.items() if name not in done]
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} done already", flush=True)
    started = time.perf_counter()
    if todo:
        file.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(processes) as pool, file.open("a") as out:
            for number, row in enumerate(pool.imap_unordered(measure, todo), 1):
                out.write(json.dumps(row) + "\n")
                out.flush()
                left = (time.perf_counter() - started) / number * (len(todo) - number)
                print(
                    f"{number}/{len(todo)} {row['name']}: {row['accuracy']:.4f}, {left / 60:.0f} min left", flush=True
                )
        done = read(file)
    return {name: done[name] for name in wanted}


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The results in a file, by key; a line that a kill cut short is left out."""
    rows: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["key"]] = row
    return rows


def key(config: RunConfig) -> str:
    """A hash of all of a config but its name, its output folder and the machine."""
    sections = set(RunConfig.model_fields) - {"name", "output", "runtime"}
    return config.digest(*sorted(sections))


def measure(toml: str) -> dict[str, Any]:
    """One run, in a folder that is thrown away: its last figures and the mean aggregation error."""
    from fedlora.config import parse_config
    from fedlora.flower import run_local
    from fedlora.progress import NoProgress
    from fedlora.rundir import RunDir

    config = parse_config(toml)
    with tempfile.TemporaryDirectory() as folder:
        records = run_local(config, RunDir.create(config, folder), NoProgress()).records
    last, rounds = records[-1], records[1:]
    return {
        "key": key(config),
        "name": config.name,
        "accuracy": last["accuracy"],
        "domains": {name: row["accuracy"] for name, row in last.get("domains", {}).items()},
        "aggregation_error": sum(record["aggregation_error"] for record in rounds) / len(rounds),
        "bytes_up": sum(record["bytes_up"] for record in rounds),
        "bytes_down": sum(record["bytes_down"] for record in rounds),
        "seconds": sum(record["seconds"] for record in rounds),
    }


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    mean = sum(values) / len(values)
    square = sum((value - mean) ** 2 for value in values)
    return mean, (square / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0


def best(rows: Mapping[Any, float]) -> Any:
    """The key with the highest value."""
    return max(rows, key=lambda name: rows[name])
