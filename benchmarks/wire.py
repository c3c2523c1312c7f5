"""What the wire formats save and cost: bytes both ways, relative error of an update, encoding time, accuracy.

    python benchmarks/wire.py configs/images_vit.toml --rounds 6 --seeds 3
    python benchmarks/wire.py configs/quickstart.toml --rounds 5 --seeds 3 --set train.steps=5
    python benchmarks/wire.py --times            # no run: encode and decode q and v of 7B at rank 16

Runs are paired: each format gets the same seeds, and what is printed for accuracy and loss is the mean difference from
float32 with its standard error. The relative error is |what the server reads - what was trained| / |what was trained -
what the server sent|, the mean over clients and rounds. Arms in brackets are not offered; they say why the offered
formats are as they are.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fedlora.adapter import AdapterState, PairShape, fresh_pairs
from fedlora.config import RunConfig, load_config
from fedlora.federation.protocol import TrainRequest
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation
from fedlora.training.runtime import keep_memory
from fedlora.wire_formats import WIRES, Header, decode_change, encode_change, header_of

ARMS = (
    "float32",
    "bfloat16",
    "int8",
    "topk",
    "topk alone",
    "bfloat16, down",
    "int8, down",
    "[int8, residual kept]",
    "[int8, values]",
    "[bfloat16, values]",
)


as_received = TrainRequest.as_received


@dataclass
class Upload:
    """`TrainRequest.as_received` as an arm has it, with a record of what it did; state is one run's."""

    arm: str
    bytes: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    residuals: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def __call__(self, request: TrainRequest, trained: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """What the server reads of a client's tensors."""
        sent, client = dict(trained), request.client_id
        if "residual" in self.arm and client in self.residuals:
            sent = {name: tensor + self.residuals[client][name] for name, tensor in trained.items()}
        asked = request
        if "values" in self.arm:  # the change from nothing
            nothing = {name: torch.zeros_like(tensor) for name, tensor in request.starts.items()}
            asked = replace(request, plan=replace(request.plan, adapter=request.plan.adapter.with_tensors(nothing)))
        read = as_received(asked, sent, seed)
        if "residual" in self.arm:
            self.residuals[client] = {name: sent[name] - read[name] for name in read}
        self.bytes.append(request.reply_nbytes)
        self.errors.append(_distance(read, trained) / _distance(trained, request.starts))
        return read


def _distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    return sum(float((left[name].double() - right[name].double()).square().sum()) for name in left) ** 0.5


def measure(config: RunConfig, arm: str) -> dict[str, float]:
    """One run of one arm."""
    upload = Upload(arm)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(TrainRequest, "as_received", lambda *asked: upload(*asked)),
    ):
        last = run_simulation(config, RunDir.create(config, folder)).records[-1]
    return {
        "bytes": statistics.mean(upload.bytes),
        "down": last["bytes_down"] / len(last["asked"]),
        "error": statistics.mean(upload.errors),
        "accuracy": last.get("accuracy", float("nan")),
        "loss": last["loss"],
    }


def accuracy(config: str, overrides: list[str], rounds: int, seeds: int, arms: list[str]) -> None:
    """Print the table of the runs."""
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            wire = next(wire for wire in WIRES if wire in arm)
            keys = [
                "runtime.processes=1",
                f"rounds={rounds}",
                f"seed={seed}",
                f"wire.{'down' if 'down' in arm else 'up'}={wire}",
                f"evaluation.every={rounds}",
            ]
            rows[arm].append(measure(load_config(config, [*overrides, *keys]), arm))
            print(f"seed {seed}, {arm}: {rows[arm][-1]}", flush=True)
    print(f"\n{config}, {rounds} rounds, {seeds} seeds {' '.join(overrides)}")
    print(f"{'format':22} {'up':>9} {'down':>9} {'of float32':>15} {'error up':>10} {'accuracy':>18} {'test loss':>20}")
    base = rows[arms[0]]
    for arm, runs in rows.items():
        sizes = {way: statistics.mean(run[way] for run in runs) for way in ("bytes", "down")}
        shares = [f"{size / statistics.mean(run[way] for run in base):.3f}" for way, size in sizes.items()]
        line = f"{arm:22} {sizes['bytes']:9.0f} {sizes['down']:9.0f} {', '.join(shares):>15}"
        line += f" {statistics.mean(run['error'] for run in runs):10.2%}"
        for name, width, scale, unit in (("accuracy", 18, 100, " pt"), ("loss", 20, 1, "")):
            values = [run[name] for run in runs]
            if arm == arms[0]:
                line += f" {statistics.mean(values):{width}.4f}"
                continue
            gaps = [scale * (value - run[name]) for value, run in zip(values, base, strict=True)]
            spread = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            line += f" {f'{statistics.mean(gaps):+.4f} ± {spread:.4f}{unit}':>{width}}"
        print(line)


def times(layers: int, d: int, rank: int, repeats: int) -> None:
    """Print what encoding and decoding take, as CPU time, beside float32's."""
    keep_memory()  # as a run does: else it is page faults that are measured
    layout = {f"{n}.{m}": PairShape(d, d, rank, 2.0) for n in range(layers) for m in "qv"}
    start = AdapterState(fresh_pairs(layout, 0)).tensors()
    trained = {name: value + 1e-3 * torch.randn(value.shape) for name, value in start.items()}
    size = sum(value.nbytes for value in trained.values())
    print(f"\n{2 * layers} pairs of {d} x {d} at rank {rank}: {size / 1e6:.1f} MB in float32, {repeats} repetitions")
    results: dict[str, tuple[float, float, int]] = {}
    for wire in WIRES:
        headers = {name: header_of(wire, value.dtype, tuple(value.shape), 0.1) for name, value in start.items()}
        sent = {name: encode_change(headers[name], value, start[name], 0) for name, value in trained.items()}

        def encode(headers: Mapping[str, Header] = headers) -> Any:
            return [encode_change(headers[name], value, start[name], 0) for name, value in trained.items()]

        def decode(headers: Mapping[str, Header] = headers, sent: Mapping[str, bytes] = sent) -> Any:
            return [decode_change(headers[name], data, start[name]) for name, data in sent.items()]

        took = [statistics.median(_cpu(action) for _ in range(repeats)) for action in (encode, decode)]
        results[wire] = took[0], took[1], sum(map(len, sent.values()))
    for wire, (up, down, count) in results.items():
        base = results["float32"]
        print(
            f"{wire:9} {count / base[2]:.3f} of the bytes; encode {1e3 * up:6.0f} ms ({up / base[0]:4.1f}), "
            f"decode {1e3 * down:6.0f} ms ({down / base[1]:4.1f})"
        )


def _cpu(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="the first is compared with")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    if args.config:
        accuracy(args.config, args.overrides, args.rounds, args.seeds, args.arms)
    if args.times or not args.config:
        times(args.layers, args.d, args.rank, repeats=5)


if __name__ == "__main__":
    main()
