"""Nothing that a client sends touches a tensor before it passed these checks, in this order.

1. the reply is no error; 2. its keys are exactly those that were asked for; 3. it is not larger than it can be;
4. each header fits (serialisation, dtype, shape as asked, length of the body); 5. every value is finite, and is one
that the wire format can make;
6. the norm is below the cap; 7. the weight is a whole number in [1, the declared maximum];
8. it was trained on the base that was asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora import __version__
from fedlora.errors import ReplyError
from fedlora.flower.messages import Ask, decode_head
from fedlora.flower.wire import decode_change
from fedlora.sanitize import clean_text

RECORDS = {"reply": ConfigRecord, "update": ArrayRecord, "metrics": MetricRecord}
"""What the reply of a client that has trained holds."""
METRICS = frozenset(("loss", "steps", "seconds", "compute_seconds", "examples_seen"))

LARGEST_FIGURES = {"steps": 1e9, "seconds": 1e8, "compute_seconds": 1e10, "examples_seen": 1e12}
"""Counts and times are not negative, and smaller than that; a loss may be any finite number."""


@dataclass(frozen=True)
class Limits:
    """What a reply may at most be.

    Args:
        max_examples: largest number of examples that a client may claim.
        max_norm: largest L2 norm over all tensors together; None: no cap.
        metrics: figures that it may carry beside the number of examples.
    """

    max_examples: int
    max_norm: float | None = None
    metrics: frozenset[str] = METRICS


@dataclass(frozen=True)
class Valid:
    """A reply that passed; `change` is the L2 norm of what the client changed."""

    tensors: Mapping[str, Tensor]
    change: float
    num_examples: int
    metrics: Mapping[str, float]


def check_head(reply: Message, kinds: Sequence[str] = ("update", "need")) -> dict[str, Any]:
    """Check 1: the head of a reply of one of these kinds; `ReplyError` for an error of any sort."""
    if reply.has_error():
        raise ReplyError(error_text(reply))
    head = decode_head(reply.content)
    kind = head.get("kind")
    if kind == "error":
        raise ReplyError(clean_text(head.get("error", "")) or "no reason given")
    if kind not in kinds:
        raise ReplyError(f"the reply is of unknown kind {clean_text(kind, 40)!r}")
    return head


@dataclass(frozen=True)
class Hello:
    """What a node says of itself.

    Args:
        client_id: the number of the client that it serves.
        rank: that it asks for, if any.
        num_examples: that it has; None where it does not say (private runs).
    """

    client_id: int
    rank: int | None = None
    num_examples: int | None = None


def check_hello(reply: Message | None, fingerprint: str, clients: int, max_rank: int, max_examples: int) -> Hello:
    """Check what a node says of itself.

    Args:
        reply: to the question "hello"; None if there is none.
        fingerprint: of the server's base model.
        clients: how many there are.
        max_rank: that a node may ask for.
        max_examples: that a node may claim.

    Raises:
        ReplyError: if the node cannot take part; the message says why.
    """
    if reply is None:
        raise ReplyError("it did not answer")
    head = check_head(reply, ("hello",))
    if head.get("fedlora") != __version__:
        theirs = clean_text(head.get("fedlora"), 40)
        raise ReplyError(f"it runs fedlora {theirs}, the server {__version__}: install the same")
    if head.get("fingerprint") != fingerprint:
        raise ReplyError("its base model is not the server's (another hash): fetch the same model and revision")
    client_id = head.get("client_id")
    if type(client_id) is not int or not 0 <= client_id < clients:
        raise ReplyError(f"it says to be client {clean_text(client_id, 40)}, and there are {clients}, numbered from 0")
    rank = head.get("rank")
    if rank is not None and (type(rank) is not int or not 1 <= rank <= max_rank):
        raise ReplyError(
            f"it asks for rank {clean_text(rank, 40)}, and a rank is a whole number from 1 to {max_rank}: change rank "
            "in the node's own config, or raise server.max_rank"
        )
    count = head.get("num_examples")
    if count is not None and (type(count) is not int or not 0 <= count <= max_examples):
        raise ReplyError(
            f"it says to have {clean_text(count, 40)} examples, and that is no whole number from 0 to "
            f"server.max_examples = {max_examples}"
        )
    return Hello(client_id, rank, count)


def check_update(content: RecordDict, ask: Ask, limits: Limits) -> Valid:
    """Checks 2 to 8.

    Raises:
        ReplyError: naming the first check that failed.
    """
    manifest = ask.headers()
    head = decode_head(content)
    if {name: type(record) for name, record in content.items()} != RECORDS:
        raise ReplyError("the reply does not hold exactly the records reply, update and metrics")
    arrays = cast("ArrayRecord", content["update"])
    if odd := set(arrays) ^ set(manifest):
        name = min(odd)
        raise ReplyError(f"tensor {clean_text(name, 80)!r} {'was not asked for' if name in arrays else 'is missing'}")
    size = sum(len(array.data) for array in arrays.values())
    if size > (cap := sum(header.nbytes for header in manifest.values())):
        raise ReplyError(f"the reply has {size} bytes of tensors, {cap} were asked for")
    for name, header in manifest.items():
        array = arrays[name]
        if array.stype != header.stype:
            raise ReplyError(f"tensor {name!r} is serialised as {clean_text(array.stype, 40)!r}, not {header.stype!r}")
        if array.dtype != header.dtype:
            raise ReplyError(f"tensor {name!r} is of type {clean_text(array.dtype, 40)!r}, not {header.dtype!r}")
        if tuple(array.shape) != header.shape or not all(type(side) is int for side in array.shape):
            raise ReplyError(f"tensor {name!r} has shape {clean_text(tuple(array.shape)[:8], 80)}, not {header.shape}")
        if len(array.data) != header.nbytes:
            raise ReplyError(f"tensor {name!r} has {len(array.data)} bytes, not {header.nbytes}")
    starts = ask.starts()
    tensors = {name: decode_change(arrays[name], start) for name, start in starts.items()}
    change = l2_norm(tensor - starts[name].to(tensor.device, tensor.dtype) for name, tensor in tensors.items())
    if not math.isfinite(change):  # also for changes beyond float32, or whose squares are beyond float64
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ReplyError(f"tensor {name!r} holds values that are not finite: lower the client's learning rate")
    if limits.max_norm is not None and not (norm := l2_norm(tensors.values())) <= limits.max_norm:
        raise ReplyError(f"the update's norm {norm:.4g} is above server.max_norm = {limits.max_norm:g}")
    weight, metrics = _metrics(cast("MetricRecord", content["metrics"]), limits)
    if type(head.get("round")) is not int or head["round"] != ask.round:
        raise ReplyError(f"the reply is for round {clean_text(head.get('round'), 20)}, not {ask.round}")
    if head.get("base_digest") != ask.base_digest:
        raise ReplyError("the update was trained on another version of the base")
    return Valid(tensors, change, weight, metrics)


def l2_norm(tensors: Iterable[Tensor]) -> float:
    """The L2 norm over all entries of some tensors, summed in float64; infinite where float64 is too small."""
    entries = [tensor.reshape(-1) for tensor in tensors]
    if not entries:
        return 0.0
    norm = float(torch.linalg.vector_norm(torch.cat(entries), dtype=torch.float64))
    return norm if math.isfinite(norm) else math.inf


def _metrics(record: MetricRecord, limits: Limits) -> tuple[int, dict[str, float]]:
    weight = record.get("num_examples")
    if not isinstance(weight, int) or isinstance(weight, bool):
        raise ReplyError(f"num_examples must be a whole number, not {clean_text(weight, 40)!r}")
    if not 1 <= weight <= limits.max_examples:
        raise ReplyError(
            f"num_examples {weight} is not within 1 and {limits.max_examples}, the smaller of server.max_examples and "
            "what the partition gives it"
        )
    if odd := set(record) - limits.metrics - {"num_examples"}:
        raise ReplyError(f"metric {clean_text(min(odd), 40)!r} was not asked for")
    metrics: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list) or not abs(value) <= sys.float_info.max:
            raise ReplyError(f"metric {name!r} is no finite number")
        if name in LARGEST_FIGURES and not 0 <= value <= LARGEST_FIGURES[name]:
            raise ReplyError(f"metric {name!r} is {value:g}, which no client measures")
        metrics[name] = float(value)
    return weight, metrics


def error_text(reply: Message) -> str:
    """One line of a Flower error: its last line carries the exception."""
    lines = [clean_text(line) for line in reply.error.reason[-20_000:].splitlines()] if reply.error.reason else []
    said = [line for line in lines if line]
    return f"{said[-1] if said else 'no reason given'} (Flower error code {reply.error.code})"
