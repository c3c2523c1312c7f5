"""What is it worth to compute the frozen layers below the adapters once for each example?

    python benchmarks/prefix.py                                        # 6 layers, adapters in the top 2, one thread
    python benchmarks/prefix.py --layers 12 --hidden 768 --top 2 --dtypes float32

One training step (LoRA of rank 8 on query and value, and the head, AdamW, no dropout) of a random BERT of MiniLM's
size: PEFT on all layers, PEFT on the top layers, the same with this project's kernels and attention and without what no
head reads, and with the prefix cache when it holds all examples. The last column is the first time that examples are
met: those of some batches are computed at once, then each batch takes its step. All arms take turns within one run, and
the figures are medians of processor time, so that other programs show less; compare ratios, not times. A minute or two.
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

from fedlora.speedups.activation_cache import ActivationCache
from fedlora.speedups.attention import choose_attention
from fedlora.speedups.cache_choice import open_cache
from fedlora.speedups.last_layer import skip_unread
from fedlora.speedups.linear_kernels import accelerate

Batch = dict[str, Tensor]
ARMS = (
    "PEFT, all layers",
    "PEFT, top layers",
    "+ kernels, attention, unread tokens",
    "+ prefix cache",
    "+ prefix cache, first time",
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The prefix cache's gain.")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--top", type=int, default=2, help="layers with adapters")
    parser.add_argument("--batch", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--tokens", type=int, default=64, help="in a batch's longest example")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def classifier(options: argparse.Namespace, dtype: torch.dtype, top: int, ours: bool) -> tuple[Any, tuple[str, ...]]:
    """A random BERT with adapters in its uppermost layers, and their names."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(
        BertConfig(
            vocab_size=2000,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 32,
            intermediate_size=4 * options.hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).to(dtype)
    model.requires_grad_(False)
    numbers = range(options.layers - top, options.layers)
    targets = tuple(f"bert.encoder.layer.{k}.attention.self.{name}" for k in numbers for name in ("query", "value"))
    inject_adapter_in_model(LoraConfig(r=8, target_modules=list(targets)), model)
    model.classifier.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.classifier.register_forward_pre_hook(lambda _module, args: (args[0].float(),))
    choose_attention(model, "auto" if ours else "sdpa")
    if ours:
        skip_unread(model)
    # Not "auto": on a busy machine each arm's own measurement could choose otherwise.
    accelerate(model, "onednn" if ours and dtype == torch.float32 else "off")
    return model, targets


def batches(options: argparse.Namespace, size: int, generator: torch.Generator) -> list[Batch]:
    """Batches of texts of unequal lengths, from half of the longest on."""
    out = []
    for _ in range(options.batches):
        lengths = torch.randint(options.tokens // 2, options.tokens, (size,), generator=generator)
        lengths[0] = options.tokens
        mask = (torch.arange(options.tokens) < lengths[:, None]).long()
        ids = torch.randint(1, 2000, mask.shape, generator=generator) * mask
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


def round_of(model: Any, given: list[Batch], prefix: ActivationCache | None, afresh: bool) -> Callable[[], None]:
    """A step on each batch."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    together = {name: torch.cat([batch[name] for batch in given]) for name in given[0]}
    model.train()

    def run() -> None:
        if prefix is not None:
            if afresh:
                prefix.clear(prefix.capacity)
            prefix.prepare(together)
        for batch in given:
            optimiser.zero_grad()
            labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
            functional.cross_entropy(model(**batch).logits, labels).backward()
            optimiser.step()

    return run


def main() -> None:
    """Prints one table."""
    options = arguments()
    torch.set_num_threads(options.threads)
    print(f"{machine()}; {options}\n")
    print(f"| ms a step, gain over PEFT on the top layers | {' | '.join(ARMS)} |")
    print("|---|" + "---|" * len(ARMS))
    for name in options.dtypes:
        dtype = getattr(torch, name)
        for size in options.batch:
            given = batches(options, size, torch.Generator().manual_seed(0))
            runs: dict[str, Callable[[], None]] = {}
            for arm in ARMS:
                ours = arm.startswith("+")
                model, targets = classifier(options, dtype, options.layers if "all" in arm else options.top, ours)
                prefix = None
                if "cache" in arm:
                    prefix = open_cache(model, targets, ("classifier",), {k: v[[1, 0]] for k, v in given[0].items()})
                    prefix.clear(options.batches * size * options.tokens)
                runs[arm] = round_of(model, given, prefix, "first" in arm)
            medians = {arm: median(s) / len(given) for arm, s in in_turn(runs, options.repeats).items()}
            reference = medians["PEFT, top layers"]
            cells = [f"{1e3 * taken:.0f} ms, {reference / taken:.2f}x" for taken in medians.values()]
            print(f"| {name}, batch {size}, {options.tokens} tokens | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
