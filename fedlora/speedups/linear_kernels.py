"""Faster matrix products for the frozen base model on a CPU, behind one switch.

On AMD processors torch hands a float32 `F.linear` to MKL, which picks slow kernels there; oneDNN, in the same torch
binary, does the same product in full float32 at about twice the speed. `accelerate` makes the frozen linear layers of a
model use oneDNN; `restore` undoes it.

How: the module's class is swapped for a subclass that differs in `forward` alone, so parameters, `state_dict`, hooks,
PEFT, `copy.deepcopy` and pickle see the layer they know. **Nothing is copied or cached**: oneDNN reads the module's own
weight, transposed by its strides in the backward pass. Packing the weights beforehand was measured and left out: it is
worth another 7 % of a small encoder's training step, but takes twice the weights' memory, and goes stale in silence
when a merge adds to the base through `weight.data`, as PEFT's does, which moves no version counter.

Each call looks whether the fast road is right, and takes torch's otherwise: another dtype than float32 (torch itself
hands bfloat16 to oneDNN), another device, autocast, `torch.func`, `torch.compile`, a weight or bias that has been
unfrozen, or a handful of rows.

The two kernels round differently (1e-6 relative in float32), and "auto" chooses by a measurement. It is made once for a
machine, its versions and the shapes of a model's layers (`fedlora.probes`), so that the next run has the same bits;
"measure" makes it again. A run records `KernelReport.mode`, and passes it when it goes on.

Shapes: *b = any batch dimensions, i = features in, o = features out.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlora.errors import ModelError, nearest
from fedlora.probes import once

Mode: TypeAlias = Literal["auto", "measure", "off", "onednn"]

MODES: tuple[Mode, ...] = ("auto", "measure", "off", "onednn")
FEW_ROWS = 8  # below, the product is bound by memory and by the call itself, and oneDNN gains nothing
PROBE_FLOP = 1e8  # per probed product, about a millisecond; very wide layers take more, for PROBE_ROWS
PROBE_ROWS = 32  # at least: fewer would measure the memory instead of the kernel
PROBE_REPEATS = 8
CLEAR_GAIN = 1.1  # "auto" leaves torch alone for less
CLEARLY = 0.25  # quantile of the repeats' gains that must reach it, so that noise rarely decides


@dataclass(frozen=True)
class ShapeTiming:
    """How fast both kernels were on one shape of layer, forward and backward together, in GFLOP/s.

    Attributes:
        in_features: i.
        out_features: o.
        layers: How many layers of the model have this shape.
        rows: Rows of the probed input.
        torch_gflops: Torch's own kernel.
        onednn_gflops: oneDNN's.
    """

    in_features: int
    out_features: int
    layers: int
    rows: int
    torch_gflops: float
    onednn_gflops: float


@dataclass(frozen=True)
class KernelReport:
    """What `accelerate` did.

    Attributes:
        mode: The choice made, "onednn" or "off". Pass it as `mode` to repeat the choice without measuring.
        layers: Number of layers that now use oneDNN; they take no extra memory.
        reason: One line, why.
        timings: What was measured, one entry per shape; empty for the other modes.
        measured: When (UTC); "" where nothing was.
    """

    mode: Literal["off", "onednn"]
    layers: int
    reason: str
    timings: tuple[ShapeTiming, ...] = ()
    measured: str = ""

    @property
    def speedup(self) -> float:
        """Torch's time over oneDNN's for one row through all layers; NaN if nothing was measured."""
        work = [(t.layers * t.in_features * t.out_features, t) for t in self.timings]
        fast = sum(flop / t.onednn_gflops for flop, t in work)
        return sum(flop / t.torch_gflops for flop, t in work) / fast if fast else float("nan")


def accelerate(model: nn.Module, mode: Mode = "auto", *, rows: int = 512) -> KernelReport:
    """Makes the frozen linear layers of `model` use the faster kernel; the model is changed in place.

    Takes the layers that are exactly `nn.Linear` or transformers' `Conv1D`, with frozen float32 parameters on the CPU,
    also inside PEFT's layers; all others are left alone. Freeze first. Calling it again chooses anew.

    Args:
        model: The base model, before or after the adapters are injected.
        mode: "auto" takes oneDNN if it was found clearly faster on the shapes in the model, which is measured the
            first time, in some tenths of a second, and remembered; "measure" measures again; "onednn" takes it unseen;
            "off" restores the model.
        rows: Rows of a typical batch (examples times tokens), for the measurement.

    Raises:
        ModelError: `mode` is unknown, or "onednn" was asked of a torch that was built without it.
    """
    if mode not in MODES:
        raise ModelError(f"unknown runtime.kernels {mode!r}; {nearest(str(mode), MODES)}", code="unknown-name")
    restore(model)
    if mode == "off":
        return KernelReport("off", 0, "switched off")
    if _linear_op() is None:
        if mode == "onednn":
            raise ModelError(
                "this build of torch has no oneDNN linear kernel: set runtime.kernels = 'auto' or 'off'",
                code="kernels-not-supported",
            )
        return KernelReport("off", 0, "this torch has no oneDNN linear kernel")
    layers = list(_eligible(model))
    if not layers:
        return KernelReport("off", 0, "no frozen float32 linear layer on the CPU")
    timings: tuple[ShapeTiming, ...] = ()
    reason, measured = "asked for", ""
    if mode in ("auto", "measure"):
        shapes = sorted([*shape, len(group)] for shape, group in _by_shape(layers).items())
        what = {"rows": rows, "shapes": shapes}
        found = once("kernels", what, lambda: _measure(layers, rows), anew=mode == "measure")
        timings = tuple(ShapeTiming(**timing) for timing in found["timings"])
        measured, low = str(found["measured"]), float(found["low"])
        speedup = KernelReport("onednn", 0, "", timings).speedup
        if low < CLEAR_GAIN:
            reason = f"oneDNN is not clearly faster here ({speedup:.2f}x, measured {measured})"
            return KernelReport("off", 0, reason, timings, measured)
        reason = f"oneDNN is {speedup:.2f}x as fast here (measured {measured})"
    for layer in layers:
        fast_class = _fast_class(layer)
        assert fast_class is not None
        layer.__class__ = fast_class
    return KernelReport("onednn", len(layers), reason, timings, measured)


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every layer is of its own class again, and computes what it computed before, bit by bit."""
    for module in model.modules():
        cls: type = type(module)
        if issubclass(cls, _OneDnn):
            module.__class__ = cls.own_class


def frozen_linear(x: Float[Tensor, "*b i"], weight: Float[Tensor, "o i"], bias: Tensor | None) -> Float[Tensor, "*b o"]:
    """x Wᵀ + bias with frozen W and bias, by oneDNN where that is right, else by `F.linear`; differentiable in x.

    Args:
        x: The input.
        weight: W, with any strides.
        bias: [o], or None.
    """
    if _is_right(x, weight, bias):
        return _product(x, weight, bias)
    return linear(x, weight, bias)


class _OneDnn:
    """Marks the fast classes, and knows the class that `restore` gives back."""

    own_class: ClassVar[type[nn.Module]]


class OneDnnLinear(_OneDnn, nn.Linear):
    """A frozen `nn.Linear` on oneDNN; made by `accelerate` alone."""

    own_class = nn.Linear

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:  # noqa: A002 (nn.Linear's name)
        """As `nn.Linear`."""
        return frozen_linear(input, self.weight, self.bias)


@functools.cache
def _conv1d_class() -> type[nn.Module]:
    """GPT-2's layer, which stores W transposed. Built on demand: importing transformers takes seconds."""
    from transformers.pytorch_utils import Conv1D

    class OneDnnConv1D(_OneDnn, Conv1D):
        """A frozen transformers `Conv1D` on oneDNN; made by `accelerate` alone."""

        own_class = Conv1D

        def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
            """As `Conv1D`."""
            return frozen_linear(x, self.weight.t(), self.bias)

    OneDnnConv1D.__qualname__ = "OneDnnConv1D"  # so that pickle finds it, through __getattr__ below
    return OneDnnConv1D


def __getattr__(name: str) -> Any:
    if name == "OneDnnConv1D":
        return _conv1d_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Product(torch.autograd.Function):
    """The product with its gradient in x; W and the bias are frozen, so theirs is never computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Saved as a tensor, not as an attribute: autograd then refuses a weight changed before the backward pass.
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grads[0], weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    op = _linear_op()
    assert op is not None
    return op(x, weight, bias, "none", [], "")


@functools.cache
def _linear_op() -> Callable[..., Tensor] | None:
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if packet is None else packet.default


def _is_right(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes what `F.linear` would, up to rounding, and is worth it."""
    return (
        not torch.compiler.is_compiling()  # the compiler chooses its own kernels
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and not weight.requires_grad
        and (bias is None or (bias.dtype == torch.float32 and not bias.requires_grad))
        and x.numel() >= FEW_ROWS * weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def _fast_class(module: nn.Module) -> type[nn.Module] | None:
    """Exact types only: a subclass may compute something else, or read the weight elsewhere."""
    if type(module) is nn.Linear:
        return OneDnnLinear
    layers = sys.modules.get("transformers.pytorch_utils")  # if nobody imported it, the model has no Conv1D
    if layers is not None and type(module) is layers.Conv1D:
        return _conv1d_class()
    return None


def _eligible(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        # Another library's forward on the instance (a hook of Hugging Face's accelerate) would hide the class's.
        if _fast_class(module) is None or "forward" in vars(module):
            continue
        if all(
            type(t.data) is Tensor and t.dtype == torch.float32 and t.is_cpu and not t.requires_grad
            for t in module.parameters()
        ):
            yield module


def _matrix(module: nn.Module) -> Float[Tensor, "o i"]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, nn.Linear) else weight.t()


def _by_shape(layers: Iterable[nn.Module]) -> dict[tuple[int, int], list[nn.Module]]:
    groups: dict[tuple[int, int], list[nn.Module]] = {}
    for layer in layers:
        o, i = _matrix(layer).shape
        groups.setdefault((o, i), []).append(layer)
    return groups


def _measure(layers: Iterable[nn.Module], rows: int) -> dict[str, Any]:
    """Times both kernels on every shape, all in turn again and again, so that all see the same load.

    Returns:
        "timings": of each shape the fields of `ShapeTiming`, by the median; "low": of the gains of the repeats, each
        torch's time over oneDNN's for one row through all layers, the quantile `CLEARLY`.
    """
    groups = _by_shape(layers)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in: training is what is measured
        probes = [_Probe(_matrix(group[0]).detach().clone(), rows) for group in groups.values()]
        times = [[probe.run(backwards=repeat % 2 == 1) for probe in probes] for repeat in range(1 + PROBE_REPEATS)][1:]
    layers_of = [len(group) for group in groups.values()]
    # A repeat's time of all layers for one row, kernel by kernel: torch first, oneDNN second.
    sums = [
        [sum(n * t[k] / probe.rows for n, t, probe in zip(layers_of, turn, probes, strict=True)) for k in (0, 1)]
        for turn in times
    ]
    gains = sorted(torch_s / onednn_s for torch_s, onednn_s in sums)
    timings = []
    for number, (probe, n) in enumerate(zip(probes, layers_of, strict=True)):
        o, i = probe.weight.shape
        torch_s, onednn_s = (median(turn[number][k] for turn in times) for k in (0, 1))
        flop = 4 * probe.rows * i * o / 1e9
        timings.append(asdict(ShapeTiming(i, o, n, probe.rows, flop / torch_s, flop / onednn_s)))
    return {"timings": timings, "low": gains[int(CLEARLY * (len(gains) - 1))]}


class _Probe:
    """One shape of layer, to be timed with both kernels, forward and backward.

    Args:
        weight: a copy of a layer's.
        rows: of the input, at most; fewer where the product is large.
    """

    def __init__(self, weight: Float[Tensor, "o i"], rows: int) -> None:
        o, i = weight.shape
        self.weight, self.rows = weight, max(PROBE_ROWS, min(rows, int(PROBE_FLOP / (2 * i * o))))
        # A private generator: measuring must not move the run's random numbers.
        generator = torch.Generator().manual_seed(0)
        sizes = ((self.rows, i), (o,), (self.rows, o))
        self._x, self._bias, self._grad = (torch.randn(size, generator=generator) for size in sizes)
        self._x.requires_grad_()

    def run(self, *, backwards: bool) -> tuple[float, float]:
        """Seconds of torch's kernel and of oneDNN's.

        Args:
            backwards: oneDNN goes first.
        """
        kernels: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [linear, _product]
        seconds = [0.0, 0.0]
        for place in (1, 0) if backwards else (0, 1):
            begin = time.perf_counter()
            torch.autograd.grad(kernels[place](self._x, self.weight, self._bias), self._x, self._grad)
            seconds[place] = time.perf_counter() - begin
        return seconds[0], seconds[1]
