"""Many clients' adapters in one model: each layer holds all of them and gives each client's rows its own.

The frozen base sees one batch, the clients' rows one after the other. While `Stacked` is entered, an adapted layer
computes  y = x W^T + s_k (x A_k^T) B_k^T  on client k's rows, with one batched product for all clients of as many rows;
a trained head does the same with its dense weights. PEFT's layers stay where they are, with another `forward` on the
instance, which is taken off again however training ends.

Shapes: k = clients, n = rows of the batch, m = rows and tokens of one client, i = d_in, o = d_out, r = rank,
*t = any dimensions between rows and features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedlora.adapter import AdapterState, times_core
from fedlora.model import Base
from fedlora.model.peft_tuners import ADAPTER
from fedlora.model.quantize import holds_int8
from fedlora.speedups.linear_kernels import OneDnnLinear
from fedlora.speedups.trial import Trial, gap
from fedlora.speedups.unpadding import Tokens, Unpadding
from fedlora.training.dropout_masks import RowsError
from fedlora.training.row_optimizer import Columns, take


@dataclass(frozen=True)
class Block:
    """Clients that follow each other and have equally many rows.

    Args:
        clients: the first, and one after the last.
        rows: the first, and one after the last.
    """

    clients: slice
    rows: slice

    @property
    def size(self) -> int:
        """How many clients."""
        return int(self.clients.stop - self.clients.start)


def blocks_of(rows: Sequence[int]) -> tuple[Block, ...]:
    """Blocks of clients by their numbers of rows, in the order given."""
    blocks: list[Block] = []
    first = begin = 0
    for number, size in enumerate(rows):
        if number + 1 == len(rows) or rows[number + 1] != size:
            end = begin + size * (number + 1 - first)
            blocks.append(Block(slice(first, number + 1), slice(begin, end)))
            first, begin = number + 1, end
    return tuple(blocks)


@dataclass
class Step:
    """What the layers compute with at present.

    Args:
        blocks: whose rows are whose.
        sizes: rows of each client.
        tensors: stacked by name, [k, ...], names as in `AdapterState.tensors`.
        scales: module name -> [k, 1, 1].
    """

    blocks: tuple[Block, ...] = ()
    sizes: Sequence[int] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    _unpadded: tuple[Tokens, tuple[Block, ...]] | None = field(default=None, init=False, repr=False)

    def blocks_in(self, x: Tensor, tokens: Tokens | None) -> tuple[Block, ...]:
        """The blocks of a layer's input, whose rows may be tokens.

        Raises:
            RowsError: its first dimension is not the batch's rows.
        """
        if len(self.blocks) == 1 and self.blocks[0].size == 1:
            same = self.blocks[0].rows.stop == x.shape[0]
            return self.blocks if same else (Block(slice(0, 1), slice(0, x.shape[0])),)
        if tokens is not None and x.shape[0] == len(tokens):
            return self._of_tokens(tokens)
        if x.shape[0] != self.blocks[-1].rows.stop:
            raise RowsError(f"a layer sees {x.shape[0]} rows where the batch has {self.blocks[-1].rows.stop}")
        return self.blocks

    def _of_tokens(self, tokens: Tokens) -> tuple[Block, ...]:
        if self._unpadded is None or self._unpadded[0] is not tokens:
            owners = np.repeat(np.arange(len(self.sizes)), self.sizes)
            held = np.bincount(owners[tokens.row], minlength=len(self.sizes))
            self._unpadded = (tokens, blocks_of(held.tolist()))
        return self._unpadded[1]


@final
class Stacked:
    """A base whose layers hold many clients' adapters; a context manager.

    Args:
        base: one for which `cannot_stack` gives None.
        columns: the layout of the trained tensors.
        adapters: of all clients, from which what is not trained is taken.
        unpadding: of the model.
    """

    def __init__(
        self, base: Base, columns: Columns, adapters: Sequence[AdapterState], unpadding: Unpadding | None = None
    ) -> None:
        self.step = Step()
        self._base, self._columns, self._unpadding = base, columns, unpadding or Unpadding()
        self._changed: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []
        trained = {column.name for column in columns.columns}
        cores = [name for name in adapters[0].tensors(("R",)) if name not in trained]
        self._kept = Columns(adapters, [name for name in base.tensor_names() if name not in trained] + cores)
        self._cored = [name for name in base.targets if adapters[0].pairs[name].core is not None]
        like = torch.empty(0, dtype=base.adapter_dtype, device=base.device)
        self._frozen = self._kept.rows(adapters, like)
        self._scales = like.new_tensor([[adapter.pairs[name].scale for name in base.targets] for adapter in adapters])

    def bind(self, values: Float[Tensor, "k p"], rows: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
        """See `fedlora.training.step.Binding`."""
        tensors = {name: value.detach().requires_grad_() for name, value in self._columns.stacked(values).items()}
        leaves = list(tensors.values())
        if self._kept.columns:
            tensors |= self._kept.stacked(take(self._frozen, rows))
        for name in self._cored:
            core, factors = tensors[f"{name}:R"], tensors.get(f"{name}:F")
            tensors[f"{name}:B"] = times_core(tensors[f"{name}:B"], core if factors is None else core * factors)
        scales = take(self._scales, rows).T[:, :, None, None].unbind()
        self.step = Step(blocks_of(sizes), sizes, tensors, dict(zip(self._base.targets, scales, strict=True)))
        return leaves

    def __enter__(self) -> Stacked:
        try:
            self._install()
        except BaseException:
            self._remove()
            raise
        return self

    def _install(self) -> None:
        for name, layer in self._base.pair_layers.items():
            self._set(layer, self._adapted(name, layer))
        for name, head in self._base.head_modules.items():
            for inner, module in head.named_modules(prefix=name):
                if isinstance(module, nn.Linear):
                    self._set(module, self._linear(inner))
                elif module._parameters:
                    self._set(module, self._norm(inner, module))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for module, before in self._changed:
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before
        self._changed.clear()
        self.step = Step()

    def _set(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._changed.append((module, vars(module).get("forward")))
        vars(module)["forward"] = forward

    def _adapted(self, name: str, layer: Any) -> Callable[..., Tensor]:
        dropout = layer.lora_dropout[ADAPTER]
        plain = isinstance(dropout, nn.Identity)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = self.step
            out: Tensor = layer.base_layer(x, *args, **kwargs)
            A, B, scales = on_device_of(x, step.tensors[f"{name}:A"], step.tensors[f"{name}:B"], step.scales[name])
            inner = x if plain else dropout(x.to(A.dtype))
            return add_pairs(out, inner, A, B, scales, step.blocks_in(x, self._unpadding.tokens))

        return forward

    def _linear(self, name: str) -> Callable[[Tensor], Tensor]:
        def own(x: Float[Tensor, "k m i"], w: Float[Tensor, "k o i"], b: Tensor | None) -> Float[Tensor, "k m o"]:
            return x @ w.transpose(1, 2) if b is None else torch.baddbmm(b[:, None], x, w.transpose(1, 2))

        return lambda x: self._by_client(name, x, own)

    def _norm(self, name: str, module: Any) -> Callable[[Tensor], Tensor]:
        def own(x: Float[Tensor, "k m i"], w: Float[Tensor, "k i"], b: Tensor | None) -> Float[Tensor, "k m i"]:
            return x * w[:, None] if b is None else x * w[:, None] + b[:, None]

        def forward(x: Float[Tensor, "n *t i"]) -> Float[Tensor, "n *t i"]:
            return self._by_client(name, functional.layer_norm(x, module.normalized_shape, None, None, module.eps), own)

        return forward

    def _by_client(
        self, name: str, x: Float[Tensor, "n *t i"], own: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    ) -> Float[Tensor, "n *t o"]:
        """What a trained module gives each client's rows [k, m, i], with that client's weight and bias."""
        weight, bias = on_device_of(x, self.step.tensors[f"{name}.weight"], self.step.tensors.get(f"{name}.bias"))
        parts = []
        for block in self.step.blocks_in(x, self._unpadding.tokens):
            mine = block.clients
            out = own(_rows(x, block), weight[mine], None if bias is None else bias[mine])
            parts.append(out.view(*x[block.rows].shape[:-1], out.shape[-1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@final
class Alone:
    """A base with one client's adapter in its own parameters, for layers that have no stacked form.

    Args:
        base: into which the client's adapter was written.
        columns: the layout of the trained tensors.
    """

    def __init__(self, base: Base, columns: Columns) -> None:
        self._columns = columns
        self._parameters = [base.parameters[column.name] for column in columns.columns]

    def __enter__(self) -> Alone:
        return self

    def bind(
        self,
        values: Float[Tensor, "1 p"],
        rows: Sequence[int],
        sizes: Sequence[int],
    ) -> list[Tensor]:
        """See `fedlora.training.step.Binding`."""
        for parameter, value in zip(self._parameters, self._columns.stacked(values).values(), strict=True):
            parameter.data = value[0]
        return list(self._parameters)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter in self._parameters:  # no views of the cohort's matrix are left behind
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def cannot_stack(base: Base) -> str | None:
    """Why a base's adapters cannot be trained side by side, or None if they can."""
    from peft.tuners.lora.layer import Linear

    if not base.method.pairs or base.method.magnitudes:
        return f"adapter.method {base.method.name!r} has no stacked form"
    if base.device.type == "cuda" and holds_int8(base.model):
        return "LLM.int8() computes a column in another way for all rows of a batch where one of them is large"
    layers: Mapping[str, Any] = base.pair_layers
    for name, layer in layers.items():
        # PEFT's layers around bitsandbytes' quantised ones add the same pair to what these give.
        if type(layer) is not Linear and type(layer).__module__ != "peft.tuners.lora.bnb":
            return f"{name} is adapted by {type(layer).__name__}, which has no stacked form"
        if ADAPTER in layer.lora_variant or layer.lora_bias.get(ADAPTER, False):
            return f"{name} has a variant of LoRA without a stacked form"
        if "forward" in vars(layer):
            return f"another library has replaced the forward of {name}"
    for name, head in base.head_modules.items():
        for inner, module in head.named_modules(prefix=name):
            if not module._parameters:
                continue
            over_features = len(getattr(module, "normalized_shape", (0,))) == 1
            if type(module) not in (nn.Linear, OneDnnLinear, nn.LayerNorm) or not over_features:
                return f"{inner} is trained in full, and {type(module).__name__} has no stacked form"
            if "forward" in vars(module) and "_hf_hook" not in vars(module):  # which moves inputs to their GPU
                return f"another library has replaced the forward of {inner}"
    return None


def cannot_share(trial: Trial) -> str | None:
    """Why two clients' adapters cannot be in a model at once, or None where they can, or where nothing can be told.

    Args:
        trial: on the model, whose adapter is overwritten: the adapters of both in one batch must give each example what
            its own client's adapter gives it.
    """
    base = trial.base
    if trial.plain is None or (reason := cannot_stack(base)) is not None:
        return None if trial.plain is None else reason
    wanted = []
    for row, adapter in enumerate(trial.adapters):
        base.write(adapter, frozenset())
        found = trial.attempt("pair")
        if found is None:
            return None
        wanted.append(found[row])
    columns = Columns(trial.adapters, base.tensor_names())
    values = columns.rows(trial.adapters, torch.empty(0, dtype=base.adapter_dtype, device=base.device))
    name = type(base.model).__name__
    try:
        with Stacked(base, columns, trial.adapters) as stacked:
            stacked.bind(values, [0, 1], [1, 1])
            together = trial.states("pair")
    except RowsError as error:
        return str(error)
    except Exception as error:
        return f"two clients' adapters in {name} fail ({type(error).__name__})"
    if any(gap(together[row], wanted[row]) > trial.limit for row in range(2)):
        return f"two clients' adapters in {name} give other results than each alone"
    return None


def on_device_of(x: Tensor, first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Tensors where a layer's input is: of a base on several GPUs the adapters lie on the first."""
    tensors = (first, *others)
    if first.device == x.device:
        return tensors
    return tuple(tensor if tensor is None else tensor.to(x.device) for tensor in tensors)


def add_pairs(
    out: Float[Tensor, "n *t o"],
    x: Float[Tensor, "n *t i"],
    A: Float[Tensor, "k r i"],
    B: Float[Tensor, "k o r"],
    scales: Float[Tensor, "k 1 1"],
    blocks: tuple[Block, ...],
) -> Float[Tensor, "n *t o"]:
    """out + s_k (x A_k^T) B_k^T on each client's rows, in `out`'s dtype; `out` itself may be overwritten."""
    if out._is_view() or (out.requires_grad and out.is_leaf) or not out.is_contiguous():
        out = out.clone()
    added: Tensor = _AddPairs.apply(out, x, A, B, scales, blocks)
    return added


class _AddPairs(torch.autograd.Function):
    """One node for the whole pair: nothing is saved but the input, which the base layer holds too, and A x^T.

    What has r entries a token is kept as [k, r, m]: CPU kernels are two to four times as slow on narrow rows. A
    bfloat16 base has its pairs' products in bfloat16 too, as under autocast: summed in float32, and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, A: Tensor, B: Tensor, scales: Tensor, blocks: tuple[Block, ...]
    ) -> Tensor:
        ctx.mark_dirty(out)
        dtype = out.dtype if out.dtype == torch.bfloat16 else A.dtype
        down, up = A.to(dtype), (B * scales).to(dtype)
        inner = []
        for block in blocks:
            h = torch.bmm(down[block.clients], _rows(x, block).to(dtype).transpose(1, 2))
            ht, upt, target = h.transpose(1, 2), up[block.clients].transpose(1, 2), _rows(out, block)
            if out.dtype == dtype:
                target.baddbmm_(ht, upt)
            else:
                target.copy_(torch.bmm(ht, upt).add_(target))
            inner.append(h)
        ctx.blocks = blocks
        ctx.save_for_backward(x, down, up, scales, *inner)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, scales, *inner = ctx.saved_tensors
        _, wants_x, wants_A, wants_B, *_ = ctx.needs_input_grad
        gradient = grads[0].contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None
        dA = torch.empty_like(down, dtype=scales.dtype, memory_format=torch.contiguous_format) if wants_A else None
        dB = torch.empty_like(up, dtype=scales.dtype, memory_format=torch.contiguous_format) if wants_B else None
        for block, h in zip(ctx.blocks, inner, strict=True):
            g, mine = _rows(gradient, block).to(down.dtype), block.clients
            if dB is not None:
                torch.mul(torch.bmm(h, g).transpose(1, 2), scales[mine], out=dB[mine])
            if dA is None and dx is None:
                continue
            dh = torch.bmm(up[mine].transpose(1, 2), g.transpose(1, 2))
            if dA is not None:
                dA[mine] = torch.bmm(dh, _rows(x, block).to(down.dtype))
            if dx is not None and dx.dtype == down.dtype:
                torch.bmm(dh.transpose(1, 2), down[mine], out=_rows(dx, block))
            elif dx is not None:
                _rows(dx, block).copy_(torch.bmm(dh.transpose(1, 2), down[mine]))
        return grads[0], dx, dA, dB, None, None


def _rows(x: Tensor, block: Block) -> Float[Tensor, "k m f"]:
    """A block's part of a tensor [n, *t, f], each client's rows and tokens together."""
    mine = x if block.rows.stop - block.rows.start == x.shape[0] else x[block.rows]
    return mine.reshape(block.size, -1, x.shape[-1])
