"""How long the aggregation rules take, and how much memory, at the shape of a 7B model's q and v.

    python benchmarks/aggregation.py                                   # 32 layers, d = 4096, r = 16, 100 clients
    python benchmarks/aggregation.py --layers 2 --d 512 --clients 20   # small

Each rule that a config can name runs, and some around others, in a process of its own. Updates are drawn while
`aggregate` asks for them, and the time of drawing is not counted; CPU seconds tell a busy machine from a slow rule.
Memory is the peak of the resident set during `aggregate`, above what was resident before plus one update plus the
result: for a rule that needs sums only it does not grow with the number of clients.
The last line compares the best rank-r approximation of one layer's mean update by QR of the stacked factors with that
by SVD of the dense matrix, both in this process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import ClientSpec, ClientUpdate, Fact, GlobalState, load_aggregator, rules
from fedlora.lowrank import compress, stack
from fedlora.rng import derive

NO_HEAD = ("fedper", "fedrep")
"""Rules whose clients keep a head, which this adapter does not have."""
RULES: dict[str, tuple[str, dict[str, object]]] = {name: (name, {}) for name in rules if name not in NO_HEAD}
RULES |= {
    "fair, cosine, 20 steps": ("fair", {"solver": "cosine", "steps": 20}),
    "keep": ("keep", {"keep": ["B"]}),
    "fedex, rank_cap 16": ("fedex", {"rank_cap": 16}),
    "flexlora, randomised": ("flexlora", {"svd": "randomised"}),
    "krum of flora": ("krum", {"keep": 0.5, "inner": {"name": "flora"}}),
    "geometric_median of flora": ("geometric_median", {"inner": {"name": "flora"}}),
    "fedadam of ffa": ("fedadam", {"inner": {"name": "ffa"}}),
    "median of ffa": ("median", {"inner": {"name": "ffa"}}),
}
MIB = 2**20


class Replies:
    """Updates of `clients` clients, each drawn when it is asked for; `seconds` and `cpu` are what drawing took."""

    def __init__(self, rule: str, state: GlobalState, clients: int) -> None:
        self.state, self.clients, self.seconds, self.cpu = state, clients, 0.0, 0.0
        self.facts: dict[Fact, float] = {"rates": 1.0, "clients": float(clients), "start_loss": 1.0}
        aggregator = load_aggregator(*RULES[rule])
        self.plan = aggregator.plan(state, ClientSpec(0, state.adapter.layout))

    def __iter__(self) -> Iterator[ClientUpdate]:
        for k in range(self.clients):
            start, cpu = time.perf_counter(), time.process_time()
            generator = torch.Generator().manual_seed(derive(0, k))
            tensors = {
                name: torch.empty_like(value).normal_(0.0, 0.02, generator=generator)
                for name, value in self.plan.adapter.tensors(self.plan.sends).items()
            }
            adapter = self.plan.adapter.with_tensors(tensors)
            update = ClientUpdate(k, adapter, 1.0 + k % 7, self.plan.base_version, facts=self.facts)
            del tensors
            self.seconds += time.perf_counter() - start
            self.cpu += time.process_time() - cpu
            yield update
            del update


def resident(key: str) -> int:
    """Bytes of this process now ("VmRSS") or at its peak ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark reads its memory on Linux")


def measure(rule: str, layers: int, d: int, rank: int, clients: int) -> dict[str, float]:
    """One merge of one rule: seconds, and bytes above one update and the result."""
    layout = {f"layers.{n}.{m}": PairShape(d, d, rank, 2.0) for n in range(layers) for m in ("q", "v")}
    aggregator = load_aggregator(*RULES[rule])
    before = aggregator.init(AdapterState(fresh_pairs(layout, 0)))
    replies = Replies(rule, before, clients)
    one_update = replies.plan.adapter.nbytes(replies.plan.sends)
    # Libraries set up their own buffers at the first call; a merge of one small layer takes that out of the figure.
    small = aggregator.init(AdapterState(fresh_pairs({"m": PairShape(64, 64, rank, 2.0)}, 0)))
    aggregator.aggregate(small, iter(Replies(rule, small, 2)))
    Path("/proc/self/clear_refs").write_text("5")
    resting = resident("VmRSS")
    start, started = time.perf_counter(), time.process_time()
    after = aggregator.aggregate(before, iter(replies))
    seconds = time.perf_counter() - start - replies.seconds
    cpu = time.process_time() - started - replies.cpu
    peak = resident("VmHWM") - resting
    result = sum(base_update.change.nbytes() for base_update in after.base_updates) + after.adapter.nbytes(
        replies.plan.sends
    )
    return {"seconds": seconds, "cpu": cpu, "update": one_update, "result": result, "peak": peak}


def qr_against_dense(d: int, rank: int, clients: int) -> None:
    """The best rank-r approximation of one layer's mean update, by both roads."""
    generator = torch.Generator().manual_seed(0)
    draw = [
        LoraPair(torch.randn(rank, d, generator=generator), torch.randn(d, rank, generator=generator), 2.0)
        for _ in range(clients)
    ]
    whole = stack([(1 / clients, pair) for pair in draw])
    start = time.perf_counter()
    by_qr = compress(whole, rank)
    qr = time.perf_counter() - start
    start = time.perf_counter()
    U, S, Vh = torch.linalg.svd(whole.delta())
    dense = time.perf_counter() - start
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    gap = float((by_qr.delta() - best).norm() / best.norm())
    print(
        f"best rank {rank} of one {d} x {d} layer, {clients} clients: QR {qr:.2f} s, dense SVD {dense:.1f} s, "
        f"ratio {dense / qr:.0f}; they differ by {gap:.0e}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rule", choices=RULES, help="this one alone")
    parser.add_argument("--json", action="store_true", help="measure --rule here, and print raw numbers")
    options = parser.parse_args()
    shape = (options.layers, options.d, options.rank, options.clients)
    if options.json:
        print(json.dumps(measure(options.rule or "fedavg", *shape)))
        return
    from _shapes import machine

    print(machine())
    print(f"{options.clients} clients, {options.layers} layers, q and v, d = {options.d}, r = {options.rank}, float32")
    print("| rule | merge s | CPU s | one update MiB | result MiB | peak above both MiB |")
    print("|---|---|---|---|---|---|")
    for rule in [options.rule] if options.rule else RULES:
        flags = [f"--{name}={value}" for name, value in zip(("layers", "d", "rank", "clients"), shape, strict=True)]
        command = [sys.executable, __file__, "--json", f"--rule={rule}", *flags]
        got = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        above = got["peak"] - got["update"] - got["result"]
        print(
            f"| {rule} | {got['seconds']:.2f} | {got['cpu']:.2f} | {got['update'] / MIB:.1f} "
            f"| {got['result'] / MIB:.1f} | {above / MIB:.0f} |",
            flush=True,
        )
    if not options.rule:
        qr_against_dense(options.d, options.rank, min(30, options.clients))


if __name__ == "__main__":
    main()
