"""What a virtual client costs beyond its training: share of a round outside forward, backward and optimiser steps.

    python benchmarks/overhead.py                     # 32 clients, 4 steps of batch 4, all-MiniLM-L6-v2
    python benchmarks/overhead.py --clients 8 --steps 10 --batch-size 16

The seconds inside are measured by the training loop around each step; those of the round by the server, from the first
request to the last reply, checks, aggregation and aggregation error included, evaluation not. Round 1 loads and warms
up, and is not counted.
"""

from __future__ import annotations

import argparse
import tempfile

from _shapes import machine

from fedlora.config import parse_config
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation


def main() -> None:
    """Print one line a round and the share over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--strategy", default="fedavg")
    args = parser.parse_args()
    config = parse_config(
        "",
        [
            f"rounds={args.rounds}",
            f"partition.clients={args.clients}",
            f"train.steps={args.steps}",
            f"train.batch_size={args.batch_size}",
            f"strategy.name={args.strategy}",
            "adapter.targets=['query','value']",
            "data.limit=4000",
            f"evaluation.every={args.rounds}",
            "runtime.processes=1",
        ],
        name="overhead",
    )
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_simulation(config, RunDir.create(config, folder))
    inside = total = 0.0
    print(f"{machine()}: {args.clients} clients, {args.steps} steps of batch {args.batch_size}, rule {args.strategy}")
    for record in outcome.records[2:]:
        compute = sum(client["compute_seconds"] for client in record["clients"].values())
        print(
            f"round {record['round']}: {record['seconds_train']:.2f} s, of which {compute:.2f} s in training steps; "
            f"outside {1 - compute / record['seconds_train']:.1%}"
        )
        inside, total = inside + compute, total + record["seconds_train"]
    print(f"share of a round outside forward, backward and optimiser steps: {1 - inside / total:.1%}")


if __name__ == "__main__":
    main()
