"""From which length on is torch's fused attention worth it on this machine? And what is the choice worth to a model?

    python benchmarks/attention.py                      # one thread, bfloat16 and float32
    python benchmarks/attention.py --features 64 --dtypes bfloat16

First table: attention alone, forward and backward, with padding; time of the fused kernel over that of two products and
a softmax, so that above 1 two products win. `fedlora.speedups.attention.SHORT` was read off it. Second table: one
training step and one pass of inference of a random BERT of MiniLM's size, for each way to attend and for the choice by
length.
All arms take turns within one run, and the figures are processor time, so that other programs show less; compare
ratios, not times. Some three minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _shapes import in_turn, machine
from torch import Tensor
from torch.nn import functional

from fedlora.speedups.attention import choose_attention, two_products

Run = Callable[[], None]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Attention by length.")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 32, 64, 128, 256, 384, 512])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--features", nargs="+", type=int, default=[32, 64], help="of a head")
    parser.add_argument("--tokens", type=int, default=512, help="in a batch of the first table")
    parser.add_argument("--model-lengths", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--batch", type=int, default=4, help="examples in a step of the second table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """torch's kernel."""
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)


def alone(options: argparse.Namespace, dtype: torch.dtype, features: int, length: int, case: str) -> float:
    """Seconds of the fused kernel over those of two products."""
    batch = max(1, options.tokens // length)
    shape = (batch, length, options.heads, features)
    inputs = [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_(case != "inference") for _ in range(3)]
    lengths = torch.linspace(max(1, length // 2), length, batch).long()
    seen = (torch.arange(length) < lengths[:, None])[:, None, None].expand(batch, 1, length, length)
    added = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    gradient = torch.randn(shape).to(dtype)
    dropout = 0.1 if case == "dropout" else 0.0

    def run(products: bool) -> None:
        with torch.inference_mode(case == "inference"):
            if products:
                out = two_products(*inputs, added, features**-0.5, dropout=dropout)
            else:
                out = fused(*inputs, seen, features**-0.5, dropout)
            if case != "inference":
                torch.autograd.grad(out.transpose(1, 2).contiguous(), inputs, gradient)

    seconds = in_turn({"fused": lambda: run(False), "products": lambda: run(True)}, options.repeats)
    return median(seconds["fused"]) / median(seconds["products"])


def classifier(attention: str, dtype: torch.dtype, dropout: float) -> Any:
    """A random BERT of MiniLM's size with adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    base = BertForSequenceClassification(config).to(dtype)
    choose_attention(base, attention)  # type: ignore[arg-type]
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))


def model_runs(model: Any, batch: int, length: int) -> tuple[Run, Run]:
    """A training step, and inference on the same batch."""
    lengths = torch.linspace(max(1, length // 2), length, batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(1, 2000, mask.shape) * mask, "attention_mask": mask}
    labels = torch.zeros(batch, dtype=torch.long)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        model.train()
        optimiser.zero_grad()
        functional.cross_entropy(model(**inputs).logits.float(), labels).backward()
        optimiser.step()

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(**inputs)

    return step, infer


def main() -> None:
    """Prints both tables."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{machine()}, {options.threads} thread(s)")
    print(f"\n| attention alone: fused / two products | {' | '.join(map(str, options.lengths))} |")
    print("|---|" + "---|" * len(options.lengths))
    for dtype in options.dtypes:
        for features in options.features:
            for case in ("training", "dropout", "inference"):
                found = [alone(options, getattr(torch, dtype), features, n, case) for n in options.lengths]
                cells = " | ".join(f"{ratio:.2f}" for ratio in found)
                print(f"| {dtype}, {options.heads} x {features}, {case} | {cells} |", flush=True)

    names = [f"{what}, {n} tokens" for n in options.model_lengths for what in ("step", "inference")]
    print(f"\n| BERT, 6 layers, hidden 384, batch {options.batch} | {' | '.join(names)} |")
    print("|---|" + "---|" * len(names))
    for dtype in options.dtypes:
        for dropout in (0.0, 0.1):
            models = {mode: classifier(mode, getattr(torch, dtype), dropout) for mode in ("sdpa", "eager", "auto")}
            cells: dict[str, list[str]] = {mode: [] for mode in models}
            for length in options.model_lengths:
                runs = {mode: model_runs(model, options.batch, length) for mode, model in models.items()}
                for which in (0, 1):
                    seconds = in_turn({mode: both[which] for mode, both in runs.items()}, options.repeats, 2)
                    medians = {mode: median(times) for mode, times in seconds.items()}
                    for mode, taken in medians.items():
                        cells[mode].append(f"{1e3 * taken:.0f} ms, {medians['sdpa'] / taken:.2f}x")
            for mode in models:
                print(f"| {dtype}, dropout {dropout:g}, {mode} | {' | '.join(cells[mode])} |", flush=True)


if __name__ == "__main__":
    main()
