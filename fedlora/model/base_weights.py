"""The frozen base's weights and their versions: W = (W0 + acc) from the pristine W0, in one rounding.

Rules that change the base (FLoRA, FedEx-LoRA) send base updates. A base that followed every one of them and one that
got their compacted sum hold the same bits: both call `fedlora.aggregators.accumulate`, in float32 on the CPU.
Adding each change to a bfloat16 weight instead would lose 33% of a change of 1e-4 and 90% of one of 1e-5.

Shapes: i = d_in, o = d_out, *b = any batch dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedlora.adapter import AdapterState, LoraPair
from fedlora.aggregators import BaseUpdate, accumulate, as_pair
from fedlora.errors import ModelError, nearest
from fedlora.lowrank import DeltaSum, stack
from fedlora.model.targets import is_linear, is_transposed, linear_shape

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@final
class BaseWeights:
    """Versions of the linear layers of one base model.

    A layer whose weight cannot take an addition (it is quantised) carries the change beside it, in factored form, as
    an extra term of its forward: x A^T B^T.

    Args:
        layers: module name -> the base's own linear layer (not PEFT's wrapper around it).

    Attributes:
        version: that the weights have; 0 is the pristine base.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self._pristine: dict[str, Tensor] = {}
        self._acc: dict[str, Tensor] = {}
        self._carried = DeltaSum()
        self._hooks: dict[str, RemovableHandle] = {}
        self.version = 0

    @property
    def changed(self) -> frozenset[str]:
        """Names of the layers whose weights are not the pristine ones."""
        return frozenset(self._acc) | self._carried.names

    def rebase(self, version: int, base_updates: Sequence[BaseUpdate]) -> None:
        """Bring the weights to a version.

        Versions are numbers: version 3 of one run is not version 3 of another. Whoever changes from one history to
        another goes through version 0.

        Args:
            version: 0 is the pristine base.
            base_updates: a log with a chain that leads there from the version held, or from 0. Not read if the base is
                there already.

        Raises:
            ModelError: if the updates do not lead there, or do not fit the model; the base is then as it was.
        """
        if version == self.version:
            return
        chain = _chain(base_updates, self.version, version)
        for base_update in chain:
            self._refuse_misfit(base_update)
        starts_anew = not chain or chain[0].since == 0
        acc: dict[str, Tensor] = {} if starts_anew else self._acc
        carried = DeltaSum() if starts_anew else self._carried
        for base_update in chain:
            absorbed, beside = self._split(base_update)
            acc = accumulate(acc, absorbed)
            carried.add(beside)
        self._absorb(acc)
        self._carry(carried)
        self.version = version

    def merged(self, name: str, delta: Float[Tensor, "o i"] | None = None) -> Tensor:
        """W of a layer at the version held, plus a change, rounded once to the weight's dtype; as the layer stores it.

        Raises:
            ModelError: if the layer's weight cannot take an addition.
        """
        layer = self._layers[name]
        if not absorbs(layer):
            raise ModelError(
                f"the weight of {name!r} is quantised, and nothing can be merged into it: export an adapter, or load "
                "the base in float32 or bfloat16",
                code="weight-quantised",
            )
        change = self._acc.get(name)
        if delta is not None:
            change = delta if change is None else change + delta
        pristine = self._pristine.get(name, layer.weight.detach())  # type: ignore[operator]
        return pristine.clone() if change is None else _sum(pristine, change, is_transposed(layer))

    def pristine(self, name: str) -> Float[Tensor, "o i"]:
        """W of a layer at version 0, on the CPU, in float32 or wider.

        Raises:
            ModelError: if the layer's weight is quantised.
        """
        layer = self._layers[name]
        if not absorbs(layer):
            raise ModelError(
                f"the weight of {name!r} is quantised, and no adapter can be initialised from it: set adapter.method "
                "= 'lora', or load the base in float32 or bfloat16",
                code="weight-quantised",
            )
        weight = self._pristine.get(name, layer.weight.detach())  # type: ignore[operator]
        weight = weight.to("cpu", torch.promote_types(weight.dtype, torch.float32))
        return weight.T if is_transposed(layer) else weight

    def discard(self) -> None:
        """Let go of all copies of weights; nothing can be rebased afterwards."""
        self._layers.clear()
        self._pristine.clear()
        self._acc.clear()

    def _split(self, base_update: BaseUpdate) -> tuple[BaseUpdate, dict[str, LoraPair]]:
        """The part of a base update that goes into weights, and the part that is carried beside them."""
        absorbed = {n: p for n, p in base_update.change.pairs.items() if absorbs(self._layers[n])}
        dense = {n: d for n, d in base_update.change.dense.items() if absorbs(self._layers[n])}
        beside = {n: p for n, p in base_update.change.pairs.items() if n not in absorbed}
        beside.update({n: as_pair(d) for n, d in base_update.change.dense.items() if n not in dense})
        return BaseUpdate(base_update.since, base_update.version, AdapterState(absorbed, dense)), beside

    @torch.no_grad()
    def _absorb(self, acc: Mapping[str, Tensor]) -> None:
        for name in self._pristine.keys() - acc.keys():
            self._layers[name].weight.copy_(self._pristine.pop(name))  # type: ignore[operator]
        for name, change in acc.items():
            weight: Tensor = self._layers[name].weight  # type: ignore[assignment]
            if name not in self._pristine:
                self._pristine[name] = weight.detach().to("cpu", copy=True)  # a GPU has no room for a second copy
            pristine = self._pristine[name]
            weight.copy_(_sum(pristine, change, is_transposed(self._layers[name])))
        self._acc = dict(acc)

    def _carry(self, carried: DeltaSum) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {
            name: self._layers[name].register_forward_hook(_adds(self._layers[name], stack(carried.terms(name))))
            for name in sorted(carried.names)
        }
        self._carried = carried

    def _refuse_misfit(self, base_update: BaseUpdate) -> None:
        shapes = {n: (p.B.shape[0], p.A.shape[1]) for n, p in base_update.change.pairs.items()}
        shapes.update({n: tuple(d.shape) for n, d in base_update.change.dense.items()})  # type: ignore[misc]
        for name, shape in shapes.items():
            if name not in self._layers:
                raise ModelError(
                    f"a base update changes {name!r}, which is not a linear layer of the base; "
                    f"{nearest(name, self._layers)}",
                    code="no-such-module",
                )
            own = linear_shape(self._layers[name])
            if shape != own:
                raise ModelError(
                    f"a base update changes {name!r} by {list(shape)}, and the layer is {list(own)}: server and "
                    "client must load the same base",
                    code="shape-mismatch",
                )


def absorbs(layer: nn.Module) -> bool:
    """Whether a layer's weight is a plain floating tensor, to which a change can be added."""
    weight = getattr(layer, "weight", None)
    # A quantised weight may be stored in a floating dtype too, as its packed bits (bitsandbytes) or in 8 bits.
    return type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor and weight.dtype in FLOATING  # type: ignore[union-attr]


def plain_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a base model before anything was injected, by name."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def _chain(base_updates: Sequence[BaseUpdate], here: int, version: int) -> Sequence[BaseUpdate]:
    """The part of a log that leads from version `here`, or from 0, to `version`; the shortest such part."""
    if version == 0:
        return ()
    starts = [
        i
        for i, base_update in enumerate(base_updates)
        if base_update.since in (0, here) and base_update.since < version
    ]
    if not starts:
        first = f"the updates start at {base_updates[0].since}" if base_updates else "there are no updates"
        raise ModelError(
            f"the base is at version {here} and needs version {version}, and {first}: send the base updates from "
            f"{here} or from 0",
            code="base-update-gap",
        )
    at = base_updates[starts[-1]].since
    chain: list[BaseUpdate] = []
    for base_update in base_updates[starts[-1] :]:
        if base_update.since != at:
            raise ModelError(
                f"the base updates are not consecutive, one ends at version {at} and the next starts at "
                f"{base_update.since}: send the missing ones too",
                code="base-update-gap",
            )
        chain.append(base_update)
        at = base_update.version
        if at >= version:
            break
    if at != version:
        raise ModelError(
            f"the base updates lead to version {at} of the base, not to {version}: send those up to {version}",
            code="base-update-gap",
        )
    return chain


def _sum(pristine: Tensor, change: Float[Tensor, "o i"], transposed: bool) -> Tensor:
    wide = torch.promote_types(pristine.dtype, torch.float32)
    change = (change.T if transposed else change).to(pristine.device, wide)
    return (pristine.to(wide) + change).to(pristine.dtype)


def _adds(layer: nn.Module, pair: LoraPair) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    # Converted here and not at the first call: that may be in inference mode, whose tensors cannot be trained through.
    device = next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
    A, B = pair.A.to(device, torch.float32) * pair.scale, pair.B.to(device, torch.float32)

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        change = nn.functional.linear(nn.functional.linear(args[0].to(torch.float32), A), B)
        return (output + change).to(output.dtype)

    return hook
