"""How near the dtype and the kernels of each file in configs/ are to the fastest ones on this processor.

    fedlora assets SmolLM2-135M-Instruct chitchat    # and what else the configs name
    python benchmarks/config_choices.py
    python benchmarks/config_choices.py quickstart sentiment_dp
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/config_choices.py

A config is first run to its end, export included, over one round of one step for each client that is asked, with a
fiftieth of the examples to test on. Then a step of its first client is timed with what the config says ("auto" being
what it chose here) and with each other choice: CPU seconds of one thread, after one step that may fill caches the least
of three, or one of a choice that takes four times as long as the config's. It ends with 1 where a config fails, or
takes more than 1.3 times as long as the fastest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from _shapes import machine

from fedlora.adapter import ALL_PARTS
from fedlora.callbacks import Callback
from fedlora.config import RunConfig, load_config
from fedlora.errors import FedloraError
from fedlora.privacy.calibrate import Schedule
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training.cohort import train as train_one
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.job import TrainJob
from fedlora.training.workspace import Workspace, close_workspace, open_workspace

FOLDER = Path(__file__).parents[1] / "configs"
MOST = 1.3
HOPELESS = 4.0
CHOICES = {
    ("float32", "off"): "float32",
    ("float32", "onednn"): "float32, oneDNN",
    ("bfloat16", "off"): "bfloat16",
}
"""model.dtype and runtime.kernels, and what the table calls them."""


def shortened(file: Path, output: str, *more: str) -> RunConfig:
    """A file's config, cut to what can be run in seconds."""
    tested = min(0.02, load_config(str(file)).data.test_fraction)
    less = ["rounds=1", "train.epochs=", "train.steps=1", "evaluation.every=1", f"data.test_fraction={tested}"]
    return load_config(str(file), [*less, "runtime.processes=1", "runtime.threads=1", f"output='{output}'", *more])


def step(workspace: Workspace) -> float:
    """CPU seconds of one step of the first client, with as many examples as its batch has."""
    config, base = workspace.config, workspace.base
    train = config.train_of(0).model_copy(update={"steps": 1, "epochs": None})
    share = workspace.data.clients[0][: train.batch_size]
    job = TrainJob(base.initial_adapter(config.seed), ALL_PARTS, share, 0)
    begin = time.process_time()
    if config.example_privacy is None:
        train_one(base, workspace.task, workspace.data.train, job, train)
    else:
        settings = PrivateSettings(Schedule(1.0, 1, 1, float(len(share))), 1.0, 1.0)
        train_private(base, workspace.task, workspace.data.train, job, train, settings)
    return time.process_time() - begin


def seconds(workspace: Workspace, hopeless: float = float("inf")) -> float:
    """The least of three steps after one that may fill caches; of one where that is not worth repeating."""
    step(workspace)
    second = step(workspace)
    return second if second > hopeless else min(second, step(workspace), step(workspace))


def measured(file: Path, output: str) -> tuple[tuple[str, str], dict[tuple[str, str], float]]:
    """What a config chooses here, and the seconds of each choice that its base can have."""
    config = shortened(file, output)
    run_simulation(config, RunDir.create(config), Callback())
    workspace = open_workspace(config)
    own = (str(workspace.base.dtype).removeprefix("torch."), workspace.speedups.kernels.mode)
    found = {own: seconds(workspace)}
    for dtype, kernels in CHOICES.keys() - {own}:
        close_workspace()
        try:
            workspace = open_workspace(shortened(file, output, f"model.dtype={dtype}", f"runtime.kernels={kernels}"))
            found[dtype, kernels] = seconds(workspace, HOPELESS * found[own])
        except FedloraError as error:
            print(f"  {CHOICES[dtype, kernels]}: {error}", file=sys.stderr)
    close_workspace()
    return own, found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of files in configs/, without .toml; none: all")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    print(
        machine(),
        "\n\n| config | chooses | ms a step | the others, over it | over the fastest |\n|---|---|---|---|---|",
    )
    bad = []
    for file in [FOLDER / f"{name}.toml" for name in names] or sorted(FOLDER.glob("*.toml")):
        with tempfile.TemporaryDirectory() as output:
            try:
                own, found = measured(file, output)
            except FedloraError as error:
                bad.append(file.stem)
                print(f"| {file.stem} | failed: {error} | | | |", flush=True)
                continue
        ratio = found[own] / min(found.values())
        bad += [file.stem] if ratio > MOST else []
        others = (f"{CHOICES[one]} {taken / found[own]:.2f}" for one, taken in sorted(found.items()) if one != own)
        print(
            f"| {file.stem} | {CHOICES[own]} | {1e3 * found[own]:.0f} | {'; '.join(others)} | {ratio:.2f} |", flush=True
        )
    sys.exit(f"failed, or more than {MOST} times as slow as the fastest: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
