"""How much the frozen base's kernel and precision are worth on this machine's CPU.

    python benchmarks/base_kernels.py                                     # a random BERT of MiniLM's size
    python benchmarks/base_kernels.py --model path/to/a/folder --sequence 64 --attention sdpa eager

One training step (LoRA of rank 8 on query and value, and the head, AdamW) and one pass of inference over examples
sorted by length, for each arm and number of threads. All arms take turns within one run, and the table gives medians
and their ratio to the first arm: compare ratios, not times, and only within one table. Some two minutes a table.

The arms: torch's own float32 kernels; the same with `fedlora.speedups.linear_kernels.accelerate`; torch's own with
`torch.set_float32_matmul_precision("medium")`, which is full float32 on a CPU without AMX and bfloat16 on one with it,
and acts on the whole process; and a bfloat16 base under float32 adapters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from _shapes import machine
from torch import Tensor, nn

from fedlora.speedups.linear_kernels import accelerate

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to compute; `matmul` is an argument of `torch.set_float32_matmul_precision`."""

    name: str
    dtype: torch.dtype = torch.float32
    onednn: bool = False
    matmul: str = "highest"


ARMS = (
    Arm("float32"),
    Arm("float32, oneDNN frozen base", onednn=True),
    Arm('float32, matmul "medium"', matmul="medium"),
    Arm("bfloat16 base", dtype=torch.bfloat16),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ratios of the frozen base's kernels on a CPU.")
    parser.add_argument("--model", help="folder of a BERT-like classifier; without it a random one is built")
    parser.add_argument("--layers", type=int, default=6, help="of the random BERT")
    parser.add_argument("--hidden", type=int, default=384, help="of the random BERT")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], choices=["sdpa", "eager"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=16, help="examples in a training step")
    parser.add_argument("--sequence", type=int, default=24, help="tokens in the longest example of a training step")
    parser.add_argument("--inference-batch", type=int, default=128)
    parser.add_argument("--inference-examples", type=int, default=256, help="of 4 to 44 tokens")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def classifier(options: argparse.Namespace, attention: str, dtype: torch.dtype) -> Any:
    """The base with its adapters, the same for each arm."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    how: dict[str, Any] = {"attn_implementation": attention, "dtype": dtype}
    if options.model:
        config = AutoConfig.from_pretrained(options.model, num_labels=4)
        base = AutoModelForSequenceClassification.from_pretrained(options.model, config=config, **how)
    else:
        config = BertConfig(
            vocab_size=2000,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 32,
            intermediate_size=4 * options.hidden,
            num_labels=4,
        )
        base = AutoModelForSequenceClassification.from_config(config, **how)
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))


def padded(lengths: list[int], vocabulary: int, generator: torch.Generator) -> Batch:
    """Random tokens, padded to the longest of `lengths`."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(1, vocabulary, mask.shape, generator=generator)
    return {"input_ids": tokens * mask, "attention_mask": mask}


def training_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """One step of AdamW on what trains."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def run() -> None:
        model.train()
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()

    return run


def inference(model: nn.Module, batches: list[Batch]) -> Callable[[], None]:
    """One pass over all batches."""

    def run() -> None:
        model.eval()
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    return run


def main() -> None:
    """Prints one table for each way to attend."""
    options = arguments()
    generator = torch.Generator().manual_seed(0)
    print(f"{machine()}; {options}")
    for attention in options.attention:
        models = {arm: classifier(options, attention, arm.dtype) for arm in ARMS}
        vocabulary = next(iter(models.values())).config.vocab_size
        lengths = [max(1, options.sequence - k % 8) for k in range(options.batch)]
        train = padded(lengths, vocabulary, generator)
        train["labels"] = torch.randint(4, (options.batch,), generator=generator)
        every = sorted(torch.randint(4, 45, (options.inference_examples,), generator=generator).tolist())
        step = options.inference_batch
        test = [padded(every[k : k + step], vocabulary, generator) for k in range(0, len(every), step)]

        runs: dict[tuple[str, Arm], Callable[[], None]] = {}
        for arm, model in models.items():
            if arm.onednn:
                choice = accelerate(model, "auto", rows=options.batch * options.sequence)
                print(f'"auto" chose {choice.mode!r}: {choice.reason}')
                for t in choice.timings:
                    speeds = f"torch {t.torch_gflops:.0f}, oneDNN {t.onednn_gflops:.0f} GFLOP/s"
                    print(f"    {t.layers} layers {t.in_features} -> {t.out_features}, {t.rows} rows: {speeds}")
                report = accelerate(model, "onednn")
                print(f"    {report.layers} layers on oneDNN")
            runs["training", arm] = training_step(model, train)
            runs["inference", arm] = inference(model, test)

        seconds: dict[tuple[str, Arm, int], list[float]] = {}
        for repeat in range(options.repeats + 1):  # the first one warms up
            for threads in options.threads:
                torch.set_num_threads(threads)
                for (what, arm), run in runs.items():
                    torch.set_float32_matmul_precision(arm.matmul)
                    begin = time.perf_counter()
                    run()
                    if repeat:
                        seconds.setdefault((what, arm, threads), []).append(time.perf_counter() - begin)

        columns = [(what, threads) for what in ("training", "inference") for threads in options.threads]
        print(f"\n| {attention} attention | " + " | ".join(f"{what}, {n} thread(s)" for what, n in columns) + " |")
        print("|---|" + "---|" * len(columns))
        for arm in ARMS:
            cells = []
            for what, threads in columns:
                first, this = (median(seconds[what, a, threads]) for a in (ARMS[0], arm))
                cells.append(f"{this * 1e3:.0f} ms, {first / this:.2f}x")
            print(f"| {arm.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
