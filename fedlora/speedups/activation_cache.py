"""The frozen layers below the lowest adapter, computed once for each example.

Where adapters sit in the upper layers alone (`adapter.layers`), what enters the lowest of these is the same in every
step, round, client and evaluation. It is kept here, and handed out by stand-ins for the lower layers; everything above
them (masks, rotary embeddings, poolers, heads) stays the model's own code.

Examples are known by their content: a hash of the token ids or pixels in a call of the model. So nobody has to say
which examples a batch holds or whose they are, and an example that occurs twice is computed once. Each is computed
without padding, among others of its length alone (or by itself, where trying that out at the start shows in a bit): its
states depend neither on the batch in which it came first nor on what is kept already, and a resumed run repeats bit by
bit. Against the same batch without the cache the products below have other shapes, which shows in rounding only
(nothing at all for one example alone).

A call that does anything else than to put whole, right-padded examples through the model (a packed batch, generation
with a cache) goes through all layers as ever.

Shapes: b = examples in a batch, t = tokens of the longest, n = tokens of one, d = hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.model import Base
from fedlora.progress import activity
from fedlora.speedups.trial import given_to, model_inputs
from fedlora.tasks._base import Examples, Task, length_batches

SERVED = ({"input_ids"}, {"input_ids", "attention_mask"}, {"pixel_values"})
"""Arguments of the calls that are served; "labels" may stand beside them."""
TOGETHER = 2048
"""Tokens in a group of examples that are computed together."""
AT_ONCE = 16384  # tokens that `prepare` puts into one batch, to be taken apart by length


class UnfitError(Exception):
    """The activations of a model's lower layers cannot be kept; says why."""


@final
class ActivationCache:
    """Keeps what enters the lowest adapted layer of a model; made by `fedlora.speedups.cache_choice.open_cache`.

    Args:
        model: that is called with the examples.
        targets: names of the adapted modules.
        lower: the layers below, in order.
        first: the lowest adapted layer.
        embeddings: what makes the first layer's input, if it can be left out too.

    Attributes:
        capacity: tokens to keep at most; further examples are computed anew each time, to the same bits.
        depth: number of layers below.
        grouped: whether examples of one length are computed together; `open_cache` sets it where no bit depends on it.
        made_for: how the lower layers computed when the cache was made; a cache made otherwise is not used again.
        hits: examples that were handed out.
        fills: examples that were computed.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: tuple[str, ...],
        lower: list[nn.Module],
        first: nn.Module,
        embeddings: nn.Module | None,
    ) -> None:
        self.hits = self.fills = self.capacity = 0
        self.made_for: Hashable = None
        self.depth = len(lower)
        self.grouped = False
        self._model, self._targets, self._first = model, frozenset(targets), first
        self._skipped = lower if embeddings is None else [embeddings, *lower]
        self._places: dict[bytes, tuple[int, int]] = {}
        self._flat: Tensor | None = None
        self._used = 1  # row 0 is what stands in the place of padding
        self._picture = 0  # tokens of each picture, once one was computed
        self._computing = False
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def size(self) -> int:
        """Bytes in use."""
        return 0 if self._flat is None else self._used * self._flat.shape[1] * self._flat.element_size()

    def close(self) -> None:
        """Take the hooks off, and forget everything."""
        for handle in self._handles:
            handle.remove()
        self._after()
        self.clear()

    def clear(self, capacity: int = 0) -> None:
        """Forget everything, and keep at most `capacity` tokens from now on."""
        self._places.clear()
        self._flat, self._used = None, 1
        self.capacity, self.hits, self.fills = capacity, 0, 0

    def rebased(self, changed: Set[str]) -> None:
        """Refuse other frozen weights below the adapters, with which all that is kept would be wrong.

        Args:
            changed: names of the layers whose weights are not the pristine ones.

        Raises:
            ModelError: one of them is none of the adapted modules.
        """
        if not changed <= self._targets:
            odd = min(changed - self._targets)
            raise ModelError(
                f"a base update changed {odd!r}, below the adapters: set runtime.prefix_cache = 'off'",
                code="base-update-below-adapters",
            )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While it lasts, the model computes all of its layers, and nothing is kept."""
        before, self._computing = self._computing, True
        try:
            yield
        finally:
            self._computing = before

    def reach(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b t d"]:
        """What enters the lowest adapted layer, computed."""
        with self.aside():
            return reach(self._model, self._first, inputs)

    # ------------------------------------------------------------------------------------------ around each call

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._computing:
            return
        self._after()  # an interrupt ends a call without its last hook
        inputs = {name: value for name, value in kwargs.items() if value is not None and name != "labels"}
        if inputs.get("use_cache") is False:
            del inputs["use_cache"]
        if args or set(inputs) not in SERVED:
            return
        lengths = lengths_of(inputs)
        if lengths is None or not lengths.any():
            return
        states = self._states(inputs, lengths)
        for module in self._skipped:
            self._replaced.append((module, vars(module).get("forward")))
            vars(module)["forward"] = lambda *_args, **_kwargs: states

    def _after(self, *_: Any) -> None:
        while self._replaced:
            module, own = self._replaced.pop()
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own

    # ------------------------------------------------------------------------------------------ what is kept

    def prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """Compute what is not kept yet of some examples and keep it, as far as there is room.

        Args:
            inputs: a batch as the model is called with, of any size; one that is not served is not looked at.
        """
        lengths = lengths_of(inputs) if set(inputs) in SERVED else None
        if lengths is not None:
            self._compute(inputs, lengths, _keys(inputs, lengths), room=self.capacity + 1 - self._used)

    def _states(self, inputs: Mapping[str, Tensor], lengths: np.ndarray) -> Float[Tensor, "b t d"]:
        keys = _keys(inputs, lengths)
        self.hits += sum(key in self._places for key in keys)
        unkept = self._compute(inputs, lengths, keys)
        assert self._flat is not None
        places = [self._places.get(key, (0, 0)) for key in keys]
        if lengths.min() < 0:
            width = max([size for _, size in places] + [len(alone) for alone in unkept.values()])
        else:
            width = int(inputs["input_ids"].shape[1])
        index = np.zeros((len(places), width), dtype=np.int64)
        for row, (start, size) in enumerate(places):
            index[row, :size] = np.arange(start, start + size)
        chosen = torch.from_numpy(index.ravel()).to(self._flat.device)
        states = self._flat.index_select(0, chosen).view(len(places), width, -1)
        for row, alone in unkept.items():
            states[row, : len(alone)] = alone
        return states

    def _compute(
        self, inputs: Mapping[str, Tensor], lengths: np.ndarray, keys: list[bytes], room: int | None = None
    ) -> dict[int, Tensor]:
        """Compute the rows that are not kept, those of one length together; gives back those that find no room."""
        missing: dict[int, dict[bytes, int]] = {}
        for row, (key, length) in enumerate(zip(keys, lengths.tolist(), strict=True)):
            if key not in self._places and length:
                missing.setdefault(length, {}).setdefault(key, row)
        found: dict[bytes, Tensor] = {}
        for length, rows in missing.items():
            pending = list(rows.items())
            while pending and (room is None or room >= length):
                tokens = length if length > 0 else self._picture
                size = max(1, TOGETHER // tokens) if self.grouped and tokens else 1
                group, pending = pending[:size], pending[size:]
                chosen = [row for _, row in group]
                self.fills += len(group)
                part = self.reach({n: v[chosen] if length < 0 else v[chosen, :length] for n, v in inputs.items()})
                if length < 0:
                    self._picture = part.shape[1]
                for (key, _), states in zip(group, part, strict=True):
                    if not self._keep(key, states):
                        found[key] = states
                if room is not None:
                    room = self.capacity + 1 - self._used
        return {row: found[key] for row, key in enumerate(keys) if key in found}

    def _keep(self, key: bytes, states: Float[Tensor, "n d"]) -> bool:
        end, most = self._used + len(states), self.capacity + 1
        if self._flat is None or len(self._flat) < end <= most:
            # On a CPU pages that nothing was written to take no memory; on a GPU it grows by halves.
            rows = most if states.device.type == "cpu" else min(most, end + end // 2)
            # Evaluation must not make it an inference tensor.
            with torch.inference_mode(False):
                held, self._flat = self._flat, states.new_empty(rows, states.shape[1])
                self._flat[0] = 0
                if held is not None:
                    self._flat[: self._used] = held[: self._used]
        if end > len(self._flat):
            return False
        self._flat[self._used : end] = states
        self._places[key] = (self._used, len(states))
        self._used = end
        return True


def prepare(base: Base, task: Task, examples: Examples, rows: np.ndarray) -> None:
    """Compute what a base's cache will be asked for, many examples at once; nothing where the base has no cache.

    Without it the same would be computed batch by batch, to the same bits, in smaller products.

    Args:
        base: whose adapter does not matter.
        task: gives batches.
        examples: the whole training set.
        rows: positions of the examples that will be used, in any order, any number of times.
    """
    cache = base.cache
    if not isinstance(cache, ActivationCache) or not len(rows):
        return
    chosen = np.unique(rows)
    done = 0
    for places in length_batches(np.asarray(examples.lengths)[chosen], AT_ONCE):
        activity.info("computing the frozen layers once: %d of %d examples", done, len(chosen))
        done += len(places)
        try:
            batch = task.collate(examples, chosen[places])
        except Exception:  # whoever owns the broken example will meet it in its own batch, and the others will not
            continue
        cache.prepare(model_inputs(base, task, batch))


def reach(model: nn.Module, first: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b t d"]:
    """What enters the layer `first` when the model is called.

    Raises:
        UnfitError: the call does not come to it, or gives it something else than hidden states first.
    """

    with torch.no_grad():
        given = given_to(first, lambda: model(**inputs))
    if given is None:
        raise UnfitError("its forward pass does not come to the adapted layers")
    args, kwargs = given
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise UnfitError("its layers do not take hidden states first")
    return states.detach()


def _keys(inputs: Mapping[str, Tensor], lengths: np.ndarray) -> list[bytes]:
    """A hash of each example's content [b]."""
    content = next(inputs[name] for name in ("input_ids", "pixel_values") if name in inputs).detach().cpu().contiguous()
    table = (content.view(torch.int16) if content.dtype == torch.bfloat16 else content).numpy()
    parts = (table[row] if length < 0 else table[row, :length] for row, length in enumerate(lengths))
    return [hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in parts]


def lengths_of(inputs: Mapping[str, Tensor]) -> np.ndarray | None:
    """Tokens of each example [b], -1 each where nothing is ever padded; None if padding is not on the right."""
    if "input_ids" not in inputs:
        return np.full(len(next(iter(inputs.values()))), -1)
    ids = inputs["input_ids"]
    if ids.dim() != 2 or not ids.numel():
        return None
    if "attention_mask" not in inputs:
        return np.full(ids.shape[0], ids.shape[1])
    if inputs["attention_mask"].shape != ids.shape:
        return None
    mask = inputs["attention_mask"].detach().cpu().numpy() != 0
    return mask.sum(axis=1) if (mask[:, 1:] <= mask[:, :-1]).all() else None
