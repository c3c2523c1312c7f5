"""The cross entropy of a language model's tokens, `CHUNK` of them at a time, so that no batch's logits are there whole.

A vocabulary of 128,000 words makes half a megabyte of logits a token, and their gradient as much again. The output
layer is frozen; so the gradient of a token's loss by its hidden state is known in the forward pass up to the one factor
that the backward pass brings. It is computed while the chunk's logits are there, and kept in their place: no product is
computed twice. (Liger's fused loss does the same for the mean of a batch; here each token has its own factor.)

Shapes: w = rows of a batch, t = its tokens, e = its examples, k = tokens that are predicted and count, d = hidden size,
v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from fedlora.tasks._base import Batch, require_possible, sums_of, wide, without_cache

IGNORED = -100  # the label of a token that does not count
CHUNK = 512  # tokens: a vocabulary of 50,000 makes 100 MB of logits of them
DECODED = "decoder_input_ids"  # of a batch for an encoder and a decoder
COMPARED = 64  # tokens of an example whose logits are compared after an export


@dataclass(frozen=True)
class Counted:
    """The tokens of a batch that count, where the model is.

    Args:
        places: of the tokens that predict them, in the flattened batch.
        targets: their ids.
        owners: the example of each.
        tokens: how many each example has.
    """

    places: Int[Tensor, "k"]
    targets: Int[Tensor, "k"]
    owners: Int[Tensor, "k"]
    tokens: Int[Tensor, "e"]

    @classmethod
    def of(cls, batch: Batch) -> Counted:
        """Found on the CPU, where the labels are, and sent in one copy: a GPU would be waited for at each index.

        A token is predicted by the one before it; a decoder's input is shifted already.
        """
        labels, device, shift = batch["labels"], batch["input_ids"].device, int(DECODED not in batch)
        places = functional.pad(labels[:, shift:] != IGNORED, (0, shift)).flatten().nonzero()[:, 0]
        targets = labels.flatten()[places + shift]
        if "segments" in batch:
            owners, count = batch["segments"].flatten()[places], int(batch["segments"].max()) + 1
        else:
            owners, count = places // labels.shape[1], len(labels)
        tokens = torch.bincount(owners, minlength=count)
        found = torch.cat([places, targets, owners, tokens]).to(device, non_blocking=device.type == "cuda")
        return cls(*found.split([len(places)] * 3 + [count]))


def mean_losses(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> tuple[Float[Tensor, "e"], Int[Tensor, "e"]]:
    """Mean cross entropy of each example's counted tokens, in nats, and their number.

    Args:
        model: with its adapter.
        batch: where the model is, but for its labels and segments.
        smoothing: share of the target that is spread evenly over the vocabulary.
    """
    counted = Counted.of(batch)
    each = _losses(model, batch, counted, smoothing)
    sums = each.new_zeros(len(counted.tokens)).index_add(0, counted.owners, each)
    return sums / counted.tokens, counted.tokens


def measured_tokens(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "e"], Int[Tensor, "e"], Int[Tensor, "e"]]:
    """What `mean_losses` gives, and how many of each example's counted tokens are not the likeliest after those before.

    With none of them the model, decoding greedily, says to the example's prompt what the example says.
    """
    counted = Counted.of(batch)
    losses, misses = [], []
    logits = _logits(model, batch, counted, _chosen_states(model, batch, counted))
    for part, own in zip(logits, counted.targets.split(CHUNK), strict=True):
        losses.append(_cross_entropy(part, own, 0.0))
        misses.append((part.argmax(dim=-1) != own).long())
    each = torch.cat(losses)
    sums = each.new_zeros(len(counted.tokens)).index_add(0, counted.owners, each)
    missed = torch.zeros_like(counted.tokens).index_add(0, counted.owners, torch.cat(misses))
    return sums / counted.tokens, counted.tokens, missed


def perplexity_sums(measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The numbers of "examples", of "exact" ones and of counted "tokens", and the losses in nats added up over the
    examples and over the tokens.

    Args:
        measures: "loss", "tokens" and "exact" (1 or 0) of each example.
    """
    loss, tokens = (np.asarray(measures[name], dtype=np.float64) for name in ("loss", "tokens"))
    return sums_of({**measures, "token_loss": loss * tokens}, ("exact", "tokens", "loss", "token_loss"))


def perplexity_figures(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Perplexity and "token_loss", its logarithm, weigh every token alike; "loss" weighs every example alike, and
    "exact_match" is the share of the examples that greedy decoding gives."""
    token_loss = float(sums["token_loss"] / sums["tokens"])
    # exp overflows near 709; a diverged model has a perplexity of infinity, not an error.
    perplexity = float(np.exp(min(token_loss, 709.0))) if token_loss <= 709.0 else float("inf")
    return {
        "perplexity": perplexity,
        "loss": float(sums["loss"] / sums["examples"]),
        "token_loss": token_loss,
        "exact_match": float(sums["exact"] / sums["examples"]),
    }


def require_tokens(sums: Mapping[str, np.ndarray], most: float) -> None:
    """Raise `ReplyError` for examples without a counted token, with more than `most`, or with too many right ones."""
    examples, tokens = float(sums["examples"]), float(sums["tokens"])
    require_possible(examples <= tokens <= examples * most, f"{examples:g} examples do not have {tokens:g} tokens")
    require_possible(float(sums["exact"]) <= examples, f"more than {examples:g} examples are exact")


def logits_at(model: nn.Module, batch: Batch, places: Int[Tensor, "k"]) -> Float[Tensor, "k v"]:
    """Logits at some places of the flattened batch alone: a large vocabulary's are a third of a small model's work."""
    shape = batch.get(DECODED, batch["input_ids"]).shape

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (_at(hidden, places)[None], *args[1:]) if hidden.ndim == 3 and hidden.shape[:2] == shape else args

    head = _frozen_head(model)  # whoever takes a trained one's gradients by example wants to see whole rows
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(**_inputs(model, batch)).logits
    finally:
        if handle is not None:
            handle.remove()
    return _at(logits, places) if logits.shape[:2] == shape else logits[0]


def _losses(model: nn.Module, batch: Batch, counted: Counted, smoothing: float) -> Float[Tensor, "k"]:
    states = _chosen_states(model, batch, counted)
    if states is not None and states[0].requires_grad:
        found: Tensor = _ChunkedLosses.apply(*states, counted.targets, smoothing)
        return found
    logits = _logits(model, batch, counted, states)
    return torch.cat(
        [_cross_entropy(part, own, smoothing) for part, own in zip(logits, counted.targets.split(CHUNK), strict=True)]
    )


def _chosen_states(
    model: nn.Module, batch: Batch, counted: Counted
) -> tuple[Float[Tensor, "k d"], Callable[[Float[Tensor, "c d"]], Float[Tensor, "c v"]]] | None:
    """The hidden states that predict the counted tokens, and the rest of the model, where there is more than a chunk of
    them and the model is put together so."""
    whole = DECODED not in batch  # an encoder would be computed anew for each chunk
    many = whole and len(counted.places) > CHUNK
    if many and (body := _body(model)) is not None and (states := _states(model, body, batch)):
        return _at(states[0], counted.places), states[1]
    return None


def _logits(
    model: nn.Module, batch: Batch, counted: Counted, states: tuple[Tensor, Callable[[Tensor], Tensor]] | None
) -> Iterator[Float[Tensor, "c v"]]:
    """Those that predict the counted tokens, `CHUNK` of them at a time."""
    if states is None:
        return iter(logits_at(model, batch, counted.places).split(CHUNK))
    return map(states[1], states[0].split(CHUNK))


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rest: Callable[[Tensor], Tensor], targets: Tensor, smoothing: float
    ) -> Tensor:
        losses, slopes = [], []
        for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            own = part.detach().requires_grad_()
            with torch.enable_grad():
                each = _cross_entropy(rest(own), wanted, smoothing)
                slopes.append(torch.autograd.grad(each.sum(), own)[0])
            losses.append(each.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0][:, None].to(slopes), None, None, None


def _states(
    model: nn.Module, body: nn.Module, batch: Batch
) -> tuple[Float[Tensor, "w t d"], Callable[[Float[Tensor, "c d"]], Float[Tensor, "c v"]]] | None:
    """What the body of a model gives for a batch, and the rest of the model, which makes logits of some of it.

    The rest is the model's own forward pass with another result in its body's place, so that scaled and capped logits
    are what they are. None for a model that is put together in another way.
    """
    inputs, found = _inputs(model, batch), []

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = getattr(output, "last_hidden_state", None)
        if not isinstance(states, Tensor) or states.shape[:2] != batch["input_ids"].shape:
            return None
        found.append(output)
        return _with_states(output, states[:1, :1])

    handle = body.register_forward_hook(keep)
    try:
        model(**inputs)
    finally:
        handle.remove()
    if len(found) != 1:
        return None
    (output,) = found

    def rest(part: Float[Tensor, "c d"]) -> Float[Tensor, "c v"]:
        before = {"forward": own} if (own := vars(body).get("forward")) else {}
        vars(body)["forward"] = lambda *_args, **_kwargs: _with_states(output, part[None])
        try:
            logits: Tensor = model.forward(**inputs).logits  # without the hooks of a call, which look at whole batches
        finally:
            del vars(body)["forward"]
            vars(body).update(before)
        return logits[0]

    return output.last_hidden_state, rest


def _body(model: nn.Module) -> nn.Module | None:
    """The part of a model that makes hidden states; None where it has none, or where something else is trained, whose
    gradient would not be seen."""
    body: nn.Module = getattr(model, "get_decoder", lambda: model)()
    inside = {id(parameter) for parameter in body.parameters()}
    outside = any(parameter.requires_grad and id(parameter) not in inside for parameter in model.parameters())
    return None if body is model or outside or _frozen_head(model) is None else body


def _with_states(output: Any, states: Tensor) -> Any:
    return type(output)(**{**output, "last_hidden_state": states})


def _inputs(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
    if "segments" in batch:
        # transformers knows packed rows by positions that begin anew, and gives each layer its own mask for them, with
        # its sliding window or chunk; but not where it is given a mask or keeps a cache.
        inputs: dict[str, Any] = {"position_ids": batch["position_ids"]}
    else:
        inputs = {name: batch[name] for name in ("attention_mask", DECODED, "decoder_attention_mask") if name in batch}
    return {"input_ids": batch["input_ids"], **inputs, **without_cache(model)}


def _frozen_head(model: nn.Module) -> nn.Module | None:
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    trained = head is not None and any(parameter.requires_grad for parameter in head.parameters())
    return None if trained else head


def _at(values: Float[Tensor, "w t d"], places: Int[Tensor, "k"]) -> Float[Tensor, "k d"]:
    # `index_select` takes a fifth longer on a CPU, backward included.
    return values.flatten(0, 1)[places.to(values.device)]


def _cross_entropy(logits: Float[Tensor, "k v"], targets: Int[Tensor, "k"], smoothing: float) -> Float[Tensor, "k"]:
    return functional.cross_entropy(wide(logits), targets, reduction="none", label_smoothing=smoothing)
