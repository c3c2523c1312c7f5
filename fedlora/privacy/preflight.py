"""Before the first private step: is each example's gradient its own, and is it the one that gets clipped?

Some models make private training fail loudly in the middle, others silently train without privacy; both are found
here on a few examples, by running them, with a message that names the cure. Each example is computed truly alone, at
its own length, and beside others: in the mode of training, with its own dropout masks, and in float64 where memory
allows it, so that rounding hides nothing.

Shapes: b = examples looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedlora.errors import PrivacyError
from fedlora.memory import free_bytes, widest
from fedlora.privacy.four_bits import computed_exactly
from fedlora.privacy.hooks import attach, backward, detach, per_sample_gradients

BatchLosses = Callable[[torch.nn.Module, dict[str, Tensor], Sequence[int]], Tensor]
"""Model, batch and the number of the example in each of its rows -> the loss of each [b]. An example's dropout masks
must follow from its number alone, whoever is beside it."""

CROWD = 24
"""Rows in which an example must come to the same loss as alone: experts and caches have room for a few examples."""
COARSEST = 1e4
"""Units of the last place by which two ways to compute the same may differ."""
SHARE = 0.4
"""Of the free memory, which the model's wider copy may take."""


def preflight(
    model: torch.nn.Module, losses: BatchLosses, together: Mapping[str, Tensor], alone: Sequence[Mapping[str, Tensor]]
) -> None:
    """Refuse a model on which private training would fail or would not be private.

    The model, its gradients and the global random state are left as they were.

    Args:
        model: as it will be trained: in training mode, with `requires_grad` set.
        losses: the loss of each example.
        together: some examples in one batch, [b, ...] for each tensor, b >= 2; any will do, invented ones too, but
            their lengths should differ.
        alone: each of them in a batch of its own, at its own length, in the same order.

    Raises:
        PrivacyError: names the module and the cure.
    """
    require_structure(model)
    if len(alone) < 2:
        raise PrivacyError(
            "the check before private training needs two examples: give it a batch of two", code="too-few-examples"
        )
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=sorted({d.index or 0 for d in devices})), _shaken(model):
        _as_trained(model, losses, dict(together), len(alone))
        with widened(model) as tolerance:
            _against_brute_force(model, losses, dict(together), [dict(one) for one in alone], tolerance)


def require_structure(model: torch.nn.Module) -> None:
    """Refuse what can be seen without running the model.

    Raises:
        PrivacyError: DoRA, LoRA on embeddings, evaluation mode, BatchNorm in training mode, checkpointing that is not
            re-entrant, nothing to train.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise _nothing_to_train()
    for name, module in model.named_modules():
        if len(getattr(module, "lora_magnitude_vector", None) or ()):
            raise PrivacyError(
                f"{name!r} uses DoRA, whose per-sample gradients cannot be computed: set adapter.method = 'lora'",
                code="dora-unsupported",
            )
        if len(getattr(module, "lora_embedding_A", None) or ()):
            raise PrivacyError(
                f"{name!r} is an embedding with LoRA, whose weights are used where no hook sees them: leave it out "
                "of adapter.targets",
                code="lora-on-embedding",
            )
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.training and _mixes(module):
            raise PrivacyError(
                f"{name!r} normalises by the statistics of the batch, so that each example's gradient depends on the "
                "others: put it in evaluation mode after model.train(), or replace it by GroupNorm",
                code="batch-statistics",
            )
        if getattr(module, "gradient_checkpointing", False) and not _reentrant(module):
            raise PrivacyError(
                f"{name or type(module).__name__!r} checkpoints gradients in the form that runs hooks twice: call "
                'gradient_checkpointing_enable({"use_reentrant": True}) and enable_input_require_grads()',
                code="checkpointing-not-reentrant",
            )
        if getattr(module, "gradient_checkpointing", False) and _drops(module):
            raise PrivacyError(
                f"{name or type(module).__name__!r} uses gradient checkpointing and dropout, so that its second "
                "forward pass would draw other masks than the first: set model.dropout = 0, or do not checkpoint",
                code="checkpointing-with-dropout",
            )
        if not module.training and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise PrivacyError(
                f"{name!r} is trained but is in evaluation mode, where per-sample gradients are not recorded: call "
                "model.train()",
                code="evaluation-mode",
            )


def _nothing_to_train() -> PrivacyError:
    return PrivacyError(
        "there is nothing to train: set requires_grad on the adapter before private training", code="nothing-to-train"
    )


def require_trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that holds other tensors than the model trains, as after a late device move or injection.

    Raises:
        PrivacyError: also if the trained tensors are on several devices.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    cure = "build the optimizer from the model's trainable parameters, after the model is on its device"
    if not trained:
        raise _nothing_to_train()
    missing = trained.keys() - held
    if missing:
        raise PrivacyError(
            f"the optimizer does not hold {trained[min(missing)]!r}, which the model trains: {cure}",
            code="optimizer-mismatch",
        )
    if held - trained.keys():
        raise PrivacyError(
            f"the optimizer trains a tensor that is not among the model's trainable ones: {cure}",
            code="optimizer-mismatch",
        )
    devices = sorted({str(p.device) for p in model.parameters() if p.requires_grad})
    if len(devices) > 1:
        raise PrivacyError(
            f"the trained tensors are on several devices ({', '.join(devices)}): {cure}", code="several-devices"
        )


def _drops(module: torch.nn.Module) -> bool:
    return any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules())


def _mixes(module: torch.nn.Module) -> bool:
    # Instance norms without running statistics look at one example at a time.
    instance = isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
    return not instance or bool(module.track_running_stats)


def _reentrant(module: torch.nn.Module) -> bool:
    keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(keywords.get("use_reentrant", False))


def _as_trained(model: torch.nn.Module, losses: BatchLosses, together: dict[str, Tensor], b: int) -> None:
    """One backward in the very form of training: hooks must work, one gradient an example, and add up to the whole."""
    samples = _hooked(model, losses, together, b)
    whole = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in _trained(model).items()}
    size = _norm(list(whole.values()))
    for name, gradient in whole.items():
        if _gap(samples[name].sum(0), gradient, size) > _tolerance(model):
            raise PrivacyError(
                f"the per-sample gradients of {name!r} do not sum to its gradient, because part of its use is not "
                "seen by hooks (a weight used by name, or tied): freeze it",
                code="gradient-not-seen",
            )
    _clear(model)


def _against_brute_force(
    model: torch.nn.Module,
    losses: BatchLosses,
    together: dict[str, Tensor],
    alone: list[dict[str, Tensor]],
    tolerance: float,
) -> None:
    """The gradients of examples in one batch against those of each truly alone, and their losses in a crowd."""
    together, alone = _as_wide(model, together), [_as_wide(model, one) for one in alone]
    samples = _hooked(model, losses, together, len(alone))
    params = _trained(model)
    single = []
    for i, one in enumerate(alone):
        _clear(model)
        loss = losses(model, one, [i]).sum()
        single.append(loss.detach())
        backward(loss)  # autograd.grad would pass by re-entrant checkpoints
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params.values()]
        size = _norm(gradients)
        for name, truth in zip(params, gradients, strict=True):
            if (gap := _gap(samples[name][i], truth, size)) > tolerance:
                raise PrivacyError(_depends(f"the gradient of {name!r} for one example", gap), code="examples-coupled")
    _clear(model)
    times = max(1, CROWD // len(alone))
    crowd = {name: torch.cat([value] * times) for name, value in together.items()}
    with torch.no_grad():
        found = losses(model, crowd, list(range(len(alone))) * times).cpu().double()
    truth = torch.stack(single).cpu().double().repeat(times)
    gaps = (found - truth).abs() / truth.abs().clamp_min(1e-3)
    if not bool((gaps <= tolerance).all()):
        raise PrivacyError(_depends("the loss of one example", float(gaps.max())), code="examples-coupled")


def _depends(what: str, gap: float) -> str:
    return (
        f"{what} depends on the other examples in its batch (by {gap:.2g} of its size), on their length perhaps: use "
        "the mean over each example's own tokens as its loss, and a model whose layers neither mix examples nor see "
        "padding"
    )


def _hooked(model: torch.nn.Module, losses: BatchLosses, together: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Each example's gradients, by hooks."""
    _clear(model)
    hooks = attach(model)
    try:
        values = losses(model, together, range(b))
        if values.shape != (b,):
            raise PrivacyError(
                f"the loss of {b} examples has shape {list(values.shape)}: give per-sample losses, [{b}], never a mean "
                "over the batch or its tokens",
                code="loss-not-per-example",
            )
        backward(values)
        return {name: g.clone() for name, g in per_sample_gradients(_trained(model), b).items()}
    except PrivacyError:
        raise
    except Exception as error:
        raise PrivacyError(
            f"per-sample gradients cannot be computed for this model ({type(error).__name__}: "
            f"{' '.join(str(error).split())}): adapt plain linear layers, and leave embeddings, convolutions with "
            "state and custom layers frozen",
            code="no-per-sample-gradients",
        ) from error
    finally:
        detach(model, hooks)


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _clear(model: torch.nn.Module) -> None:
    for p in _trained(model).values():
        p.grad = None


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> float:
    return float(sum(float(t.to(widest(t.device)).square().sum()) for t in tensors) ** 0.5)


def _gap(a: Tensor, b: Tensor, size: float) -> float:
    wide = widest(a.device)
    difference = _norm([a.to(wide) - b.to(wide)])
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _tolerance(model: torch.nn.Module) -> float:
    """Relative, for the coarsest dtype that takes part: rounding is far below it, a mixed-up example far above."""
    coarsest = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.dtype.is_floating_point)
    return min(0.1, max(1e-9, COARSEST * coarsest))


@contextmanager
def _shaken(model: torch.nn.Module) -> Iterator[None]:
    """Move the trained values a little: fresh adapters have B = 0, where A's gradient is 0 and would prove nothing."""
    params = _trained(model)
    before = {name: p.detach().clone() for name, p in params.items()}
    gradients = {name: p.grad for name, p in params.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in params.values():
                p.add_(torch.randn(p.shape, generator=generator).to(p.device, p.dtype), alpha=0.05)
        yield
    finally:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(before[name])
                p.grad = gradients[name]


@contextmanager
def widened(model: torch.nn.Module) -> Iterator[float]:
    """The model in float64, in float32 where memory does not allow that, or else as it is; afterwards as before.

    Gives the relative difference up to which two ways to compute the same count as equal: layers that compute in
    float32 whatever their input (RMSNorm, rotary embeddings) round at 1e-7, and mixed-up examples differ by percents.
    Layers of 4 bits are computed from their decoded weights, since their own kernels have 32 bits at most.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype.is_floating_point]
    wide = torch.float64
    for wide in (widest(tensors[0].device), torch.float32):
        if sum(t.numel() * wide.itemsize for t in tensors if t.dtype != wide) <= SHARE * free_bytes(tensors[0].device):
            break
    else:
        wide = torch.float16  # no dtype below is narrower
    kept = [(t, t.data) for t in tensors if t.dtype.itemsize < wide.itemsize]
    try:
        for tensor, data in kept:
            tensor.data = data.to(wide)
        with computed_exactly(model):
            yield 1e-5 if wide == torch.float64 else _tolerance(model)
    finally:
        for tensor, data in kept:
            tensor.data = data


def _as_wide(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch for a model inside `widened`: pictures in float64 if all of the model is."""
    wide = all(p.dtype == torch.float64 for p in model.parameters() if p.dtype.is_floating_point)
    return {name: value.double() if wide and value.is_floating_point() else value for name, value in batch.items()}
