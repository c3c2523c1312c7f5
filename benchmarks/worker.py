"""What a message costs a node with a worker and without: each in a process of its own, as Flower starts one.

    python benchmarks/worker.py                              # the quickstart's model and clients
    python benchmarks/worker.py configs/images_vit.toml --messages 5

With and without take turns; the worker has answered once before it is measured. Wall seconds of the whole process, from
its start to its end; "in training steps" is what the reply says. CPU seconds are the node's process alone. Each message
is of another round: one that a worker has answered before it answers from memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _shapes import machine

from fedlora.aggregators import load_aggregator
from fedlora.config import RunConfig, load_config
from fedlora.errors import WorkerError
from fedlora.federation.client_pool import ClientInfo, RoundRequest
from fedlora.federation.planner import Held, Planner
from fedlora.flower.messages import RequestEncoder
from fedlora.node_worker.client import check
from fedlora.node_worker.frames import pack, unpack
from fedlora.training.workspace import open_workspace

NODE = """
import sys
from pathlib import Path
from flwr.app import Context, Message
from fedlora.flower.task_identity import task_identity
from fedlora.node_worker.node_app import app
from fedlora.node_worker.frames import pack, unpack

head, contents = unpack(Path(sys.argv[1]).read_bytes())
with task_identity(1, 2):
    message = Message(contents["content"], 2, "train", ttl=3600.0)
    reply = app(message, Context(1, 2, head["node"], contents["state"], head["run"]))
Path(sys.argv[2]).write_bytes(pack({}, content=reply.content, state=contents["state"]))
"""


def requests(config: RunConfig) -> Iterator[object]:
    """What the server sends to client 0 in round 1, 2, ..., from the same state."""
    workspace = open_workspace(config)
    rule = load_aggregator(config.strategy.name, config.strategy.fields)
    state = rule.init(workspace.base.initial_adapter(config.seed), seed=1)
    planner, encoder = Planner(config, rule, workspace), RequestEncoder()
    for number in itertools.count(1):
        yield encoder.encode(planner.request(RoundRequest(number, [0], state), ClientInfo(0), Held()))


def message(folder: Path) -> tuple[float, float, float]:
    """One process for one message: wall seconds, its own CPU seconds, seconds in training steps."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", NODE, str(folder / "in"), str(folder / "out")], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    metrics = unpack((folder / "out").read_bytes())[1]["content"].metric_records["metrics"]
    return time.perf_counter() - started, cpu, float(metrics["compute_seconds"])  # type: ignore[arg-type]


def main() -> None:
    """Print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="configs/quickstart.toml")
    parser.add_argument("--messages", type=int, default=5)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    with tempfile.TemporaryDirectory(prefix="fedlora-") as name:
        folder, socket = Path(name), Path(name) / "w.sock"
        head = {"node": {"partition-id": 0, "num-partitions": 1}, "run": {"toml": config.to_toml()}}
        asked = requests(config)

        def one() -> tuple[float, float, float]:
            (folder / "in").write_bytes(pack(head, content=next(asked), state=_nothing()))
            return message(folder)

        worker = subprocess.Popen([sys.executable, "-m", "fedlora", "worker", "--socket", str(socket)])
        try:
            _wait(socket)
            os.environ["FEDLORA_WORKER"] = str(socket)
            one()
            rows: dict[str, list[tuple[float, float, float]]] = {"without": [], "with": []}
            for _ in range(args.messages):
                for arm, taken in rows.items():
                    os.environ["FEDLORA_WORKER"] = str(socket) if arm == "with" else ""
                    taken.append(one())
        finally:
            worker.terminate()
            worker.wait()
    medians = {arm: [statistics.median(column) for column in zip(*taken, strict=True)] for arm, taken in rows.items()}
    print(f"{machine()}: {args.config}, one message of {args.messages}, medians")
    for arm, (wall, cpu, steps) in medians.items():
        print(f"{arm:8} a worker: {wall:6.2f} s, of which {steps:5.2f} s in training steps; its CPU {cpu:.2f} s")
    outside = {arm: wall - steps for arm, (wall, _, steps) in medians.items()}
    whole = medians["without"][0] / medians["with"][0]
    print(f"without / with: {whole:.1f} in all, {outside['without'] / outside['with']:.1f} outside training steps")


def _nothing() -> object:
    from flwr.app import RecordDict

    return RecordDict()


def _wait(socket: Path) -> None:
    for _ in range(1200):
        try:
            return check(socket)
        except WorkerError:
            time.sleep(0.1)
    raise SystemExit("the worker did not start")


if __name__ == "__main__":
    main()
