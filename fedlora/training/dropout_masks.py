"""Each row of a batch has dropout masks of its own, whoever is beside it and however far its text is padded.

While `RowDropout` is entered, torch's dropout, the dropout inside its fused attention, and stochastic depth draw each
row's masks from that row's key: a mask's bit is a function of the key, of how many masks the forward pass has drawn
before, and of the entry's place in the row. So a row has the same masks in a batch of any size and any length. In plain
training the keys follow from the run's seed, the step and the row's place in its client's batch. In private training
they come from the operating system's randomness: masks that followed from a public seed and a place in the batch would
let one example change all others' gradients (DP-SGD's sensitivity was 15 C with 200 others at p = 0.1).

The bits are SplitMix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), four draws of
16 bits in a word: the probability is rounded to a multiple of 2^-16, and the scale follows it exactly. torch's own
dropout takes some ten times as long on a CPU, which is a quarter of a small encoder's training step.

What draws random numbers in another way is not seen here; `Watch` notices it.

Shapes: b = rows of the batch, t = its tokens, h = heads, d = features.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedlora.model.device import generator_state
from fedlora.speedups.unpadding import Unpadding

LEVELS = 1 << 16  # of a 16-bit draw
GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

Keys: TypeAlias = UInt64[np.ndarray, "b"]
Masks: TypeAlias = Callable[[np.ndarray], Keys]
"""Positions of examples in the training set [b] -> a key for each of them, for one forward pass."""


def secret_keys(indices: np.ndarray) -> Keys:
    """A fresh key for each example of each forward pass, from the operating system's randomness."""
    return np.frombuffer(os.urandom(8 * len(indices)), dtype=np.uint64)


def row_keys(seed: int, step: int, places: np.ndarray) -> Keys:
    """The keys of some of a client's rows in one of its steps.

    Args:
        seed: the client's in this round.
        step: number of the step, from 0.
        places: of the rows in the client's batch.
    """
    own = _mixed(np.array([(seed + step * GOLDEN) % (1 << 64)], dtype=np.uint64))
    return _mixed(own + places.astype(np.uint64) * np.uint64(GOLDEN))


class RowDropout(TorchFunctionMode):
    """Inside, every dropout is drawn row by row; call `begin` before each forward pass.

    Args:
        strict: whether a dropout whose rows are not the batch's is an error; otherwise it is drawn as one row's.
        unpadding: of the model, where each token may be a row; it gets the part of its row's mask that is at its place.
    """

    def __init__(self, *, strict: bool = True, unpadding: Unpadding | None = None) -> None:
        super().__init__()
        self._strict, self._unpadding = strict, unpadding or Unpadding()
        self._keys: Keys = np.empty(0, np.uint64)
        self._there: dict[torch.device, Tensor] = {}  # the keys on the devices where masks are drawn
        self._drawn = self._added = 0

    def begin(self, keys: Keys) -> None:
        """The keys of the next forward pass's rows."""
        self._keys, self._drawn, self._added, self._there = keys, 0, 0, {}

    def again(self) -> RowDropout:
        """Draws, for the same rows, the masks that come next here; for a forward pass that is repeated later."""
        copy = RowDropout(strict=self._strict, unpadding=self._unpadding)
        copy._keys, copy._drawn, copy._added, copy._there = self._keys, self._drawn, self._added, self._there
        return copy

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
            self._drawn += 1
            rows, salt = self._rows(len(self._keys)), self._drawn * SECOND & (2**64 - 1)
            drawn = _mixed(_mixed(self._keys[:rows] ^ np.uint64(salt))) >> np.uint64(40)  # 24 bits: exact in float32
            return torch.empty(shape, **kwargs).copy_(torch.from_numpy(drawn / (1 << 24)).view(shape))
        return func(*args, **kwargs)

    def _paths(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The shape [b, 1, ...] of one number a row, with which stochastic depth (arXiv 1603.09382) is drawn."""
        shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        plain = shape and all(isinstance(size, int) for size in shape) and not kwargs.keys() - {"dtype", "device"}
        rows = len(self._keys)
        return shape if plain and len(shape) > 1 and shape[0] == rows and math.prod(shape) == rows else None

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        if not training or p == 0.0 or not input.numel():
            return input
        noise = self.noise(input.shape, p, input)
        return input.mul_(noise) if inplace else input * noise

    def noise(self, shape: torch.Size, p: float, like: Tensor) -> Tensor:
        """The factors of one dropout: 0 with probability p, else 1 / (1 - p).

        Args:
            shape: [b, ...].
            p: probability of a zero.
            like: a tensor of the wanted dtype and device.

        Raises:
            RowsError: the first dimension is not the batch's rows, so that nobody knows whose entry is whose.
        """
        cut = min(round(p * LEVELS), LEVELS - 1)
        scale = LEVELS / (LEVELS - cut)
        self._drawn += 1
        draws = self._draws(shape, self._drawn, like.device)
        if isinstance(draws, Tensor):
            return (draws >= cut).to(like.dtype).mul_(scale)
        noise = torch.empty(shape, dtype=like.dtype)
        kept = draws >= np.uint16(cut)
        if noise.dtype in (torch.float32, torch.float64):
            out = noise.numpy()
            np.multiply(kept, out.dtype.type(scale), out=out)
            return noise
        return noise.copy_(torch.from_numpy(kept)).mul_(scale)

    def uniform(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Numbers between -1 and 1, 2^-15 apart. No mask is another for them.

        Args:
            shape: [b, ...].
            like: a tensor of the wanted dtype, float32 or wider, and device.

        Raises:
            RowsError: see `noise`.
        """
        self._added -= 1
        draws = self._draws(shape, self._added, like.device)
        drawn = draws if isinstance(draws, Tensor) else torch.from_numpy(draws.astype(np.int32))
        return drawn.to(like.dtype).mul_(2 / LEVELS).add_(1 / LEVELS - 1)

    def _draws(self, shape: torch.Size, number: int, device: torch.device) -> np.ndarray | Tensor:
        """The numbers of 16 bits of a pass's mask of some number, by numpy on a CPU."""
        salt, tokens = number * SECOND & (2**64 - 1), self._unpadding.tokens
        if tokens is not None and tokens.rows == len(self._keys) and shape[:2] == (len(tokens), 1):
            first, *_ = _strides(len(shape) - 1)
            keys = _mixed(self._keys ^ np.uint64(salt))[tokens.row]
            return _draws(keys + tokens.place.astype(np.uint64) * np.uint64(first), tuple(shape))
        rows = self._rows(shape[0])
        sizes = tuple(shape) if rows == shape[0] else (1, *shape)
        if len(sizes) == 1:
            sizes = (*sizes, 1)
        if device.type == "cpu":
            return _draws(_mixed(self._keys[:rows] ^ np.uint64(salt)), sizes).reshape(shape)
        if device not in self._there:
            self._there[device] = torch.from_numpy(self._keys.view(np.int64)).to(device)
        return _draws_on_device(_mixed_on_device(self._there[device][:rows] ^ _signed(salt)), sizes).reshape(shape)

    def _rows(self, rows: int) -> int:
        """How many rows' keys a mask of `rows` rows goes by, one where it is drawn as one row's."""
        held = len(self._keys)
        if held != rows and held != 1 and self._strict:
            raise RowsError(f"a dropout sees {rows} rows where the batch has {held}")
        return rows if held == rows else 1

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


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, in place."""
    other = words >> np.uint64(30)
    words ^= other
    words *= np.uint64(FIRST)
    np.right_shift(words, np.uint64(27), out=other)
    words ^= other
    words *= np.uint64(SECOND)
    np.right_shift(words, np.uint64(31), out=other)
    words ^= other
    return words


def _strides(dimensions: int) -> list[int]:
    """By what each place in a row moves the generator: powers of an odd number, whatever the sizes."""
    return [pow(GOLDEN, dimensions - axis, 1 << 64) for axis in range(dimensions)]


def _draws(keys: Keys, sizes: tuple[int, ...]) -> np.ndarray:
    """Numbers of 16 bits [b, ...]; an entry's goes by its row's key and its place in the row."""
    inner = (*sizes[1:-1], -(-sizes[-1] // 4))
    words = keys.reshape(-1, *(1 for _ in inner))
    for axis, (size, stride) in enumerate(zip(inner, _strides(len(inner)), strict=True), start=1):
        places = np.arange(size, dtype=np.uint64) * np.uint64(stride)
        words = words + places.reshape(-1, *(1 for _ in inner[axis:]))
    return _mixed(words).view(np.uint16)[..., : sizes[-1]]


def _draws_on_device(keys: Int64[Tensor, "b"], sizes: tuple[int, ...]) -> Tensor:
    """`_draws` by torch, which has no unsigned words: int64 with the same bits, and the draws as int32."""
    inner = (*sizes[1:-1], -(-sizes[-1] // 4))
    words = keys.view(-1, *(1 for _ in inner))
    for axis, (size, stride) in enumerate(zip(inner, _strides(len(inner)), strict=True), start=1):
        places = torch.arange(size, device=keys.device) * _signed(stride)
        words = words + places.view(-1, *(1 for _ in inner[axis:]))
    return _mixed_on_device(words).view(torch.int16).to(torch.int32).bitwise_and_(LEVELS - 1)[..., : sizes[-1]]


def _mixed_on_device(words: Tensor) -> Tensor:
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        words = (words ^ (words >> shift & (1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return words


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


class RowsError(Exception):
    """A layer sees its rows in another form than the batch has them, so that clients cannot be told apart."""


class Watch:
    """Notices random numbers drawn from the default generators of torch, numpy and Python, which no part owns."""

    def __init__(self, *devices: torch.device) -> None:
        self._devices = dict.fromkeys((torch.device("cpu"), *devices))
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
        states = [generator_state(device) for device in self._devices]
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
