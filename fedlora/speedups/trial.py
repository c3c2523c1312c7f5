"""A model is tried out once, when it is opened: what makes it faster must leave what it computes as it is.

No list of architectures can be complete, so each feature that relies on a property of the model is tried on two real
examples of different lengths, in a handful of forward passes: kernels, attention and the last layer's left-out work
against the model as transformers loads it; an example in a padded batch against the example alone. What does not hold
is switched off, with the reason.

Shapes: b = examples in a batch, t = tokens, d = hidden size or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedlora.adapter import AdapterState, LoraPair
from fedlora.errors import ModelError
from fedlora.model import Base, seeded
from fedlora.privacy.preflight import widened
from fedlora.sanitize import clean_text
from fedlora.speedups.attention import AttentionReport, set_attention
from fedlora.speedups.last_layer import restore_unread, skip_unread
from fedlora.speedups.linear_kernels import KernelReport, restore
from fedlora.speedups.unpadding import Unpadding, unpads
from fedlora.tasks._base import Batch, Examples, Measurable, Task, to_device
from fedlora.tasks._trials import evaluating

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Relative: what two ways to compute the same may differ by (layers that compute in float32 whatever their input round
at 1e-7). For a narrower dtype it is measured, and at least `NARROW`."""
NARROW = 0.01
COARSE = 0.05  # where nothing is known of a narrow dtype's rounding


class _ReachedError(BaseException):
    """Ends a forward pass at a module, with what the module was given."""


@final
class Trial:
    """Two examples, a shortest and a longest one, on a model as transformers loads it.

    Kernels, attention and left-out work of an earlier trial on the same base are taken back.

    Args:
        base: at any version; its adapter is overwritten, its mode left as it is.
        task: gives batches.
        sets: examples; the first set that has two lengths is taken.

    Attributes:
        base: as given, and so are `task` and `sets`.
        adapters: two clients', which change what the model computes where the method has pairs.
        plain: what the model gives for both examples, with the first adapter; None where it fails.
        limit: relative difference that two ways to compute the same may have.
    """

    def __init__(self, base: Base, task: Task, sets: Sequence[Examples]) -> None:
        self.base, self.task, self.sets = base, task, sets
        restore(base.model)
        restore_unread(base.model)
        set_attention(base.model, base.attention)
        self._batches = _batches(task, sets)
        self._left = any(len(examples) and task.pads_left(examples) for examples in sets)
        self.adapters = _two_adapters(base)
        base.write(self.adapters[0], frozenset())
        self.plain = self.attempt("pair")
        if self._batches:
            self._refuse_failing()
        self._rounding = ROUNDING.get(base.dtype)
        self.limit = self._rounding or self._own_rounding()

    def _refuse_failing(self) -> None:
        """A model that fails on the shortest example alone, or cannot be trained on it, fails on all, or its data do.

        Whoever owns a single example on which it fails meets the error in its own batch.
        """
        base, doing = self.base, "compute"
        batch = to_device(self.task, self._batches["alone"], base.device)
        try:
            if self.plain is None:
                self.states("alone")
            doing = "be trained on"
            parameters = base.write(self.adapters[0])
            with seeded(0, *base.devices), torch.enable_grad():
                base.train_mode(True)
                loss = self.task.losses(base.model, batch).sum()
                if parameters:
                    torch.autograd.grad(loss, parameters, allow_unused=True)
        except Exception as error:
            first = clean_text(next(iter(str(error).splitlines()), ""), 200)
            if "deterministic" in first:
                raise ModelError(
                    f"{type(base.model).__name__} needs a kernel that does not repeat itself ({first}): set "
                    "runtime.deterministic = false",
                    code="not-deterministic",
                ) from error
            raise ModelError(
                f"{type(base.model).__name__} cannot {doing} the data's examples ({type(error).__name__}: {first}): "
                "change model.dtype, task.max_length or model.name",
                code="examples-not-computable",
            ) from error
        finally:
            base.train_mode(False)
            base.write(self.adapters[0], frozenset())

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
        model = self.base.model
        skip_unread(model)
        if self.plain is None or self._same():
            return kernels, attention
        restore_unread(model)
        if self._same():
            return kernels, attention
        name = type(model).__name__
        set_attention(model, self.base.attention)
        found = f"another attention than its own changes what {name} computes"
        attention = self._taken_back(attention, found, "attention")
        if not self._same():
            restore(model)
            found = f"the faster kernels change what {name} computes"
            kernels = replace(kernels, mode="off", reason=self._refused(kernels.reason, found, "kernels"))
        return kernels, attention

    def _taken_back(self, report: AttentionReport, found: str, key: str) -> AttentionReport:
        kept: Any = "sdpa" if self.base.attention == "sdpa" else "eager"
        return replace(report, mode=kept, reason=self._refused(report.reason, found, key))

    def _refused(self, reason: str, found: str, key: str) -> str:
        if reason == "asked for":
            raise ModelError(f"{found}: set runtime.{key} = 'auto'", code="speedup-changes-results")
        return found

    def _same(self) -> bool:
        found = self.attempt("pair")
        return found is not None and self.plain is not None and gap(found, self.plain) <= self.limit

    # ------------------------------------------------------------------------------------------ padding

    def coupled(self) -> str | None:
        """Why an example's result depends on those beside it, or None where it does not; see `coupling`.

        Raises:
            ModelError: its batches must be padded on the left.
        """
        if self.plain is None:
            return None
        self.base.write(self.adapters[0], frozenset())
        return coupling(self.base, self.task, self._batches, self._rounding, left=self._left)

    def needs_padding(self) -> str | None:
        """Why padding must be computed, or None where the layers give the same without it, or never leave it out."""
        model = self.base.model
        if self.plain is None or not unpads(model):
            return None
        self.base.write(self.adapters[0], frozenset())
        with Unpadding().of(model):
            return None if self._same() else f"{type(model).__name__} gives other results without padding"

    # ------------------------------------------------------------------------------------------ forward passes

    def _own_rounding(self) -> float:
        """What a model in a narrow dtype may move by: some times its distance from the same model in a wide one."""
        with widened(self.base.model):
            wide = self.attempt("pair")
        if wide is None or self.plain is None:
            return NARROW
        return min(0.5, max(NARROW, 3 * gap(self.plain, wide)))

    def attempt(self, which: str) -> Tensor | None:
        """`states` of one of the batches "alone", "pair" and "other"; None where the model fails."""
        return _attempt(self.base, self.task, self._batches, which)

    def states(self, which: str) -> Float[Tensor, "b *t d"]:
        """`states` of one of the batches."""
        return states(self.base, self.task, self._batches[which])


def find_coupling(base: Measurable, task: Task, examples: Examples) -> str | None:
    """`coupling` for a model that nothing was tried out on, on a shortest and a longest example."""
    dtype = next(parameter.dtype for parameter in base.model.parameters() if parameter.is_floating_point())
    left = task.pads_left(examples)
    return coupling(base, task, _batches(task, [examples]), ROUNDING.get(dtype), left=left)


def coupling(
    base: Measurable, task: Task, batches: Mapping[str, Batch], rounding: float | None, *, left: bool
) -> str | None:
    """Why an example's result depends on those beside it, or None where it does not, or nothing can be told.

    A shorter example beside a longer one must give what it gives alone, whatever the longer one says.

    Args:
        base: the model with its adapter.
        task: gives the loss.
        batches: "alone", "pair" and "other".
        rounding: relative, of the model's dtype; None for a narrow one, which is tried in a wide one.
        left: whether the model's tokeniser pads on the left.

    Raises:
        ModelError: it must be padded on the left, as its tokeniser pads.
    """
    if not batches:
        return None
    name = type(base.model).__name__
    with widened(base.model) if rounding is None else nullcontext(rounding) as limit:
        alone, beside, other = (_attempt(base, task, batches, which) for which in ("alone", "pair", "other"))
    if alone is None and rounding is None:  # some kernels (of experts) are for narrow dtypes alone
        limit = COARSE
        alone, beside, other = (_attempt(base, task, batches, which) for which in ("alone", "pair", "other"))
    if alone is None or beside is None or other is None:
        return None if alone is None else f"{name} fails on one example beside another"
    if not all(bool(found.isfinite().all()) for found in (alone, beside, other)):
        return f"{name} gives numbers that are not finite"
    if gap(other[:1], beside[:1], alone.shape) > limit:
        return f"in {name} an example's result depends on what the examples beside it say"
    if gap(beside[:1], alone, alone.shape) <= limit:
        return None
    if left:
        raise ModelError(
            f"{name} depends on padding, and its tokenizer pads on the left, which is not supported: choose another "
            "model.name",
            code="padding-on-the-left",
        )
    return f"in {name} an example's result depends on how far it is padded"


def gap(found: Tensor, wanted: Tensor, shape: torch.Size | None = None) -> float:
    """Relative difference, within the corner of `shape`: what stands in the place of padding does not count."""
    if shape is not None:
        corner = tuple(slice(size) for size in shape)
        found, wanted = found[corner], wanted[corner]
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.cpu().double(), wanted.cpu().double()
    difference = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return difference if np.isfinite(difference) else float("inf")


def _attempt(base: Measurable, task: Task, batches: Mapping[str, Batch], which: str) -> Tensor | None:
    try:
        return states(base, task, batches[which])
    except Exception:
        return None


def states(base: Measurable, task: Task, batch: Batch) -> Float[Tensor, "b *t d"]:
    """Logits, or what the output layer of a language model is given: its product with a vocabulary says no more.

    Without dropout; states at padding are zero, which nobody looks at.
    """
    model = base.model
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with evaluating(model), torch.inference_mode(), base.uncached():
        inputs = model_inputs(base, task, batch)
        given = None if head is None else given_to(head, lambda: model(**inputs))
        found: Tensor = model(**inputs).logits if given is None else given[0][0]
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if found.dim() > 2 and mask is not None and mask.shape == found.shape[:2]:
        found = found * (mask != 0)[..., None]
    return found


def model_inputs(base: Measurable, task: Task, batch: Batch) -> dict[str, Tensor]:
    """What a task calls the model with for a batch on the CPU, but for "labels"."""
    with torch.no_grad():
        given = given_to(base.model, lambda: task.losses(base.model, to_device(task, batch, base.device)))
    args, kwargs = given or ((), {})
    found: dict[str, Any] = {**kwargs, **({"": args} if args else {})}
    return {
        name: value for name, value in found.items() if value is not None and value is not False and name != "labels"
    }


def given_to(module: nn.Module, call: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments that a module is given while `call` runs, which ends there; None if it is not called."""

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _ReachedError(args, kwargs)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        call()
    except _ReachedError as reached:
        return reached.args
    finally:
        handle.remove()
    return None


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
        return torch.randn(shape, generator=generator, dtype=base.adapter_dtype) * (0.3 / float(shape[1] ** 0.5))

    def adapter() -> AdapterState:
        pairs = {
            name: LoraPair(drawn(s.rank, s.d_in), drawn(s.d_out, s.rank), s.scale) for name, s in base.layout().items()
        }
        return AdapterState(pairs, dense)

    return adapter(), adapter()
