"""What privacy costs a client: seconds of private training over plain training, the same model, batch and steps.

    python benchmarks/private_step.py                  # batch 32, 10 steps, all-MiniLM-L6-v2
    python benchmarks/private_step.py --batch-size 64 --repeats 7

Both sides run in turn in one process and the ratio is of medians. The sample rate is 1, so that the private batch has
exactly as many examples as the plain one.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import numpy as np
from _shapes import machine

from fedlora.adapter import ALL_PARTS
from fedlora.config import parse_config
from fedlora.privacy.calibrate import Schedule
from fedlora.training.cohort import train
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import train_private
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.job import TrainJob
from fedlora.training.workspace import open_workspace


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    overrides = [
        "adapter.targets=['query','value']",
        "data.limit=2000",
        f"train.steps={args.steps}",
        f"train.batch_size={args.batch_size}",
    ]
    workspace = open_workspace(parse_config("", overrides, name="private-step"))
    b, config = args.batch_size, workspace.config.train
    job = TrainJob(workspace.base.initial_adapter(0), ALL_PARTS, np.arange(b), 0)
    settings = PrivateSettings(Schedule(1.0, args.steps, 1, float(b)), 1.0, 1.0)
    check_model(workspace.base, workspace.task, workspace.data.test, job)
    plain, private = [], []
    for number in range(args.repeats + 1):  # the first is a warm-up
        here = replace(job, seed=number)
        one = train(workspace.base, workspace.task, workspace.data.train, here, config).seconds
        other = train_private(workspace.base, workspace.task, workspace.data.train, here, config, settings).seconds
        if number:
            plain.append(one)
            private.append(other)
    first, second = statistics.median(plain), statistics.median(private)
    print(
        f"{machine()}: {args.steps} steps of batch {b} of real texts, "
        f"kernels {workspace.speedups.kernels.mode}: plain {first:.3f} s, "
        f"private {second:.3f} s, ratio {second / first:.3f} "
        f"(single pairs {min(q / p for p, q in zip(plain, private, strict=True)):.3f} to "
        f"{max(q / p for p, q in zip(plain, private, strict=True)):.3f})"
    )


if __name__ == "__main__":
    main()
