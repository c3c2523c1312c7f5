"""What it is worth to train many clients at once through one frozen base: every client's result checked, then timed.

    python benchmarks/cohort.py                               # the encoder, float32, batch 4
    python benchmarks/cohort.py --shape llama --dtype bfloat16
    python benchmarks/cohort.py --private --batch-size 1
    python benchmarks/cohort.py --top 2                       # adapters in the upper two layers
    python benchmarks/cohort.py --texts corpus --batch-size 16

Random weights, random texts of a fixed length or of the quickstart's lengths (--texts corpus), LoRA of rank 8 on query
and value with a trained head, AdamW, one thread.
First each client's adapter is compared with the one that it gets alone (row 0). Then all arms take turns in one
process; the table gives medians of CPU milliseconds for a client, and ratios to the first arm. The arms change one
thing after another: PEFT and torch in a plain loop; the same with the kernels that the engine uses; the engine, one
client at a time, which leaves out padding and what no head reads of an encoder's last layer; the engine, all together.
With --private the first arm is Opacus, client by client and with the whole last layer; the engine's own plain step is
beside it. All arms keep the memory that they free (`fedlora.training.runtime.keep_memory`).

The last column is the share of the fastest matrix product of this process and dtype, timed in the same turns, that an
arm reaches with its matrix products alone: forward and the gradients of inputs, the adapters' own, nothing else. With
--top, products that a kept prefix saves count as done.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _peak import best_product, flop_of
from _shapes import CLASSES, SHAPES, TEXTS, VOCABULARY, auto_class, causal, lengths, machine, targets, write_model

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.model import Base, load_base
from fedlora.model.dropout import set_dropout
from fedlora.privacy.calibrate import Schedule
from fedlora.speedups.activation_cache import prepare
from fedlora.speedups.attention import choose_attention
from fedlora.speedups.cache_choice import choose_cache
from fedlora.speedups.last_layer import restore_unread, skip_unread
from fedlora.speedups.linear_kernels import accelerate
from fedlora.tasks import Examples, Task, load_task
from fedlora.tasks._text import Tokens
from fedlora.training.cohort import train, train_cohort
from fedlora.training.dp_loop import train_private_cohort
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.job import TrainJob, batches, rows_of
from fedlora.training.opacus_loop import train_by_opacus
from fedlora.training.row_groups import pass_cost
from fedlora.training.runtime import keep_memory


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="encoder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--texts", choices=TEXTS, default="fixed", help="their lengths")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, help="of each client; by the shape if not given")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--top", type=int, help="adapters in so many upper layers; arms with chosen kernels keep what is below"
    )
    parser.add_argument("--private", action="store_true")
    return parser.parse_args()


def random_model(shape: str, dtype: str, dropout: float, top: int | None, folder: Path) -> tuple[Base, Task]:
    """A base of random weights, with its task."""
    write_model(shape, folder)
    run = RunConfig(
        model=ModelConfig(name=str(folder), dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(rank=8, targets=targets(shape), layers=None if top is None else f"top:{top}"),
        runtime=RuntimeConfig(device="cpu"),
    )
    base = load_base(run, auto_class(shape), () if causal(shape) else ("classifier",), {})
    set_dropout(base.model, dropout)
    return base, load_task(OpenTable(name="causal-lm" if causal(shape) else "text-classification"))


def random_texts(count: int, shape: str, texts: str) -> Examples:
    """Texts of random tokens and classes."""
    draw = np.random.default_rng(0)
    rows = Tokens.join([draw.integers(1, VOCABULARY, length) for length in lengths(texts, shape, count)], 0)
    if causal(shape):
        return Examples({"input_ids": rows, "labels": replace(rows, pad_id=-100)}, None, rows.lengths)
    return Examples({"input_ids": rows}, draw.integers(0, CLASSES, count), rows.lengths)


def plain_loop(base: Base, task: Task, examples: Examples, job: TrainJob, config: TrainConfig) -> AdapterState:
    """PEFT's layers, torch's optimiser, one client: what a lean program does."""
    parameters = base.write(job.adapter, job.trains)
    base.train_mode(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    for chosen in batches(job.indices, config.batch_size, config.steps or 1, job.seed):
        task.losses(base.model, task.collate(examples, chosen)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return base.read()


def farthest(one: Sequence[AdapterState], other: Sequence[AdapterState]) -> float:
    """The largest difference between any two entries."""
    return max(
        float((value - second.tensors()[name]).abs().max())
        for first, second in zip(one, other, strict=True)
        for name, value in first.tensors().items()
    )


def main() -> None:
    """Print a table."""
    args = arguments()
    torch.set_num_threads(1)
    keep_memory()
    size = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as folder:
        base, task = random_model(args.shape, args.dtype, args.dropout, args.top, Path(folder))
        base.fingerprint  # noqa: B018 (reads the folder while it is there)
    examples = random_texts(args.clients * 64, args.shape, args.texts)
    config = TrainConfig(steps=args.steps or size["steps"], batch_size=args.batch_size, lr=1e-3)
    start = base.initial_adapter(0)
    jobs = [TrainJob(start, ALL_PARTS, np.arange(64 * k, 64 * k + 64), k) for k in range(args.clients)]
    configs = [config] * len(jobs)
    rate = args.batch_size / 64
    settings = PrivateSettings(Schedule(rate, config.steps or 1, 1, float(args.batch_size)), 1.0, 1.0)

    def set_up(fast: bool, engine: bool) -> None:
        (skip_unread if engine else restore_unread)(base.model)
        accelerate(base.model, "onednn" if fast and args.dtype == "float32" else "off")
        choose_attention(base.model, "auto" if fast or engine else "sdpa")
        if args.top is not None:
            choose_cache(base, task, [examples], "on" if fast else "off")
            prepare(base, task, examples, rows_of(jobs, configs))  # in a run, the first round does that

    def loop() -> Any:
        return [plain_loop(base, task, examples, job, config) for job in jobs]

    def opacus() -> Any:
        return [train_by_opacus(base, task, examples, job, config, settings) for job in jobs]

    def alone() -> Any:
        return [train(base, task, examples, job, config) for job in jobs]

    def cohort() -> Any:
        return train_cohort(base, task, examples, jobs, configs)

    def padded() -> Any:
        return train_cohort(base, task, examples, jobs, configs, cost=replace(pass_cost(base), padding=1.0))

    def private() -> Any:
        return train_private_cohort(base, task, examples, jobs, configs, [settings] * len(jobs))

    arms: dict[str, tuple[bool, Callable[[], Any]]] = {
        "PEFT, plain loop, torch's kernels": (False, loop),
        "PEFT, plain loop, chosen kernels": (True, loop),
        "engine, one by one, torch's kernels": (False, alone),
        "engine, one by one, chosen kernels": (True, alone),
        "engine, together, padding too, torch's kernels": (False, padded),
        "engine, together, torch's kernels": (False, cohort),
        "engine, together, chosen kernels": (True, cohort),
    }
    if args.private:
        arms = {
            "Opacus, client by client, torch's kernels": (False, opacus),
            "Opacus, client by client, chosen kernels": (True, opacus),
            "engine, private, together, torch's kernels": (False, private),
            "engine, private, together, chosen kernels": (True, private),
            "engine, plain, together, chosen kernels": (True, cohort),
        }
    else:
        set_up(False, False)
        reference = loop()
        set_up(False, True)
        gap = farthest(reference, [result.adapter for result in cohort()])
        print(f"farthest from the plain loop: {gap:.1e} ({args.dtype}; the tests hold float64 to 1e-10)")
    work = {}
    for engine in (False, True):
        set_up(False, engine)
        choose_attention(base.model, "auto")
        with patch.dict(
            "fedlora.speedups.attention.SHORT", {("cpu", base.dtype): size["tokens"]}
        ):  # products that are counted
            work[engine] = flop_of(lambda: plain_loop(base, task, examples, jobs[0], config)) * len(jobs)
    product = best_product(getattr(torch, args.dtype))
    peaks: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats + 1):  # the first one warms up
        if repeat:
            peaks.append(product.rate())
        for name, (fast, run) in arms.items():
            set_up(fast, name.startswith("engine"))
            begin = time.process_time()
            run()
            if repeat:
                seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    print(
        f"{args.shape}, {args.dtype}, texts of {examples.lengths.mean():.0f} tokens, {args.clients} clients of "
        f"{config.steps} steps of batch {args.batch_size}; at most {pass_cost(base).most} tokens in a pass; {machine()}"
    )
    peak = statistics.median(peaks)
    theirs, ours = (1e-9 * work[engine] / len(jobs) for engine in (False, True))
    print(
        f"matrix products: {theirs:.2f} GFLOP a client, in the engine {ours:.2f}; at best {1e-9 * peak:.0f} GFLOP/s "
        f"({1e-9 * min(peaks):.0f} - {1e-9 * max(peaks):.0f}; {product})"
    )
    print("| arm | CPU ms a client | gain | share of the best |\n|---|---|---|---|")
    for name, median in medians.items():
        mine = work[name.startswith("engine")]
        shares = [mine / taken / rate for taken, rate in zip(seconds[name], peaks, strict=True)]
        cells = f"{1e3 * median / len(jobs):.1f} | {first / median:.2f}x | {statistics.median(shares):.0%}"
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()
