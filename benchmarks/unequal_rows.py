"""Rows of unequal length: is attention without padding (torch's nested tensors) faster than passes of like length?

    python benchmarks/unequal_rows.py
    python benchmarks/unequal_rows.py --rows 16 --width 768 --heads 12

One frozen encoder layer, forward and backward, over rows with the lengths of the quickstart's texts:

- passes: each padded to its longest row (`fedlora.training.row_groups`), as fedlora trains decoders, and with privacy;
- nested: all rows packed one after the other, so that no product sees padding, and attention by
  `scaled_dot_product_attention` on nested (jagged) tensors;
- packed, passes: products packed too, and attention alone in padded passes, with the copies between the two layouts,
  as fedlora trains encoders on a CPU (`fedlora.speedups.unpadding`);
- padded: all rows in one batch.

Medians of CPU time, all arms in turn in one process, one thread; the second column is over that of the passes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from _shapes import in_turn, lengths, machine
from torch import Tensor
from torch.nn import functional

from fedlora.training.row_groups import ATTENTION, ENTRIES, LAUNCH, WEIGHTS, PassCost, cut


class Layer:
    """An encoder layer of random weights over states [rows, width].

    Args:
        width: of the states.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        self.heads = heads
        shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "out": (width, width)}
        shapes |= {"up": (4 * width, width), "down": (width, 4 * width)}
        self.weights = {name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}

    def __call__(self, states: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The layer, with attention by a function of queries, keys and values [rows, width]."""
        q, k, v = (functional.linear(states, self.weights[name]) for name in "qkv")
        states = self._normed(states + functional.linear(attend(q, k, v), self.weights["out"]))
        inner = functional.gelu(functional.linear(states, self.weights["up"]))
        return self._normed(states + functional.linear(inner, self.weights["down"]))

    def padded(self, count: int, mask: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention over `count` rows of one length, with a mask [count, 1, 1, tokens] of what is no padding."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(count, -1, self.heads, x.shape[1] // self.heads).transpose(1, 2) for x in (q, k, v))
            found = functional.scaled_dot_product_attention(q, k, v, mask)
            return found.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])

        return attend

    def nested(self, offsets: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention over rows that begin at `offsets` in the packed states."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shape = (len(q), self.heads, q.shape[1] // self.heads)
            q, k, v = (
                torch.nested.nested_tensor_from_jagged(x.view(shape), offsets).transpose(1, 2) for x in (q, k, v)
            )
            found = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return found.values().reshape(-1, shape[1] * shape[2])

        return attend

    @staticmethod
    def _normed(states: Tensor) -> Tensor:
        return functional.layer_norm(states, states.shape[-1:])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = Layer(args.width, args.heads)
    tokens = lengths("corpus", "llama", args.rows)
    cost = PassCost(WEIGHTS + LAUNCH["cpu"] / args.width**2, ATTENTION * args.width, ENTRIES["cpu"] // args.width)
    passes = cut(tokens, cost)
    order = np.concatenate(passes)
    tokens, sizes = tokens[order], [len(group) for group in passes]
    states = torch.randn(int(tokens.sum()), args.width, requires_grad=True)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(tokens)]))

    def places(rows: slice) -> tuple[Tensor, Tensor]:
        """Where each token of a padded batch of some rows is in the packed states, and which are no padding."""
        here = np.arange(int(tokens[rows].max()))
        inside = here < tokens[rows, None]
        index = np.where(inside, offsets.numpy()[:-1][rows, None] + here, 0)
        return torch.from_numpy(index.ravel()), torch.from_numpy(inside)

    ends = np.cumsum(sizes).tolist()
    batches = [places(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    whole = places(slice(0, len(tokens)))

    def in_batches(parts: list[tuple[Tensor, Tensor]]) -> None:
        for index, inside in parts:
            mask = None if inside.all() else inside[:, None, None]
            out = layer(states[index], layer.padded(len(inside), mask))
            out[inside.flatten()].sum().backward()

    def nested() -> None:
        layer(states, layer.nested(offsets)).sum().backward()

    def packed() -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found = []
            for index, inside in batches:
                mask = None if inside.all() else inside[:, None, None]
                found.append(layer.padded(len(inside), mask)(q[index], k[index], v[index])[inside.flatten()])
            return torch.cat(found)

        layer(states, attend).sum().backward()

    arms = {
        "passes": lambda: in_batches(batches),
        "nested": nested,
        "packed, passes": packed,
        "padded": lambda: in_batches([whole]),
    }
    gradients: dict[str, Tensor] = {}

    def alone(name: str, run: Callable[[], None]) -> None:
        states.grad = None
        run()
        assert states.grad is not None
        gradients[name] = states.grad

    seconds = in_turn({name: partial(alone, name, run) for name, run in arms.items()}, args.repeats)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients["passes"], atol=1e-4), name
    paid = sum(inside.numel() for _, inside in batches) / int(tokens.sum())
    print(f"{machine()}; {args.rows} rows, {len(passes)} passes, padded to {paid:.2f} times their tokens")
    print("\n| one layer, there and back | CPU ms | over the passes |\n|---|---|---|")
    usual = statistics.median(seconds["passes"])
    for name, found in seconds.items():
        print(f"| {name} | {1e3 * statistics.median(found):.0f} | {statistics.median(found) / usual:.2f} |")


if __name__ == "__main__":
    main()
