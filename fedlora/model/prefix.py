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
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedlora.model.dropout import dropout_in
from fedlora.model.targets import layer_of

SERVED = ({"input_ids"}, {"input_ids", "attention_mask"}, {"pixel_values"})
"""Arguments of the calls that are served; "labels" may stand beside them."""
TOGETHER = 2048
"""Tokens in a group of examples that are computed together."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative, of the logits of a padded batch; 0.05 for narrower dtypes."""


class UnfitError(Exception):
    """The prefix of a model cannot be kept; says why."""


class _Reached(BaseException):
    """Ends a forward pass at the lowest adapted layer."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


@final
class Prefix:
    """Keeps what enters the lowest adapted layer of a model; made by `open_prefix`.

    Args:
        model: that is called with the examples.
        lower: the layers below, in order.
        first: the lowest adapted layer.
        embeddings: what makes the first layer's input, if it can be left out too.

    Attributes:
        capacity: tokens to keep at most; further examples are computed anew each time, to the same bits.
        depth: number of layers below.
        company: whether examples of one length are computed together; `open_prefix` has seen that no bit depends on it.
        how: what the opener wants to know when it meets this cache again.
        hits: examples that were handed out.
        fills: examples that were computed.
    """

    def __init__(
        self, model: nn.Module, lower: list[nn.Module], first: nn.Module, embeddings: nn.Module | None
    ) -> None:
        self.hits = self.fills = self.capacity = 0
        self.how: Hashable = None
        self.depth = len(lower)
        self.company = False
        self._model, self._first = model, first
        self._skipped = lower if embeddings is None else [embeddings, *lower]
        self._places: dict[bytes, tuple[int, int]] = {}
        self._flat: Tensor | None = None
        self._used = 1  # row 0 is what stands in the place of padding
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
            return _reach(self._model, self._first, inputs)

    # ------------------------------------------------------------------------------------------ around each call

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._computing:
            return
        self._after()  # an interrupt ends a call without its last hook
        inputs = {name: value for name, value in kwargs.items() if value is not None and name != "labels"}
        if args or set(inputs) not in SERVED:
            return
        lengths = _lengths(inputs)
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
        lengths = _lengths(inputs) if set(inputs) in SERVED else None
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
                size = max(1, TOGETHER // length) if self.company and length > 0 else 1
                group, pending = pending[:size], pending[size:]
                chosen = [row for _, row in group]
                self.fills += len(group)
                part = self.reach({n: v[chosen] if length < 0 else v[chosen, :length] for n, v in inputs.items()})
                for (key, _), states in zip(group, part, strict=True):
                    if not self._keep(key, states):
                        found[key] = states
                if room is not None:
                    room = self.capacity + 1 - self._used
        return {row: found[key] for row, key in enumerate(keys) if key in found}

    def _keep(self, key: bytes, states: Float[Tensor, "n d"]) -> bool:
        if self._flat is None:
            # Pages of it that nothing was written to take no memory. Evaluation must not make it an inference tensor.
            with torch.inference_mode(False):
                self._flat = states.new_empty(self.capacity + 1, states.shape[1])
                self._flat[0] = 0
        end = self._used + len(states)
        if end > len(self._flat):
            return False
        self._flat[self._used : end] = states
        self._places[key] = (self._used, len(states))
        self._used = end
        return True


def open_prefix(
    model: nn.Module, targets: tuple[str, ...], heads: tuple[str, ...], inputs: Mapping[str, Tensor]
) -> Prefix:
    """A cache for a model that can have one; tried out on a batch. It keeps nothing until `clear` gives it room.

    Args:
        model: in which `requires_grad` may be set or not; its mode is left as it is.
        targets: names of the adapted modules.
        heads: names of the modules trained in full.
        inputs: a batch of two examples of unequal length, if there are such, the shorter first.

    Raises:
        UnfitError: the model cannot have one.
    """
    owner, number = _lowest(model, targets)
    layers = model.get_submodule(owner)
    assert isinstance(layers, nn.ModuleList)
    lower, first = list(layers)[:number], layers[number]
    lengths = _lengths(inputs) if set(inputs) in SERVED else None
    if lengths is None:
        raise UnfitError("the task's batches are more than token ids and masks, or pixels")
    modes = {module: module.training for module in model.modules()}
    prefix: Prefix | None = None
    try:
        model.eval()
        seen, outputs, states = _traced(model, first, inputs)
        trained = [part for name in (*targets, *heads) for part in model.get_submodule(name).modules()]
        if any(module in seen for module in trained):
            raise UnfitError("a module below the lowest adapted layer is trained too")
        if chance := dropout_in({*seen, *(module for layer in lower for module in layer.modules())}):
            raise UnfitError(f"there is dropout ({chance:g}) below the adapters; model.dropout = 0 turns it off")
        for layer in lower:
            if not isinstance(outputs.get(layer), torch.Size) or outputs[layer] != states.shape:
                raise UnfitError("its layers give more than hidden states to each other")
        model.train()
        for module in modes:
            if getattr(module, "running_mean", None) is not None:
                module.eval()  # as `Base.train_mode` leaves them
        if not torch.equal(_reach(model, first, inputs), states):
            raise UnfitError("its lower layers compute something else in training")
        model.eval()
        embeddings = _embeddings(model, owner)
        if embeddings is not None and outputs.get(embeddings) != states.shape:
            embeddings = None
        wanted = _logits(model, inputs)
        alone = _one(inputs, 0, int(lengths[0]))
        wanted_alone = _logits(model, alone)
        prefix = Prefix(model, lower, first, embeddings)
        if not torch.equal(_logits(model, alone), wanted_alone):
            raise UnfitError("its upper layers use more of the lower ones than their hidden states")
        gap = float((_logits(model, inputs) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not gap <= ROUNDING.get(states.dtype, 0.05):  # a head may be wider than the layers
            raise UnfitError(f"it does not ignore padding (its logits move by {gap:.1g})")
        prefix.clear()
        prefix.company = all(_same_in_company(prefix, _one(inputs, row, int(n))) for row, n in enumerate(lengths))
        return prefix
    except Exception as error:
        if prefix is not None:
            prefix.close()
        if isinstance(error, UnfitError):
            raise
        raise UnfitError(
            f"it was tried and failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _same_in_company(prefix: Prefix, one: Mapping[str, Tensor]) -> bool:
    """Whether an example has the same states, bit by bit, wherever it stands among others of its length."""
    alone = prefix.reach(one)
    most = max(1, TOGETHER // alone.shape[1])
    return all(
        torch.equal(
            prefix.reach({n: v.repeat(k, *[1] * (v.dim() - 1)) for n, v in one.items()}), alone.expand(k, -1, -1)
        )
        for k in {2, 3, 8, 17}
        if k <= most
    )


def lower_kinds(model: nn.Module, targets: tuple[str, ...]) -> frozenset[type]:
    """The classes of the modules in the layers below the adapters, and so their kernels.

    Raises:
        UnfitError: there are none.
    """
    owner, number = _lowest(model, targets)
    layers = model.get_submodule(owner)
    assert isinstance(layers, nn.ModuleList)
    return frozenset(type(module) for layer in list(layers)[:number] for module in layer.modules())


def _lowest(model: nn.Module, targets: tuple[str, ...]) -> tuple[str, int]:
    """The list of layers with the adapters, and the lowest layer that has one."""
    places = [place for name in targets if (place := layer_of(model, name)) is not None]
    if len({owner for owner, _ in places}) != 1:
        raise UnfitError("its adapters are not all in one list of layers")
    owner, number = min(places, key=lambda place: place[1])
    if number == 0:
        raise UnfitError('the first layer has an adapter; adapter.layers = "top:2" adapts the upper ones alone')
    return owner, number


def _lengths(inputs: Mapping[str, Tensor]) -> np.ndarray | None:
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


def _keys(inputs: Mapping[str, Tensor], lengths: np.ndarray) -> list[bytes]:
    """A hash of each example's content [b]."""
    content = next(inputs[name] for name in ("input_ids", "pixel_values") if name in inputs).detach().cpu().contiguous()
    table = (content.view(torch.int16) if content.dtype == torch.bfloat16 else content).numpy()
    parts = (table[row] if length < 0 else table[row, :length] for row, length in enumerate(lengths))
    return [hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in parts]


def _one(inputs: Mapping[str, Tensor], row: int, length: int) -> dict[str, Tensor]:
    """One example without padding."""
    return {n: v[row : row + 1] if length < 0 else v[row : row + 1, :length] for n, v in inputs.items()}


def _reach(model: nn.Module, first: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "b t d"]:
    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(states, Tensor):
            raise UnfitError("its layers do not take hidden states first")
        raise _Reached(states.detach())

    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    except _Reached as reached:
        return reached.states
    finally:
        handle.remove()
    raise UnfitError("its forward pass does not come to the adapted layers")


def _traced(
    model: nn.Module, first: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[set[nn.Module], dict[nn.Module, torch.Size | None], Tensor]:
    """The modules that are called before the lowest adapted layer, the shapes of what they gave, and its input."""
    seen: set[nn.Module] = set()
    shapes: dict[nn.Module, torch.Size | None] = {}

    def enter(module: nn.Module) -> Callable[..., None]:
        return lambda *_: seen.add(module)

    def leave(module: nn.Module) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            shapes[module] = output.shape if isinstance(output, Tensor) else None

        return note

    handles = [m.register_forward_pre_hook(enter(m)) for m in model.modules()]
    handles += [m.register_forward_hook(leave(m)) for m in model.modules()]
    try:
        states = _reach(model, first, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen - {first}, shapes, states


def _embeddings(model: nn.Module, owner: str) -> nn.Module | None:
    """The module that makes the layers' input, where a family has one for it (BERT and its kin, ViT)."""
    while owner:
        owner = owner.rpartition(".")[0]
        found = getattr(model.get_submodule(owner), "embeddings", None)
        if isinstance(found, nn.Module):
            return found
    return None


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of a batch; a language model's at padding, which nobody looks at, are zero."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    mask = inputs.get("attention_mask")
    if mask is None or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return logits
    return logits.masked_fill((mask == 0)[..., None], 0.0)
