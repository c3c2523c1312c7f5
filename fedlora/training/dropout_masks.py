"""Each part of a batch has its own stream of dropout masks, whoever is beside it and however far its texts are padded.

While `Streams` is entered, torch's dropout, the dropout inside its fused attention, and stochastic depth draw a part's
masks from that part's generator, in the shape that the part has in a batch of its own. In plain training a part is a
client, and its masks follow from the run's seed. In private training a part is one example, and its masks come from
the operating system's randomness: masks that followed from a public seed and a place in the batch would let one
example change all others' gradients (DP-SGD's sensitivity was 15 C with 200 others at p = 0.1).

On a CPU the bits come from numpy's SFC64 through one comparison: torch's own dropout takes some ten times as long
there, which is a quarter of a small encoder's training step. The probability is rounded to a multiple of 2^-16 and the
scale follows it exactly.

What draws random numbers in another way is not seen here; `Watch` notices it.

Shapes: n = rows of the joint batch, t = its tokens, h = heads, d = features.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LEVELS = 1 << 16  # of a 16-bit draw


@dataclass(frozen=True)
class Part:
    """Rows of the joint batch that share a stream: one client's, or one example.

    Args:
        rows: the first, and one after the last.
        tokens: in the part's own longest row; None where nothing is padded.
        stream: draws the part's masks.
    """

    rows: tuple[int, int]
    tokens: int | None
    stream: Stream


class Stream:
    """One part's random bits.

    Args:
        seed: decides all its masks; a device other than the CPU takes its low 63 bits.
        device: on which the masks are wanted.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device

    # Made when they are first wanted: in most fine-tuning nothing is dropped out.

    @cached_property
    def _bits(self) -> np.random.SFC64 | None:
        return np.random.SFC64(self._seed) if self._device.type == "cpu" else None

    @cached_property
    def _generator(self) -> torch.Generator | None:
        if self._device.type == "cpu":
            return None
        return torch.Generator(self._device).manual_seed(self._seed & ((1 << 63) - 1))

    @property
    def state(self) -> Any:
        """Where the stream is, to be set again."""
        return self._generator.get_state() if self._bits is None and self._generator else self._bits.state  # type: ignore[union-attr]

    @state.setter
    def state(self, value: Any) -> None:
        if self._bits is None and self._generator:
            self._generator.set_state(value)
        else:
            self._bits.state = value  # type: ignore[union-attr]

    def fill(self, noise: Tensor, p: float) -> None:
        """Write 0 with probability p and 1 / (1 - p) otherwise into a tensor."""
        if self._bits is None:
            drawn = torch.empty(noise.shape, dtype=noise.dtype, device=noise.device)
            noise.copy_(drawn.bernoulli_(1 - p, generator=self._generator).div_(1 - p))
            return
        cut = min(round(p * LEVELS), LEVELS - 1)
        bits = self._bits.random_raw(-(-noise.numel() // 4)).view(np.uint16)[: noise.numel()].reshape(noise.shape)
        kept = bits >= np.uint16(cut)
        if noise.dtype in (torch.float32, torch.float64):
            out = noise.numpy()
            np.multiply(kept, out.dtype.type(LEVELS / (LEVELS - cut)), out=out)
        else:
            noise.copy_(torch.from_numpy(kept)).mul_(LEVELS / (LEVELS - cut))

    def uniform(self, out: Tensor) -> None:
        """Write numbers from [0, 1) into a tensor."""
        if self._bits is None:
            out.copy_(torch.rand(out.shape, dtype=out.dtype, device=out.device, generator=self._generator))
            return
        drawn = (self._bits.random_raw(out.numel()) >> np.uint64(40)).astype(np.float64) / (1 << 24)  # exact in float32
        out.copy_(torch.from_numpy(drawn).view(out.shape))


Masks: TypeAlias = Callable[[np.ndarray], Sequence[Stream]]
"""Positions of examples in the training set [b] -> a stream for each of them, for one forward pass."""


def secret_masks(device: torch.device) -> Masks:
    """A fresh stream for each example of each forward pass, seeded by the operating system.

    On a CPU every example has a stream of its own. Elsewhere one secret stream serves all examples in turn, since a
    generator for each would cost more than the training step: none of its numbers is used twice, so that no example's
    masks tell or change anything of another's there either.
    """
    if device.type != "cpu":
        shared = Stream(int.from_bytes(os.urandom(32), "big"), device)
        return lambda indices: [shared] * len(indices)
    return lambda indices: [Stream(int.from_bytes(os.urandom(32), "big"), device) for _ in indices]


def example_parts(batch: Mapping[str, Tensor], tokens: int | None, streams: Sequence[Stream]) -> list[Part]:
    """Each row of a batch as a part of its own.

    Args:
        batch: on the CPU; where its attention mask ends, a row's padding begins.
        tokens: in each row, padding included; None where nothing is padded.
        streams: one for each row.
    """
    if streams and all(stream is streams[0] for stream in streams):
        return [Part((0, len(streams)), tokens, streams[0])]
    own: list[int | None] = [tokens] * len(streams)
    mask = batch.get("attention_mask")
    if tokens is not None and mask is not None and mask.shape == (len(streams), tokens):
        places = torch.arange(1, tokens + 1)
        own = list((places * (mask != 0)).amax(dim=1).tolist())
    return [Part((row, row + 1), width, stream) for row, (width, stream) in enumerate(zip(own, streams, strict=True))]


class Streams(TorchFunctionMode):
    """Inside, every dropout is drawn part by part; set `parts` before each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: Sequence[Part] = ()
        self.tokens: int | None = None
        """Of the joint batch; None where nothing is padded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Torch calls this in place of every function while the mode is on."""
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and _dropout_of(args, kwargs):
            return self._attention(*args, **kwargs)
        if func is torch.rand and (shape := self._paths(args, kwargs)) is not None:
            return self._depth(shape, kwargs)
        return func(*args, **kwargs)

    def _paths(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape [n, 1, ...] of one number a row, with which stochastic depth (arXiv 1603.09382) is drawn."""
        shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        plain = shape and all(isinstance(size, int) for size in shape) and not kwargs.keys() - {"dtype", "device"}
        rows = self.parts[-1].rows[1] if self.parts else 0
        return shape if plain and len(shape) > 1 and shape[0] == rows and math.prod(shape) == rows else None

    def _depth(self, shape: tuple[int, ...], kwargs: Mapping[str, Any]) -> Tensor:
        out = torch.empty(shape, **kwargs)
        for part in self.parts:
            part.stream.uniform(out[part.rows[0] : part.rows[1]])
        return out

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        if not training or p == 0.0 or not input.numel():
            return input
        noise = self.noise(input.shape, p, input)
        return input.mul_(noise) if inplace else input * noise

    def noise(self, shape: torch.Size, p: float, like: Tensor) -> Tensor:
        """The factors of one dropout.

        Args:
            shape: [n, ...]; tokens are the second of three dimensions, the last two of four where both are `t`, and the
                last of four where there is one query.
            p: probability of a zero.
            like: a tensor of the wanted dtype and device.

        Raises:
            RowsError: the first dimension is not the batch's rows, so that nobody knows whose entry is whose.
        """
        noise = torch.empty(shape, dtype=like.dtype, device=like.device)
        if len(self.parts) == 1 and self.parts[0].tokens == self.tokens:
            self.parts[0].stream.fill(noise, p)
            return noise
        if shape[0] != self.parts[-1].rows[1]:
            raise RowsError(f"a dropout sees {shape[0]} rows where the batch has {self.parts[-1].rows[1]}")
        for part in self.parts:
            own = noise[part.rows[0] : part.rows[1]]
            if part.tokens != self.tokens and part.tokens is not None:
                own.fill_(1.0)
                if len(shape) == 3 and shape[1] == self.tokens:
                    own = own[:, : part.tokens]
                elif len(shape) == 4 and shape[3] == self.tokens and shape[2] in (1, self.tokens):
                    own = own[:, :, : part.tokens, : part.tokens]
            part.stream.fill(own, p)
        return noise

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` in two products, with masks of our own."""
        if enable_gqa and key.shape[1] != query.shape[1]:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = torch.matmul(query * scale, key.transpose(-2, -1))
        least = torch.finfo(scores.dtype).min
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, least)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, least) if attn_mask.dtype == torch.bool else scores + attn_mask
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
        return torch.matmul(weights * self.noise(weights.shape, dropout_p, weights), value)


class RowsError(Exception):
    """A layer sees its rows in another form than the batch has them, so that clients cannot be told apart."""


class Watch:
    """Notices random numbers drawn from the default generators of torch, numpy and Python, which no part owns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.drawn = False

    def __enter__(self) -> Watch:
        self._before = self._state()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (tensors, others), (now, after) = self._before, self._state()
        self.drawn = others != after or any(not torch.equal(a, b) for a, b in zip(tensors, now, strict=True))

    def _state(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        states = [torch.default_generator.get_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        elif self._device.type == "mps":
            states.append(torch.mps.get_rng_state())
        _, words, place, *_ = np.random.get_state(legacy=True)  # noqa: NPY002 - what others draw from
        return states, (words.tobytes(), place, random.getstate())  # type: ignore[union-attr]


def drops_out(model: nn.Module) -> bool:
    """Whether anything in a model may be dropped out while it trains, by its modules' and its configs' values.

    Private training does not ask: it always draws masks by example.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        owners = [module, *_configs(getattr(module, "config", None))]
        if any("drop" in name and _is_chance(value) for owner in owners for name, value in vars(owner).items()):
            return True
    return False


def _configs(config: Any) -> Iterator[Any]:
    """A model's config, and those inside it (a text and a vision model's)."""
    if hasattr(config, "to_dict"):
        yield config
        for inner in vars(config).values():
            yield from _configs(inner)


def _is_chance(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _dropout_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
