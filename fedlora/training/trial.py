"""A model is tried out once, when it is opened: what makes it faster must leave what it computes as it is.

No list of architectures can be complete, so each feature that relies on a property of the model is tried on two real
examples of different lengths, in a handful of forward passes: kernels, attention and what `fedlora.model.unread` leaves
out against the model as transformers loads it; an example in a padded batch against the example alone; adapters of two
clients in one batch against each client's own. What does not hold is switched off, with the reason.

Shapes: b = examples in a batch, t = tokens, d = hidden size or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedlora.adapter import AdapterState, LoraPair
from fedlora.attention import AttentionReport, set_attention
from fedlora.errors import ModelError
from fedlora.kernels import KernelReport, restore
from fedlora.model import Base
from fedlora.model.unread import restore_unread, skip_unread
from fedlora.privacy.preflight import widened
from fedlora.tasks._base import Batch, Examples, Task
from fedlora.training.dropout import RowsError
from fedlora.training.flat import Columns
from fedlora.training.job import TrainJob, to_device
from fedlora.training.stacked import Stacked, cannot_stack

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Relative: what two ways to compute the same may differ by (layers that compute in float32 whatever their input round
at 1e-7). For a narrower dtype it is measured, and at least `NARROW`."""
NARROW = 0.01


class _ReachedError(Exception):
    """Ends a forward pass where its arguments or states are known."""


@final
class Trial:
    """Two examples, a shortest and a longest one, on a model as transformers loads it.

    Kernels, attention and left-out work of an earlier trial on the same base are taken back.

    Args:
        base: at any version; its adapter is overwritten, its mode left as it is.
        task: gives batches.
        sets: examples; the first set that has two lengths is taken.
    """

    def __init__(self, base: Base, task: Task, sets: Sequence[Examples]) -> None:
        self._base, self._task = base, task
        restore(base.model)
        restore_unread(base.model)
        set_attention(base.model, base.attention)
        self._batches = _batches(task, sets)
        self._adapters = _two_adapters(base)
        base.write(self._adapters[0], frozenset())
        # Whoever owns an example on which the model fails meets the error in its own batch; here it tells nothing.
        self._plain = self._quietly("pair")
        self._rounding = ROUNDING.get(base.dtype) or self._own_rounding()

    # ------------------------------------------------------------------------------------------ speed-ups

    def keep_equal(self, kernels: KernelReport, attention: AttentionReport) -> tuple[KernelReport, AttentionReport]:
        """Leave out what no head reads, and take back whatever changes the logits beyond rounding.

        Args:
            kernels: what was chosen, and is in the model.
            attention: likewise.

        Returns:
            What is in the model now.

        Raises:
            ModelError: the config asked for something that changes them.
        """
        model = self._base.model
        skip_unread(model)
        if self._plain is None or self._same():
            return kernels, attention
        restore_unread(model)
        if self._same():
            return kernels, attention
        name = type(model).__name__
        set_attention(model, self._base.attention)
        found = f"another attention than its own changes what {name} computes"
        attention = self._taken_back(attention, found, "attention")
        if not self._same():
            restore(model)
            found = f"the faster kernels change what {name} computes"
            kernels = replace(kernels, mode="off", reason=self._refused(kernels.reason, found, "kernels"))
        return kernels, attention

    def _taken_back(self, report: AttentionReport, found: str, key: str) -> AttentionReport:
        kept: Any = "sdpa" if self._base.attention == "sdpa" else "eager"
        return replace(report, mode=kept, reason=self._refused(report.reason, found, key))

    def _refused(self, reason: str, found: str, key: str) -> str:
        if reason == "asked for":
            raise ModelError(f"{found}: set runtime.{key} = 'auto'")
        return found

    def _same(self) -> bool:
        found = self._quietly("pair")
        return found is not None and self._plain is not None and self._gap(found, self._plain) <= self._rounding

    # ------------------------------------------------------------------------------------------ company

    def coupled(self) -> str | None:
        """Why an example's result depends on those beside it, or None where it does not.

        A shorter example beside a longer one must give what it gives alone, whatever the longer one says.
        """
        if self._plain is None:
            return None
        self._base.write(self._adapters[0], frozenset())
        narrow = self._base.dtype not in ROUNDING
        with widened(self._base.model) if narrow else nullcontext(self._rounding) as rounding:
            alone, beside, other = (self._quietly(which) for which in ("alone", "pair", "other"))
        name = type(self._base.model).__name__
        if alone is None or beside is None or other is None:
            return f"{name} fails on one example alone, where it does not on two"
        if self._gap(other[:1], beside[:1], alone.shape) > rounding:
            return f"in {name} an example's result depends on what the examples beside it say"
        if self._gap(beside[:1], alone, alone.shape) > rounding:
            return f"in {name} an example's result depends on how far it is padded"
        return None

    def cannot_share(self) -> str | None:
        """Why the adapters of several clients cannot be in the model at once, or None where they can."""
        base = self._base
        if self._plain is None or (reason := cannot_stack(base)) is not None:
            return None if self._plain is None else reason
        wanted = []
        for row, adapter in enumerate(self._adapters):
            base.write(adapter, frozenset())
            found = self._quietly("pair")
            if found is None:
                return None
            wanted.append(found[row])
        jobs = [TrainJob(adapter, frozenset(), np.empty(0, np.int64), 0) for adapter in self._adapters]
        columns = Columns(self._adapters, base.tensor_names())
        values = columns.rows(self._adapters, torch.empty(0, dtype=base.adapter_dtype, device=base.device))
        name = type(base.model).__name__
        try:
            with Stacked(base, columns, jobs) as stacked:
                stacked.bind(values, [0, 1], [1, 1])
                together = self._states("pair")
        except RowsError as error:
            return str(error)
        except Exception as error:
            return f"two clients' adapters in {name} fail ({type(error).__name__})"
        if any(self._gap(together[row], wanted[row]) > self._rounding for row in range(2)):
            return f"two clients' adapters in {name} give other results than each alone"
        return None

    # ------------------------------------------------------------------------------------------ forward passes

    def _own_rounding(self) -> float:
        """What a model in a narrow dtype may move by: some times its distance from the same model in a wide one."""
        with widened(self._base.model):
            wide = self._quietly("pair")
        if wide is None or self._plain is None:
            return NARROW
        return min(0.5, max(NARROW, 3 * self._gap(self._plain, wide)))

    def _gap(self, found: Tensor, wanted: Tensor, shape: torch.Size | None = None) -> float:
        """Relative, within the corner of `shape`: what stands in the place of padding does not count."""
        if shape is not None:
            corner = tuple(slice(size) for size in shape)
            found, wanted = found[corner], wanted[corner]
        if found.shape != wanted.shape:
            return float("inf")
        difference = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
        return difference if np.isfinite(difference) else float("inf")

    def _quietly(self, which: str) -> Tensor | None:
        try:
            return self._states(which)
        except Exception:
            return None

    def _states(self, which: str) -> Float[Tensor, "b *t d"]:
        """Logits, or what the output layer of a language model is given: its product with a vocabulary says no more.

        States at padding are zero, which nobody looks at.
        """
        model, prefix = self._base.model, self._base.prefix
        batch = to_device(self._batches[which], self._base.device)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _ReachedError

        modes = [(module, module.training) for module in model.modules()]
        self._base.train_mode(False)
        handle = None if head is None else head.register_forward_pre_hook(stop)
        try:
            with torch.inference_mode(), nullcontext() if prefix is None else prefix.aside():
                inputs = model_inputs(model, self._task, batch)
                states: Tensor = model(**inputs).logits
        except _ReachedError:
            (states,) = seen
        finally:
            if handle is not None:
                handle.remove()
            for module, training in modes:
                module.training = training
        mask = inputs.get("attention_mask")
        if head is not None and mask is not None and mask.shape == states.shape[:2]:
            states = states * (mask != 0)[..., None]
        return states


def model_inputs(model: nn.Module, task: Task, batch: Batch) -> dict[str, Tensor]:
    """What a task calls the model with, but for "labels"."""
    found: dict[str, Any] = {}

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(kwargs, **{"": args} if args else {})
        raise _ReachedError

    handle = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            task.losses(model, batch)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return {name: value for name, value in found.items() if value is not None and name != "labels"}


def _batches(task: Task, sets: Sequence[Examples]) -> dict[str, Batch]:
    """A short and a long example as the rows of a batch ("pair"), beside a long one that says something else ("other"),
    and the short one in a batch of its own ("alone")."""
    filled = [examples for examples in sets if len(examples)]
    examples = next((found for found in filled if len(np.unique(found.lengths)) > 1), filled[0] if filled else None)
    if examples is None:
        return {}
    short, long = (task.collate(examples, [int(f(examples.lengths))]) for f in (np.argmin, np.argmax))
    other = {n: v.flip(-1) if n in ("input_ids", "pixel_values") else v for n, v in long.items()}
    return {
        "alone": short,
        "pair": task.join(examples, [short, long]),
        "other": task.join(examples, [short, other]),
    }


def _two_adapters(base: Base) -> tuple[AdapterState, AdapterState]:
    """Adapters that change what the model computes, where the method has pairs; the head is as it is in the model."""
    dense = {name: value.nan_to_num() for name, value in base.read().dense.items()}
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=base.adapter_dtype) * (0.3 / shape[1] ** 0.5)

    def adapter() -> AdapterState:
        pairs = {
            name: LoraPair(drawn(s.rank, s.d_in), drawn(s.d_out, s.rank), s.scale) for name, s in base.layout().items()
        }
        return AdapterState(pairs, dense)

    return adapter(), adapter()
