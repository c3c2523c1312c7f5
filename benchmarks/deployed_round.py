"""What a round of a deployment costs beyond training, and whether the number of tensors shows.

    python benchmarks/deployed_round.py                          # 1 and 40 MiB, 3 turns of 5 rounds
    python benchmarks/deployed_round.py --mib 1 --poll 1 0.05    # what the SuperExec's poll interval is worth
    make bench-containers                                        # the first, in the containers of docker-compose.yml

A SuperLink with its database on the disk and two SuperNodes with a worker each, all real and on this machine: plain
processes, or containers with TLS, node keys, proxy and policies as `fedlora deploy init` makes them. fedlora's
ServerApp and ClientApp carry a BERT of 2 and of 32 layers, all linear layers adapted at ranks that make as many bytes;
the worker answers from memory instead of training. Beside them a plain Flower app sends one array of as many bytes to
each node and gets one back. The arms take turns. A round is what lies between two lines of the server's metrics.

Of the echo's round it prints where the time goes, by the clock of this machine: from the server's push to the start of
the ClientApp's process (polling of the SuperNode and its SuperExec), from there to the app's first line (Python's
start, imports, and the message's way in), and from the app's answer to the server's hands (objects pushed one after the
other, polling of the SuperNode).
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from _federation import NODES, ComposedFederation, Federation

HIDDEN = 64
WORDS = ("good", "bad", "warm", "cold", "film", "book", "song", "play")

PROJECT = """
[project]
name = "round"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedlora"
[tool.flwr.app.components]
serverapp = "{server}:app"
clientapp = "{client}:app"
[tool.flwr.app.config]
config = "run.toml"
set = ""
file = ""
nbytes = 0
rounds = 0
nodes = 2
"""

ECHO_SERVER = """
import json, time
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    for number in range(config["rounds"]):
        values = np.random.default_rng(number).integers(0, 256, config["nbytes"], np.uint8)
        record = ArrayRecord([values])
        pushed, times = time.time(), []
        ids = set(grid.push_messages([Message(RecordDict({"a": record}), node, "train") for node in nodes]))
        while ids:
            for reply in grid.pull_messages(ids):
                ids.discard(reply.metadata.reply_to_message_id)
                said = reply.content["times"]
                times.append([said["begun"] - pushed, said["came"] - said["begun"], time.time() - said["left"]])
            time.sleep(0.1)
        with open(config["file"], "a") as file:
            file.write(json.dumps({"round": number, "times": times}) + "\\n")
"""

ECHO_CLIENT = """
import os, time
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    came = time.time()
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    up = float(open("/proc/uptime").read().split()[0])
    begun = time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))
    values = message.content["a"].to_numpy_ndarrays()[0] + np.uint8(1 + context.node_id % 250)
    times = ConfigRecord({"begun": begun, "came": came, "left": time.time()})
    return Message(RecordDict({"a": ArrayRecord([values]), "times": times}), reply_to=message)
"""


# ---------------------------------------------------------------------------------------------- what is run


def write_ours(folder: Path, layers: int, mib: float, nodes: int = NODES) -> int:
    """The app of a BERT of so many layers; gives the rank."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {token: number for number, token in enumerate([*special.values(), "[MASK]", *WORDS])}
    inner = BertWordPieceTokenizer(vocab=vocabulary)._tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, **special, model_max_length=16).save_pretrained(folder / "bert")
    size = {"hidden_size": HIDDEN, "num_attention_heads": 2, "intermediate_size": 4 * HIDDEN}
    BertModel(
        BertConfig(vocab_size=len(vocabulary), num_hidden_layers=layers, max_position_embeddings=16, **size)
    ).save_pretrained(folder / "bert")
    draw = random.Random(0)
    rows = [f"{draw.choice(WORDS)} {draw.choice(WORDS)},{number % 2}" for number in range(16 * nodes)]
    (folder / "texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    rank = max(1, round(mib * 2**20 / (4 * 18 * HIDDEN * layers)))  # a layer has 18 times HIDDEN numbers for each rank
    (folder / "app").mkdir()
    (folder / "app" / "pyproject.toml").write_text(
        PROJECT.format(server="fedlora.flower.server_app", client="fedlora.node_worker.node_app")
    )
    (folder / "app" / "run.toml").write_text(
        f"""
        output = "{folder}/runs"
        model.name = "{folder}/bert"
        adapter = {{ rank = {rank}, targets = ["query", "key", "value", "dense"] }}
        data = {{ source = "{folder}/texts.csv", test_fraction = 0.25 }}
        partition = {{ name = "iid", clients = {nodes} }}
        server = {{ aggregation_error = false, quorum = 1.0 }}
        evaluation = {{ every = 1000 }}
        runtime = {{ threads = 1, kernels = "off", device = "cpu" }}
        """
    )
    return rank


def write_echo(folder: Path) -> None:
    """Flower's own app."""
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "pyproject.toml").write_text(PROJECT.format(server="echo_server", client="echo_client"))
    (folder / "app" / "echo_server.py").write_text(ECHO_SERVER)
    (folder / "app" / "echo_client.py").write_text(ECHO_CLIENT)


# ---------------------------------------------------------------------------------------------- what is printed


def measure(running: Federation, poll_s: float, sizes: list[float], arms: list[str], turns: int, rounds: int) -> None:
    """Print seconds of a round of each arm, and of the echo's where they go."""
    taken: dict[tuple[float, str], list[float]] = {(mib, arm): [] for mib in sizes for arm in arms}
    parts: dict[float, list[list[float]]] = {mib: [] for mib in sizes}
    for turn, (mib, arm) in itertools.product(range(turns), taken):
        place = running.folder.parent / f"{arm}-{mib}"
        if arm == "echo":
            file = place / f"{poll_s}-{turn}.jsonl"
            settings = f'file="{file}" nbytes={round(mib * 2**20)} rounds={rounds + 3}'
            seconds, lines = running.rounds(place / "app", file, rounds + 3, settings)
            parts[mib] += [part for line in lines[1:] for part in line["times"]]
        else:
            name = f"r{poll_s}-{turn}".replace(".", "-")
            file = place / "runs" / name / "metrics.jsonl"  # with a line for round 0
            settings = f'set="name={name} rounds={rounds + 2}"'
            seconds, lines = running.rounds(place / "app", file, rounds + 3, settings)
            lost = sum(len(line["answered"]) < NODES for line in lines[1:])
            print(f"{lost} of {len(lines) - 1} rounds lacked an answer")
        seconds = seconds[1:-1]
        taken[mib, arm] += seconds
        print(f"{mib:g} MiB, {arm}, turn {turn}: {' '.join(f'{s:.1f}' for s in seconds)}", flush=True)
    print(f"\nFLWR_SUPEREXEC_TASK_POLL_INTERVAL={poll_s:g}: seconds of a round, medians of {turns} x {rounds}")
    for mib in sizes:
        medians = {arm: statistics.median(taken[mib, arm]) for arm in arms}
        line = "  ".join(f"{arm} {value:.1f}" for arm, value in medians.items())
        if "echo" in medians:
            line += "".join(f"  {arm} / echo {v / medians['echo']:.2f}" for arm, v in medians.items() if arm != "echo")
        if {"2", "32"} <= medians.keys():
            line += f"  32 / 2 layers {medians['32'] / medians['2']:.2f}"
        print(f"{mib:g} MiB: {line}")
        if parts[mib]:
            reach, begin, back = (statistics.median(column) for column in zip(*parts[mib], strict=True))
            print(f"   echo: {reach:.1f} s to the process, {begin:.1f} s to its first line, {back:.1f} s back")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, nargs="+", default=[1.0, 40.0])
    parser.add_argument("--arms", nargs="+", default=["echo", "2", "32"], help="echo, or a number of layers")
    parser.add_argument("--poll", type=float, nargs="+", default=[1.0], help="seconds between a SuperExec's looks")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--containers", action="store_true", help="those of docker-compose.yml, not processes")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="fedlora-") as name:
        folder = Path(name)
        for mib, arm in itertools.product(args.mib, args.arms):
            place = folder / f"{arm}-{mib}"
            if arm == "echo":
                write_echo(place)
            else:
                print(f"{mib:g} MiB, {arm} layers: rank {write_ours(place, int(arm), mib)}")
        for poll_s in args.poll:
            running = (ComposedFederation if args.containers else Federation)(folder / f"poll-{poll_s}", poll_s)
            try:
                running.begin()
                measure(running, poll_s, args.mib, args.arms, args.turns, args.rounds)
            finally:
                running.end()


if __name__ == "__main__":
    main()
