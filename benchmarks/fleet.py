"""How many nodes a SuperLink carries: one process that speaks Flower's fleet API for all of them.

    python benchmarks/fleet.py                              # 10 nodes, 0.3 MiB: MiniLM's query and value at rank 8
    python benchmarks/fleet.py --nodes 30 100 --mib 0.3 --arms ours fedavg
    python benchmarks/fleet.py --nodes 4 --mib 76 --layers 37   # 444 tensors, with the bytes of a 7B's 448 (all linear
                                                                # layers) at rank 16 in bf16

The SuperLink (its database on the disk) and the ServerApp are real, and so is what a node does but for training: each
polls, pulls the objects of a message, answers, and pushes the objects of the reply with Flower's own HTTP client, and
sleeps 3 s where there is nothing, as a SuperNode does. `ours` is fedlora's ServerApp; `fedavg` is Flower's, on a record
of as many arrays as our adapter has tensors, and `packed` the same on a record of one. Answers come from memory: what
was sent, moved by a little.

It prints seconds of a round, HTTP calls and bytes of each node and round, and the peak memory of SuperLink and server.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from _federation import PATIENCE_S, Federation, NoMoreRounds, replay
from deployed_round import PROJECT, write_ours

POLL_S = 3.0
"""What a SuperNode sleeps where there was no message."""

FEDAVG = """
import json
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config

    class Noted(FedAvg):
        def aggregate_train(self, server_round, replies):
            found = super().aggregate_train(server_round, replies)
            with open(config["file"], "a") as file:
                file.write(json.dumps({"round": server_round}) + "\\n")
            return found

    size, nodes = config["nbytes"] // 4 // config["arrays"], config["nodes"]
    start = ArrayRecord([np.random.default_rng(n).random(size, np.float32) for n in range(config["arrays"])])
    strategy = Noted(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(grid, start, num_rounds=config["rounds"])
"""


class Fleet:
    """Nodes on threads of this process.

    Args:
        address: The SuperLink's.
        count: Number of nodes.
        config: Path of the config by which they answer fedlora's ServerApp.
    """

    def __init__(self, address: str, count: int, config: Path) -> None:
        from fedlora.config import load_config

        self.calls = self.bytes_up = self.bytes_down = 0
        self._address, self._toml = address, load_config(config).to_toml()
        self._stop, self._one = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._node, args=(number,), daemon=True) for number in range(count)]

    def start(self) -> None:
        """Start all nodes."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stop them; one whose calls are in vain is left alone."""
        self._stop.set()
        end = time.monotonic() + 20.0
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _node(self, number: int) -> None:
        from flwr.supernode.fleet_http_connection import http_request_response

        with http_request_response(self._address, insecure=True) as (node_id, *calls):
            receive, send, _, _, pull, push, confirm = calls
            while not self._stop.is_set():
                self.calls += 1
                if (got := receive()) is None:
                    self._stop.wait(POLL_S)
                    continue
                self._serve(number, node_id, got, send, pull, push, confirm)

    def _serve(self, number: int, node_id: int, got: Any, send: Any, pull: Any, push: Any, confirm: Any) -> None:
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            iterate_object_tree,
        )
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

        head, tree = got
        run_id, message_id = head.metadata.run_id, tree.object_id
        ids = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))
        contents = pull_objects(ids, lambda key: pull(run_id, key))
        confirm(run_id, message_id)
        with self._one:  # counters, and fedlora's workspace, which is one of a process
            self.calls += len(ids) + 2
            self.bytes_down += sum(map(len, contents.values()))
            message = inflate_object_from_contents(message_id, contents)
            message.metadata.__dict__["_message_id"] = message_id
            reply = self._answer(number, node_id, message)
            objects = get_all_nested_objects(reply)
            reply.metadata.__dict__["_message_id"] = reply.object_id
        wanted, session = send(reply, get_object_tree(reply), 0.0)
        for key in objects:
            if key in wanted:
                content = objects[key].deflate()
                push(run_id, session, key, content)
                with self._one:
                    self.calls += 1
                    self.bytes_up += len(content)

    def _answer(self, number: int, node_id: int, message: Any) -> Any:
        from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
        from flwr.app.user_config import UserConfig

        from fedlora.flower import client_app
        from fedlora.flower.task_identity import task_identity

        run_id = message.metadata.run_id
        with task_identity(run_id, node_id):
            if message.metadata.message_type != "train" or "plan" in message.content:
                own, run = UserConfig({"partition-id": number}), UserConfig({"toml": self._toml})
                return client_app.app(message, Context(run_id, node_id, own, RecordDict(), run))
            step = np.float32(1e-4 * (number + 1))
            arrays = ArrayRecord([value + step for value in message.content["arrays"].to_numpy_ndarrays()])
            said = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 8})}
            return Message(RecordDict(said), reply_to=message)


def peak_mib(root: int, name: str) -> float:
    """Largest resident size so far of the processes of a name that a process started, itself included."""
    parents, peaks = dict[int, int](), dict[int, float]()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text()
            parents[int(place.name)] = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found = re.search(r"VmHWM:\s+(\d+)", (place / "status").read_text())
        except (OSError, IndexError):  # it has ended
            continue
        if name in words and found:
            peaks[int(place.name)] = int(found[1]) / 1024

    def below(pid: int) -> bool:
        return pid == root or (pid in parents and below(parents[pid]))

    return max((mib for pid, mib in peaks.items() if below(pid)), default=0.0)


def measure(folder: Path, arm: str, count: int, args: argparse.Namespace) -> None:
    """Print one line: an arm with so many nodes."""
    app, arrays = folder / "app", 2 * 6 * args.layers
    what = f"{arm:7} {count:4} nodes, {args.mib:g} MiB in "
    what += f"{arrays} tensors (rank {write_ours(folder, args.layers, args.mib, count)})"
    lines = args.rounds + 2  # the first round's start is not measured; here round 0 has a line
    settings, file = f'set="name=fleet rounds={lines - 1}"', folder / "runs" / "fleet" / "metrics.jsonl"
    if arm != "ours":
        app, lines, file = folder / "fedavg", args.rounds + 1, folder / "rounds.jsonl"
        app.mkdir()
        (app / "pyproject.toml").write_text(
            PROJECT.format(server="fedavg", client="fedlora.node_worker.node_app") + "arrays = 1\n"
        )
        (app / "fedavg.py").write_text(FEDAVG)
        settings = f'file="{file}" nbytes={round(args.mib * 2**20)} rounds={lines} nodes={count}'
        settings += f" arrays={1 if arm == 'packed' else arrays}"
    running, peaks = Federation(folder / "link", 1.0, args.in_memory), [0.0, 0.0]
    running.patience_s = args.patience

    def look() -> None:
        for at, name in enumerate(("flower-superlink", "flwr-serverapp")):
            peaks[at] = max(peaks[at], peak_mib(running.superlink, name))

    try:
        fleet = Fleet(running.begin(0), count, folder / "app" / "run.toml")
        fleet.start()
        try:
            seconds, _ = running.rounds(app, file, lines, settings, look)
        finally:
            fleet.end()
    except NoMoreRounds as error:
        look()
        said = f"{error}; {fleet.calls / count:.0f} calls of each node"
    else:
        per = count * (args.rounds + 1)
        said = f"{statistics.median(seconds[-args.rounds :]):6.1f} s a round; of each node and round "
        said += f"{fleet.calls / per:.0f} calls, {fleet.bytes_down / per / 2**20:.2f} MiB down, "
        said += f"{fleet.bytes_up / per / 2**20:.2f} up"
    finally:
        running.end()
    memory = f"peak memory of the SuperLink {peaks[0]:.0f} MiB, of the ServerApp {peaks[1]:.0f}"
    print(f"{what}: {said}; {memory}", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10])
    parser.add_argument("--mib", type=float, default=0.3)
    parser.add_argument("--layers", type=int, default=2, help="of 12 tensors each")
    parser.add_argument("--arms", nargs="+", default=["ours", "packed", "fedavg"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds for a round")
    parser.add_argument("--in-memory", action="store_true", help="a SuperLink without a database on the disk")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    replay()
    for count in args.nodes:
        for arm in args.arms:
            with tempfile.TemporaryDirectory(prefix="fedlora-") as name:
                measure(Path(name), arm, count, args)


if __name__ == "__main__":
    main()
