"""Attention by length: two matrix products and a softmax for short sequences, torch's fused kernel for long ones.

torch's fused attention keeps the scores of long sequences out of memory. In bfloat16 on a CPU its backward pass costs
far more than it saves on the lengths that most federated tasks have (`benchmarks/attention.py` measures it). Which of
the two is taken is a function of device, dtype and length alone, never of a measurement: a run repeats bit by bit.

transformers' models call whatever attention function their config names; `choose_attention` registers ours there and
names it, so that it serves every architecture that asks transformers' interface for its function.

Shapes: b = examples, h = heads, g = key and value heads (h is a multiple), t = queries, s = keys, d = features of a
head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedlora.errors import ModelError, nearest

Mode: TypeAlias = Literal["auto", "sdpa", "eager"]

MODES: tuple[Mode, ...] = ("auto", "sdpa", "eager")
NAME = "fedlora_by_length"
"""Under which transformers knows the function."""
SHORT: dict[tuple[str, torch.dtype], int] = {("cpu", torch.bfloat16): 256}
"""Device and dtype -> the most keys for which two products are at least as fast; what is not here is never short.

Measured forward and backward on an AMD EPYC core, heads of 32 and 64 features. In float32 and float16 the fused kernel
is faster at every length."""
TOKENS = "fedlora_tokens"
"""The keyword argument with which `fedlora.speedups.unpadding` says that each token is a row, and of which text."""
NOT_OURS = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments that change what is computed; transformers' own function takes them, or says that it cannot."""


@dataclass(frozen=True)
class AttentionReport:
    """What `choose_attention` did.

    Attributes:
        mode: "auto" where attention goes by length, else the one function that the model uses. Pass it to repeat.
        reason: One line, why.
    """

    mode: Mode
    reason: str


def choose_attention(model: nn.Module, mode: Mode = "auto") -> AttentionReport:
    """Sets how a transformers model attends; the model is changed in place.

    Args:
        model: on its device and in its dtype, before or after adapters are injected.
        mode: "auto" goes by length, and leaves a model alone that chooses its attention itself; "sdpa" is torch's
            fused kernel; "eager" is the model's own plain code.

    Raises:
        ModelError: the mode is unknown, or was asked for and the model does not have it.
    """
    if mode not in MODES:
        raise ModelError(f"unknown runtime.attention {mode!r}; {nearest(str(mode), MODES)}", code="unknown-name")
    now = str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager")
    kept: Mode = "sdpa" if now in ("sdpa", NAME) else "eager"
    if not _settable(model):
        if mode not in ("auto", kept):
            raise ModelError(
                f"{type(model).__name__} has attention code of its own ({kept}), which cannot be replaced: set "
                "runtime.attention = 'auto'",
                code="attention-not-supported",
            )
        return AttentionReport(kept, f"{type(model).__name__} attends by its own code")
    if mode != "eager" and not getattr(model, "_supports_sdpa", False):
        if mode == "sdpa":
            raise ModelError(
                f"{type(model).__name__} has no sdpa attention: set runtime.attention = 'auto'",
                code="attention-not-supported",
            )
        return AttentionReport(kept, f"{type(model).__name__} has no sdpa attention")
    if mode == "auto":
        _register()
    model.set_attn_implementation(NAME if mode == "auto" else mode)  # type: ignore[operator]
    if mode != "auto":
        return AttentionReport(mode, "asked for")
    weight = next(model.parameters())
    limit = short_limit(weight.device, weight.dtype)
    what = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    if limit:
        return AttentionReport("auto", f"two products up to {limit} tokens, then sdpa ({what})")
    return AttentionReport("auto", f"sdpa is the fastest at every length ({what})")


def set_attention(model: nn.Module, name: str | None) -> None:
    """Give a model an attention that transformers knows by name, such as the one that it was loaded with."""
    if name is not None and _settable(model) and model.config._attn_implementation != name:  # type: ignore[union-attr]
        model.set_attn_implementation(name)  # type: ignore[operator]


def short_limit(device: torch.device, dtype: torch.dtype) -> int:
    """The most keys for which two products are taken rather than the fused kernel."""
    return SHORT.get((device.type, dtype), 0)


def attend(
    module: nn.Module,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s d"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b t h d"], None]:
    """An attention function as transformers' interface wants it.

    Args:
        module: the model's attention layer; its `is_causal` counts where the argument is None.
        query: Q.
        key: K; for the first token's query alone also [b, s * h, 1, d], see `fedlora.speedups.last_layer`.
        value: V, likewise.
        attention_mask: broadcast to [b, h, t, s]: bool, True where a query may look, or added to the scores.
        dropout: probability, 0 outside of training.
        scaling: of the scores; None: 1 / sqrt(d).
        is_causal: whether a query sees no later key; counts where there is no mask, as in sdpa.
        kwargs: whatever else the model passes on.
    """
    if (tokens := kwargs.pop(TOKENS, None)) is not None:
        query, key, value = (tokens.padded(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        found, _ = attend(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        return tokens.unpadded(found), None
    if key.shape[1] > query.shape[1]:
        key, value = (_tokens_apart(states, query.shape[1]) for states in (key, value))
        attention_mask = attention_mask if attention_mask is None else attention_mask[:, :, :1]
    causal = attention_mask is None and query.shape[2] > 1
    causal = causal and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    limit = short_limit(query.device, query.dtype)
    # torch's kernel for CPUs knows no dropout: with it the scores are in memory either way, at any length.
    # And one query's scores are as small as its key.
    short = key.shape[2] <= limit or (limit > 0 and (dropout > 0 or query.shape[2] == 1))
    foreign = any(kwargs.get(name) is not None for name in NOT_OURS) or torch.compiler.is_compiling()
    if foreign or not short or (causal and query.shape[2] != key.shape[2]):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return found, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = two_products(query, key, value, attention_mask, scale, causal, dropout)
    return out.transpose(1, 2).contiguous(), None


def two_products(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s d"],
    mask: Tensor | None,
    scale: float,
    causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "b h t d"]:
    """softmax(Q Kᵀ scale + mask) V with the scores in memory (Vaswani et al. 2017, arXiv 1706.03762, equation (1)).

    A query that may look nowhere looks everywhere alike, as in transformers' plain code; only padding is such.
    """
    (b, h, t, d), (g, s) = query.shape, key.shape[1:3]
    # The queries of the heads that share a key head are rows of one product, so that no key is copied.
    scores = torch.matmul((query * scale).reshape(b, g, h // g * t, d), key.transpose(2, 3)).view(b, h, t, s)
    if causal:
        mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    # On a CPU torch computes a bfloat16 softmax in float32 and rounds its result; elsewhere that has to be asked for.
    halves = scores.dtype in (torch.bfloat16, torch.float16) and not scores.is_cpu
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) if halves else torch.softmax(scores, -1)
    if dropout:
        weights = functional.dropout(weights, dropout)
    return torch.matmul(weights.view(b, g, h // g * t, s), value).view(b, h, t, value.shape[-1])


def _tokens_apart(states: Float[Tensor, "b sh 1 d"], heads: int) -> Float[Tensor, "b h s d"]:
    """Keys or values that were shaped as if they had one token."""
    return states.view(states.shape[0], -1, heads, states.shape[-1]).transpose(1, 2)


def _masks(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' masks for this function: added to the scores of short sequences, bool or none for the kernel."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    device, dtype = torch.device(kwargs.get("device", "cpu")), kwargs.get("dtype", torch.float32)
    if kwargs["kv_length"] <= short_limit(device, dtype):
        return eager_mask(*args, **kwargs)  # made once a pass, where a bool mask would be turned into numbers by layer
    return sdpa_mask(*args, **kwargs)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _masks)


def _settable(model: nn.Module) -> bool:
    asks = getattr(type(model), "_can_set_attn_implementation", None)
    return asks is not None and hasattr(model, "set_attn_implementation") and bool(asks())
