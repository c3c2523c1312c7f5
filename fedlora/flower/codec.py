"""Plans and updates <-> Flower messages; no pickle, no NumPy container, raw bytes with a declared dtype and shape.

A tensor travels as `Array(dtype, shape, stype="fedlora.raw.v1", data)`, so that bfloat16 is possible and the receiver
can check the header against its own manifest before it looks at the body.

What a client needs of a plan is sent once: frozen parts (FFA-LoRA's A) are named by a digest and left out for a client
that is known to hold them; changes of the base are sent from the version that the client holds. A client that does not
hold what the server believes (it was restarted) answers with a `need`, and is sent everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedlora import __version__
from fedlora.adapter import AdapterState, Layout, LoraPair, PairShape, Part, fresh_pairs
from fedlora.aggregators import ClientPlan, Merge
from fedlora.errors import ReplyError
from fedlora.state_io import flatten_merge, unflatten_merge

PROTOCOL = 1
STYPE = "fedlora.raw.v1"
MAX_HEAD = 65_536
"""Characters that the head of a reply may have."""
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ------------------------------------------------------------------------------------------------------ tensors


def to_array(tensor: Tensor) -> Array:
    """One tensor as raw little-endian bytes with its dtype and shape."""
    flat = tensor.detach().cpu().contiguous()
    data = flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return Array(_NAMES[flat.dtype], tuple(flat.shape), STYPE, data)


def from_array(array: Array) -> Tensor:
    """The tensor of an array whose header was checked; the result owns its memory."""
    dtype = DTYPES[array.dtype]
    if not array.data:
        return torch.zeros(array.shape, dtype=dtype)
    return torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(array.shape)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = to_array(tensors[name])
        sha.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        sha.update(array.data)
    return sha.hexdigest()


def payload_bytes(content: RecordDict) -> int:
    """Bytes of a message's body: the arrays' data and the text of the records."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    texts = sum(len(str(value)) for record in content.config_records.values() for value in record.values())
    return arrays + texts + sum(8 * len(record) for record in content.metric_records.values())


# ------------------------------------------------------------------------------------------------------ plans


@dataclass(frozen=True)
class Ask:
    """A plan as it is sent to one client in one round.

    Args:
        plan: what the rule asks.
        round: 1-based number of the round.
        client_id: whose plan it is.
        base_digest: identity of the base weights on which to train ("" for the pristine base).
        since_digest: identity of the base to which `plan.merges` apply.
    """

    plan: ClientPlan
    round: int
    client_id: int
    base_digest: str = ""
    since_digest: str = ""


class PlanEncoder:
    """Turns asks into message contents; arrays that many clients share are encoded once per round."""

    def __init__(self) -> None:
        self._arrays = WeakTensorKeyDictionary()  # weak: with mixed ranks each plan has tensors of its own
        self._frozen: tuple[dict[str, Tensor], str] = ({}, "")

    def array(self, tensor: Tensor) -> Array:
        """`to_array`, remembered while the tensor lives."""
        if tensor not in self._arrays:
            self._arrays[tensor] = to_array(tensor)
        made: Array = self._arrays[tensor]
        return Array(made.dtype, made.shape, made.stype, made.data)

    def frozen_digest(self, plan: ClientPlan) -> str:
        """Digest of the parts that the plan does not train ("" where there are none)."""
        tensors = frozen_tensors(plan)
        last, known = self._frozen
        if last.keys() != tensors.keys() or any(last[name] is not tensor for name, tensor in tensors.items()):
            known = digest(tensors) if tensors else ""
            self._frozen = tensors, known
        return known

    def encode(self, ask: Ask, *, with_frozen: bool = True) -> RecordDict:
        """The content of a train message.

        Args:
            ask: what to send.
            with_frozen: False for a client that holds the frozen parts already.
        """
        plan = ask.plan
        arrays: dict[str, Array] = {}
        for name, tensor in trained_tensors(plan).items():
            arrays[f"adapter/{name}"] = self.array(tensor)
        if with_frozen:
            for name, tensor in frozen_tensors(plan).items():
                arrays[f"frozen/{name}"] = self.array(tensor)
        merges = []
        for index, merge in enumerate(plan.merges):
            tensors, meta = flatten_merge(merge, f"merge/{index}/")
            arrays.update({name: self.array(tensor) for name, tensor in tensors.items()})
            merges.append(meta)
        head = {
            "protocol": PROTOCOL,
            "fedlora": __version__,
            "round": ask.round,
            "client_id": ask.client_id,
            "layout": _layout_json(plan.adapter.layout),
            "dense": sorted(plan.adapter.dense),
            "trains": sorted(plan.trains),
            "sends": sorted(plan.sends),
            "base_version": plan.base_version,
            "base_digest": ask.base_digest,
            "since_digest": ask.since_digest,
            "fresh_seed": plan.fresh_seed,
            "proximal_mu": plan.proximal_mu,
            "frozen": self.frozen_digest(plan),
            "merges": merges,
        }
        return RecordDict({"plan": ConfigRecord({"json": json.dumps(head)}), "arrays": ArrayRecord(arrays)})


def trained_tensors(plan: ClientPlan) -> dict[str, Tensor]:
    """Tensors of a plan that always travel: what is trained, unless the client can draw it from the plan's seed."""
    tensors = plan.adapter.tensors(plan.trains)
    return tensors if plan.fresh_seed is None else {n: t for n, t in tensors.items() if n in plan.adapter.dense}


def frozen_tensors(plan: ClientPlan) -> dict[str, Tensor]:
    """Tensors of a plan that no client changes, and that travel once."""
    if plan.fresh_seed is not None:
        return {}
    return plan.adapter.tensors(cast("set[Part]", {"A", "B", "dense"} - plan.trains))


@dataclass(frozen=True)
class ReceivedPlan:
    """A plan on the client's side, before what it leaves out was filled in."""

    head: Mapping[str, Any]
    arrays: Mapping[str, Array]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under one prefix ("adapter/" or "frozen/"), by the names of `AdapterState.tensors`."""
        return {key[len(prefix) :]: tensor for key, tensor in self._under(prefix).items()}

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {key: from_array(array) for key, array in self.arrays.items() if key.startswith(prefix)}

    def merges(self) -> tuple[Merge, ...]:
        """The changes of the base that were sent."""
        return tuple(
            unflatten_merge(self._under(f"merge/{index}/"), meta, f"merge/{index}/")
            for index, meta in enumerate(self.head["merges"])
        )

    def adapter(self, frozen: Mapping[str, Tensor]) -> AdapterState:
        """Where training starts.

        Args:
            frozen: the frozen tensors, from this message or from an earlier one.
        """
        layout = _layout_from_json(self.head["layout"])
        tensors = {**self.tensors("adapter/"), **frozen}
        if self.head["fresh_seed"] is not None:
            pairs = fresh_pairs(layout, self.head["fresh_seed"])
            return AdapterState(pairs, {name: tensors[name] for name in self.head["dense"]})
        return _adapter(layout, tensors)


def decode_plan(content: RecordDict) -> ReceivedPlan:
    """Read a train message.

    Raises:
        ReplyError: if the server speaks another protocol.
    """
    head = json.loads(str(content.config_records["plan"]["json"]))
    if head["protocol"] != PROTOCOL:
        raise ReplyError(
            f"the server speaks protocol {head['protocol']} (fedlora {head['fedlora']}) and this node {PROTOCOL} "
            f"(fedlora {__version__}): install the same fedlora on both"
        )
    return ReceivedPlan(head, content.array_records["arrays"])


# ------------------------------------------------------------------------------------------------------ replies


def encode_update(
    tensors: Mapping[str, Tensor], metrics: Mapping[str, float], *, round_number: int, base_digest: str
) -> RecordDict:
    """The content of a reply that carries a trained adapter's parts."""
    head = {"protocol": PROTOCOL, "kind": "update", "round": round_number, "base_digest": base_digest}
    return RecordDict(
        {
            "reply": ConfigRecord({"json": json.dumps(head)}),
            "update": ArrayRecord({name: to_array(tensor) for name, tensor in tensors.items()}),
            "metrics": MetricRecord(dict(metrics)),
        }
    )


def encode_note(kind: str, **fields: Any) -> RecordDict:
    """A reply without tensors: kind "need" (frozen parts or base changes are missing), "error", "spent" or "hello"."""
    return RecordDict({"reply": ConfigRecord({"json": json.dumps({"protocol": PROTOCOL, "kind": kind, **fields})})})


def decode_head(content: RecordDict) -> dict[str, Any]:
    """The head of any reply.

    Raises:
        ReplyError: if it is missing, no JSON object, or of another protocol.
    """
    try:
        record = content.config_records["reply"]
        text = record["json"]
        if len(record) > 1 or not isinstance(text, str) or len(text) > MAX_HEAD:
            raise ValueError
        head = json.loads(text)
    except (KeyError, ValueError, RecursionError):  # ValueError: no JSON, and whole numbers of 5000 digits
        raise ReplyError("the reply has no readable head") from None
    if not isinstance(head, dict) or head.get("protocol") != PROTOCOL:
        raise ReplyError(f"the reply is not of protocol {PROTOCOL}: install the same fedlora on server and node")
    return head


def _layout_json(layout: Layout) -> dict[str, list[float]]:
    return {name: [shape.d_out, shape.d_in, shape.rank, shape.scale] for name, shape in layout.items()}


def _layout_from_json(layout: Mapping[str, Iterable[Any]]) -> dict[str, PairShape]:
    return {name: PairShape(*shape) for name, shape in layout.items()}


def _adapter(layout: Layout, tensors: Mapping[str, Tensor]) -> AdapterState:
    pairs = {name: LoraPair(tensors[f"{name}:A"], tensors[f"{name}:B"], shape.scale) for name, shape in layout.items()}
    of_pairs = {f"{name}:{factor}" for name in layout for factor in "AB"}
    return AdapterState(pairs, {name: value for name, value in tensors.items() if name not in of_pairs})
