"""Does memory grow with the clients?

    fedlora assets chitchat && python benchmarks/many_clients.py

The chitchat corpus has a client for each person who ever answered. A tiny random Llama (memory is what is measured,
not its learning) trains one round with 100, with 400 and with all of them, each in a process of its own; with
`server.aggregation_error` too, which keeps a round's factors until they are as large as two dense matrices; and in two
processes besides the server's. Printed are the peaks of resident memory while it ran, of all processes together, and
how much of it the round added, as ratios to the smallest federation. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COUNTS = (100, 400, 0)
"""Clients asked in a round; 0: all."""


def make_model(folder: Path) -> None:
    """A Llama of two layers of 64 units with random weights, and a tokeniser of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<end>", "<start>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=0, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(model: Path, asked: int, aggregation_error: bool, processes: int) -> dict[str, Any]:
    """One round with so many clients; in a process of its own, whose peak it reads."""
    import psutil

    from fedlora.callbacks import Callback
    from fedlora.config import parse_config
    from fedlora.runs.rundir import RunDir
    from fedlora.simulation.run import run_simulation
    from fedlora.training import open_workspace

    config = parse_config(
        "",
        [
            "name=many",
            "rounds=1",
            f"model.name='{model}'",
            "adapter.rank=8",
            "adapter.targets=all-linear",
            "task={name='causal-lm', max_length=16}",
            "data.source=chitchat",
            "data.test_fraction=0.002",
            "partition={name='natural', column='person'}",
            "train.steps=1",
            "train.batch_size=2",
            *([f"server.clients_per_round={asked}"] if asked else []),
            f"server.aggregation_error={str(aggregation_error).lower()}",
            "runtime.threads=1",
            f"runtime.processes={processes}",
            "runtime.kernels=off",
        ],
    )
    clients = len(open_workspace(config).data.clients)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: reading the corpus takes more than a round
    before, peaks = status("VmRSS"), [0.0]

    class Peaks(Callback):
        def round_ended(self, record: Mapping[str, Any]) -> None:
            peaks.append(sum(status("VmHWM", child.pid) for child in psutil.Process().children()))

    with tempfile.TemporaryDirectory() as folder:
        run_simulation(config, RunDir.create(config, folder), Peaks())
    peak = status("VmHWM") + max(peaks)
    return {"asked": asked or clients, "clients": clients, "opened_mb": before, "peak_mb": peak}


def status(key: str, process: int | str = "self") -> float:
    """A size of a process in MB, as Linux tells it."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Measure each federation in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "ASKED", "ERROR", "PROCESSES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), int(args.one[1]), args.one[2] == "True", int(args.one[3]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for error, processes in ((False, 1), (True, 1), (False, 2)):
            print(f"server.aggregation_error = {str(error).lower()}, runtime.processes = {processes}")
            first: dict[str, Any] = {}
            for asked in COUNTS:
                command = [sys.executable, __file__, "--one", folder, str(asked), str(error), str(processes)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
                first = first or row
                row["added_mb"] = row["peak_mb"] - row["opened_mb"]
                print(
                    f"{row['asked']:6} of {row['clients']} clients: peak {row['peak_mb']:7.0f} MB "
                    f"({row['peak_mb'] / first['peak_mb']:.2f} times the first), of which the round "
                    f"{row['added_mb']:6.0f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
