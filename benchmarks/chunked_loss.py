"""What a language model's loss in chunks of tokens saves of memory, and what it costs: a training step, in turn.

    python benchmarks/chunked_loss.py
    python benchmarks/chunked_loss.py --vocabulary 128000 --tokens 4096

A Llama of random weights, 2 layers of 256, all tokens counted, one thread. Each arm is a process of its own; the table
has the peak of its resident memory above what it had when the model was loaded, and medians of CPU milliseconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _shapes import machine

from fedlora.adapter import ALL_PARTS
from fedlora.config import AdapterConfig, ModelConfig, OpenTable, RunConfig, RuntimeConfig, TrainConfig
from fedlora.model import load_base
from fedlora.tasks import Examples, _token_loss, load_task
from fedlora.tasks._text import Tokens
from fedlora.training.cohort import train
from fedlora.training.job import TrainJob

LENGTH = 256
STEPS = 3
ARMS = {"whole": 10**9, "in chunks": _token_loss.CHUNK}


def arm(folder: str, chunk: int, tokens: int, vocabulary: int, turns: int) -> tuple[float, float]:
    """Bytes above the start's, and CPU seconds of a step."""
    torch.set_num_threads(1)
    _token_loss.CHUNK = chunk
    config = RunConfig(
        model=ModelConfig(name=folder, dtype="float32"),
        adapter=AdapterConfig(rank=8, targets=("q_proj", "v_proj")),
        runtime=RuntimeConfig(device="cpu"),
    )
    base, task = load_base(config, "AutoModelForCausalLM", (), {}), load_task(OpenTable(name="causal-lm"))
    draw = np.random.default_rng(0)
    rows = Tokens.join([draw.integers(3, vocabulary, LENGTH) for _ in range(tokens // LENGTH)], 0)
    examples = Examples({"input_ids": rows, "labels": rows}, None, rows.lengths)
    base.pass_tokens = tokens
    how = TrainConfig(steps=STEPS, batch_size=len(rows), lr=1e-3)
    job = TrainJob(base.initial_adapter(0), ALL_PARTS, np.arange(len(rows)), 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = []
    for _ in range(turns):
        begin = time.process_time()
        train(base, task, examples, job, how)
        taken.append((time.process_time() - begin) / STEPS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return 1024.0 * peak, statistics.median(taken)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of a pass")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(**shape, vocab_size=args.vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        LlamaForCausalLM(config).save_pretrained(Path(folder))
        for name, chunk in ARMS.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[name] = pool.apply(arm, (folder, chunk, args.tokens, args.vocabulary, args.turns))
    print(f"{args.tokens} tokens in a pass, {args.vocabulary} words, chunks of {ARMS['in chunks']}; {machine()}")
    print("| loss | memory of a step, MiB | CPU ms a step |\n|---|---|---|")
    for name, (peak, seconds) in found.items():
        print(f"| {name} | {peak / 2**20:.0f} | {1e3 * seconds:.0f} |")
    (whole, slow), (chunked, fast) = found.values()
    print(f"in chunks: {chunked / whole:.2f} of the memory, {fast / slow:.2f} of the time")


if __name__ == "__main__":
    main()
