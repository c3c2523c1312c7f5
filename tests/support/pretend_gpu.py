"""GPUs that are not there: what is computed "on" them is computed on the CPU, and what a GPU would not do fails.

Each storage has a device of its own beside the real one. An operation on tensors of several devices raises, but where
CUDA allows it (numbers without dimensions, indices on the CPU); so do numpy's view of a tensor on the device and, on a
pretended MPS, double precision and copies that do not wait. A device draws from a default generator of its own, which
the CPU's seed does not reach. Launches of kernels and places where the host waits for the device are counted. What it
cannot show: bugs of kernels, races, the allocator, time.
"""

from __future__ import annotations

import collections
import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft  # noqa: F401 - what it imports asks torch for a GPU, and must find none
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401

CPU = torch.device("cpu")
ANY = torch.device("xpu")
"""Made inside torch's C++ with another tensor's real options: goes with whatever it meets."""

COPIES = {"copy_", "_to_copy", "copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
WAITS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique", "_unique2"}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
RANDOM = {"normal_", "uniform_", "bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like", "randint"}
RANDOM |= {"random_", "normal", "native_dropout", "randperm", "multinomial", "exponential_"}
VIEWS = {
    *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "expand_as", "unsqueeze", "squeeze"),
    *("select", "slice", "narrow", "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "unflatten"),
    *("flatten", "diagonal", "chunk", "lift_fresh", "_reshape_alias", "detach_", "set_", "resize_", "is_same_size"),
    *("sym_size", "size", "_has_same_storage_numel", "unfold", "mT", "movedim", "real", "squeeze_", "unsqueeze_", "t_"),
    *("transpose_", "set_data", "_version", "is_pinned", "result_type", "broadcast_tensors", "view_as", "stride"),
    *("_shape_as_tensor", "sym_numel", "sym_stride", "numel", "sym_storage_offset", "scalar_tensor_"),
}
TENSOR = torch.Tensor
REAL_DEVICE = TENSOR.device.__get__  # type: ignore[attr-defined]
MADE = {torch.zeros, torch.ones, torch.full, torch.empty, torch.empty_strided, torch.arange, torch.eye, torch.rand}
MADE |= {torch.randn, torch.randint, torch.linspace, torch.tensor, torch.scalar_tensor, torch.randperm}
SAID = {*MADE, TENSOR.to, TENSOR.cpu, TENSOR.new_tensor, torch.as_tensor}
"""Functions whose device is the caller's word, and none that C++ hands on."""

_tags: dict[int, tuple[torch.device, StorageWeakRef]] = {}
_calls: list[bool] = []


class PretendError(RuntimeError):
    """Something that a GPU would not do."""


class Log:
    """What the device was asked for.

    Attributes:
        launches: kernels, by name.
        waits: where the host waited for the device.
        wide: where double precision was used on it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.wide: collections.Counter[str] = collections.Counter()


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor pretends to be."""
    if tensor.layout != torch.strided:
        return ANY
    return _tags.get(tensor.untyped_storage()._cdata, (CPU,))[0]


@contextlib.contextmanager
def pretend_gpu(kind: str = "cuda", memory: int = 80 << 30, count: int = 1) -> Iterator[Log]:
    """Inside, torch finds GPUs.

    Args:
        kind: "cuda" or "mps".
        memory: bytes that each has.
        count: how many there are.
    """
    log = Log()
    made, device = torch.Generator, torch.device

    class Generator(made):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return made.__new__(cls)

        def __init__(self, device: Any = "cpu") -> None:
            self.pretended = torch.device(device)

    class OfDevice(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, device)

    class Device(metaclass=OfDevice):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:  # a number alone is that of a GPU
            return device("cuda", *args) if len(args) == 1 and isinstance(args[0], int) else device(*args, **kwargs)

    class Properties:
        total_memory, name, major, minor = memory, "pretended", 9, 0

    state, cuda = made().manual_seed(1), kind == "cuda"
    patches: dict[tuple[Any, str], Any] = {
        (torch, "Generator"): Generator,
        (torch, "device"): Device,
        (torch.autograd, "has_torch_function"): lambda *_: False,
        (torch._tensor, "has_torch_function_unary"): lambda *_: False,
        (TENSOR, "pin_memory"): lambda self, *_: self,
        (torch.cuda, "is_available"): lambda: cuda,
        (torch.cuda, "device_count"): lambda: count * cuda,
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "_lazy_init"): lambda: None,
        (torch.cuda, "get_device_properties"): lambda *_: Properties,
        (torch.cuda, "get_device_name"): lambda *_: "pretended",
        (torch.cuda, "is_bf16_supported"): lambda *_, **__: cuda,
        (torch.cuda, "mem_get_info"): lambda *_: (memory, max(memory, 80 << 30)),
        (torch.cuda, "get_rng_state"): lambda *_: state.get_state(),
        (torch.cuda, "set_rng_state"): lambda new, *_: state.set_state(new),
        (torch.cuda, "manual_seed"): lambda seed: state.manual_seed(seed),
        (torch.cuda, "device"): lambda *_: contextlib.nullcontext(),
        (torch.cuda, "synchronize"): lambda *_: log.waits.update([f"synchronize: {_where()}"]),
        (torch.backends.mps, "is_available"): lambda: not cuda,
        (torch.mps, "get_rng_state"): lambda: state.get_state(),
        (torch.mps, "set_rng_state"): lambda new: state.set_state(new),
        (torch.mps, "manual_seed"): lambda seed: state.manual_seed(seed),
        (torch.mps, "empty_cache"): lambda: None,
    }
    from torch.utils.checkpoint import _allowed_determinism_checks_to_fns as checks

    before = {place: getattr(*place) for place in patches}
    extract = checks["default"]
    checks["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}  # a hook sees real devices
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for place, value in patches.items():
        setattr(*place, value)
    try:
        with _Dispatch(log, state), _Functions(log), mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
            yield log  # transformers would load in threads, where nothing is pretended
    finally:
        for place, value in before.items():
            setattr(*place, value)
        checks["default"] = extract
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


def _tag(tensor: Tensor, device: torch.device) -> None:
    if device.type == "meta" or tensor.layout != torch.strided:
        return
    storage = tensor.untyped_storage()
    _tags[storage._cdata] = (device, StorageWeakRef(storage))  # the weak reference keeps its address from being reused
    if len(_tags) % 20000 == 0:
        for key in [key for key, (_, held) in _tags.items() if held.expired()]:
            del _tags[key]


def _where() -> str:
    """The line of fedlora's that asked for it."""
    frames = traceback.extract_stack()[::-1]
    ours = (frame for frame in frames if "/fedlora/" in frame.filename and frame.name != "__torch_function__")
    own = (f"{frame.filename.rpartition('/fedlora/')[2]}:{frame.lineno}" for frame in ours)
    return next(own, "elsewhere")


def _whole(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(device.type, 0) if device.type in ("cuda", "mps") and device.index is None else device


def _refuse_wide(log: Log, device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and device.type not in ("cpu", "xpu"):
        log.wide[_where()] += 1
        if device.type == "mps":
            raise PretendError(f"MPS has no float64: {_where()}")


class _Dispatch(TorchDispatchMode):
    def __init__(self, log: Log, generator: torch.Generator) -> None:
        super().__init__()
        self._log, self._generator = log, generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[-1]
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        wanted = None if kwargs.get("device") is None else _whole(kwargs["device"])
        if (wanted is not None and wanted.type == "meta") or any(tensor.is_meta for tensor in tensors):
            out = func(*args, **(kwargs if wanted is None or wanted.type == "meta" else {**kwargs, "device": CPU}))
            if wanted is not None:  # made on a device after the shape of what is nowhere
                _tag(out, wanted)
            return out
        said = bool(_calls and _calls[-1])
        if name in COPIES:
            return self._copied(func, name, args, kwargs, None if wanted == CPU and not said else wanted)
        found = {device_of(tensor) for tensor in tensors} - {ANY}
        if len(found) == 1:
            for tensor in tensors:
                if device_of(tensor) == ANY:
                    _tag(tensor, next(iter(found)))
        there = next(iter(found - {CPU}), CPU)
        on_gpu = there != CPU or (wanted is not None and wanted != CPU)
        if on_gpu:
            self._count_waits(name, args)
        self._refuse_mixed(name, args, tensors, found)
        if wanted is not None:
            kwargs["device"] = CPU
        with self._own_draws() if on_gpu and name in RANDOM else contextlib.nullcontext():
            out = func(*args, **kwargs)
        target = there if wanted is None else wanted
        if any(tensor.layout != torch.strided for tensor in tensors) or (wanted == CPU and not said):
            target = ANY
        held = {tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout == torch.strided}
        for made in tree_flatten(out)[0]:
            fresh = isinstance(made, Tensor) and made.layout == torch.strided
            if fresh and made.untyped_storage()._cdata not in held:
                _refuse_wide(self._log, target, made.dtype)
                _tag(made, target)
        if on_gpu and name not in VIEWS and name not in EMPTY:
            self._log.launches[name] += 1
        return out

    @contextlib.contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Inside, what draws from the default generator draws from the device's."""
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self._generator.get_state())
        yield
        self._generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any, wanted: torch.device | None) -> Any:
        source = device_of(args[0] if name == "_to_copy" else args[1])
        target = device_of(args[0]) if name != "_to_copy" else (source if wanted is None else wanted)
        waits_not = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        dtype = kwargs.get("dtype") or args[0].dtype
        _refuse_wide(self._log, target, dtype)
        if source.type == "mps":  # which converts before it copies
            _refuse_wide(self._log, source, dtype)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        out = func(*args, **kwargs)
        if name != "copy_":
            _tag(out, target)
        if {source.type, target.type} & {"cuda", "mps"}:
            self._log.launches["copy"] += 1
            if source != target and ANY not in (source, target) and not (waits_not and source == CPU):
                self._log.waits[f"{source.type} to {target.type}: {_where()}"] += 1
            if waits_not and target.type == "mps" and source == CPU:
                raise PretendError(f"a copy to MPS that does not wait may read memory that is gone: {_where()}")
        return out

    def _count_waits(self, name: str, args: Any) -> None:
        if name in WAITS:
            self._log.waits[f"{name}: {_where()}"] += 1
        for index in args[1] if name in INDEXED else ():
            if isinstance(index, Tensor) and (index.dtype in (torch.bool, torch.uint8) or device_of(index) == CPU):
                self._log.waits[f"{name} by {index.dtype} on {device_of(index).type}: {_where()}"] += 1

    def _refuse_mixed(self, name: str, args: Any, tensors: list[Tensor], found: set[torch.device]) -> None:
        large = {device_of(tensor) for tensor in tensors if tensor.dim() > 0} - {ANY}
        # A number on the CPU may go with tensors on the GPU, and never the other way round.
        if len(large) < 2 and (len(found) < 2 or (large and CPU not in large and found == large | {CPU})):
            return
        if name in INDEXED and device_of(args[0]) != CPU and found <= {device_of(args[0]), CPU}:
            return
        shapes = [(tuple(tensor.shape), str(device_of(tensor))) for tensor in tensors]
        raise PretendError(f"{name} mixes devices: {shapes} at {_where()}")


class _To(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, options: dict[str, Any]) -> Tensor:
        ctx.back = {"device": device_of(tensor), "dtype": tensor.dtype}
        return torch.ops.aten._to_copy(tensor, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grads
        if device_of(gradient) == ctx.back["device"] and gradient.dtype == ctx.back["dtype"]:
            return gradient, None
        return torch.ops.aten._to_copy(gradient, **ctx.back), None


class _Functions(TorchFunctionMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        _calls.append(func in SAID or kwargs.get("device") is not None)
        try:
            return self._called(func, args, kwargs)
        finally:
            _calls.pop()

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        owner = getattr(func, "__self__", None)
        if owner is TENSOR.device:
            real, own = REAL_DEVICE(args[0]), device_of(args[0])
            return real if real.type == "meta" else CPU if own == ANY else own
        for kind in ("cuda", "cpu", "mps"):
            if owner is getattr(TENSOR, f"is_{kind}"):
                return device_of(args[0]).type == kind
        if func is TENSOR.get_device:
            return -1 if device_of(args[0]) == CPU else device_of(args[0]).index
        if func in (TENSOR.numpy, TENSOR.__array__) and device_of(args[0]) not in (CPU, ANY):
            raise PretendError(f"a tensor on {device_of(args[0])} has no numpy array: {_where()}")
        if func is TENSOR.tolist and device_of(args[0]) != CPU:
            self._log.waits[f"tolist: {_where()}"] += 1
        if func is TENSOR.cpu:
            return args[0] if device_of(args[0]) == CPU else _to_device(args[0], {"device": CPU})
        if func is TENSOR.cuda:
            return _to_device(args[0], {"device": torch.device("cuda", 0)})
        if func is TENSOR.to:
            return self._to(args, kwargs)
        if func in (torch.as_tensor, torch.tensor, torch.from_numpy, torch.frombuffer, TENSOR.new_tensor):
            return self._read(func, args, kwargs)
        return func(*args, **kwargs)

    def _to(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, options = args[0], {key: kwargs[key] for key in ("device", "dtype") if kwargs.get(key) is not None}
        waits_not = kwargs.get("non_blocking", False)
        for given in args[1:]:
            if isinstance(given, Tensor):
                options |= {"device": device_of(given), "dtype": given.dtype}
            elif isinstance(given, torch.dtype):
                options["dtype"] = given
            elif isinstance(given, str | torch.device):
                options["device"] = given
            elif isinstance(given, bool):
                waits_not = given
            elif isinstance(given, int):
                options["device"] = torch.device("cuda", given)
        if "device" in options and torch.device(options["device"]).type == "meta":
            return TENSOR.to(*args, **kwargs)
        options["device"] = _whole(options.get("device", device_of(tensor)))
        options.setdefault("dtype", tensor.dtype)
        if options == {"device": device_of(tensor), "dtype": tensor.dtype} and not kwargs.get("copy", False):
            return tensor
        more = {"memory_format": kwargs["memory_format"]} if "memory_format" in kwargs else {}
        return _to_device(tensor, {**options, "non_blocking": waits_not, **more})

    def _read(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        device = kwargs.pop("device", None)
        if func is torch.as_tensor and isinstance(args[0], Tensor):
            return args[0] if device is None else args[0].to(device)
        if func is TENSOR.new_tensor:
            device = device_of(args[0]) if device is None else device
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, **kwargs}
        out = func(*args, **kwargs)
        _tag(out, CPU)
        return out if device is None or _whole(device) == CPU else _to_device(out, {"device": _whole(device)})


def _to_device(tensor: Tensor, options: dict[str, Any]) -> Tensor:
    if tensor.requires_grad and torch.is_grad_enabled():
        return _To.apply(tensor, options)
    return torch.ops.aten._to_copy(tensor, **options)
