"""Requests and replies of a round <-> Flower messages; what they say is `fedlora.federation.protocol`'s.

A client that does not hold what the server believes (it was restarted) answers with a note "need", and is sent
everything.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast, final

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedlora import __version__
from fedlora.adapter import AdapterState, Layout, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import ClientPlan
from fedlora.errors import ReplyError
from fedlora.federation.last_result import LastResult, same_tensors
from fedlora.federation.protocol import (
    ADAPTER,
    KEPT,
    MAX_ERROR,
    MEASURED,
    PROTOCOL,
    TILT,
    TrainedReply,
    TrainRequest,
    base_update_buffer,
    format_of,
    note_head,
    request_head,
    request_tensors,
    update_head,
)
from fedlora.flower.arrays import from_array, to_array
from fedlora.hashing import tensors_digest
from fedlora.sanitize import clean_text
from fedlora.state_io import unflatten_base_update
from fedlora.wire_formats import WIRES, decode_value, encode_value, header_of_value, joined, read_layout, sliced

BUFFER = "buffer"
"""Name of the one array of a reply."""
MAX_HEAD = 16_384
"""Characters that the head of a reply may have."""


def payload_bytes(content: RecordDict) -> int:
    """Bytes of a message's body: the arrays' data and the text of the records."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        elif isinstance(record, ConfigRecord):
            total += sum(len(str(value)) for value in record.values())
        else:
            total += 8 * len(record)
    return total


# ------------------------------------------------------------------------------------------------------ requests


@final
class RequestEncoder:
    """Makes the contents of train messages; a buffer that many clients share is encoded, and hashed, once."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, str], LastResult[dict[str, Tensor], Array]] = {}

    def encode(self, request: TrainRequest, parts: Sequence[str] = ()) -> RecordDict:
        """The content of a message; messages with the same tensors share their arrays.

        Args:
            request: What is asked.
            parts: Of its own examples on which a client is to evaluate; none: it trains.
        """
        buffers = request_tensors(request.plan, request.held)
        head = request_head(request, buffers) | ({"parts": list(parts)} if parts else {})
        arrays = ArrayRecord()
        for name, tensors in buffers.items():  # one by one: from a dict it would copy them
            wire = format_of(name, request.down)
            packed = self._arrays.setdefault((name, wire), LastResult(partial(_packed, wire), same_tensors))
            arrays[name] = packed(tensors)
        return RecordDict({"plan": ConfigRecord({"json": json.dumps(head)}), "arrays": arrays})


def _packed(wire: str, tensors: Mapping[str, Tensor]) -> Array:
    headers = (header_of_value(wire, tensor.dtype, tuple(tensor.shape)) for tensor in tensors.values())
    return to_array(joined(map(encode_value, headers, tensors.values())))


@final
class HeldParts:
    """Parts of adapters by their digests: those of the last request, and of earlier ones as many as fit.

    The last request itself is held while its message is: who asks for it twice, as a worker does for the answer and
    for its audit log, decodes and hashes it once.

    Args:
        nbytes: Bytes of all that is held; the last request's parts are held even if they have more.
    """

    def __init__(self, nbytes: int = 1 << 28) -> None:
        self._nbytes = nbytes
        self._held: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()
        self._last: tuple[weakref.ref[RecordDict], TrainRequest] | None = None

    def keep_request(self, content: RecordDict, request: TrainRequest) -> None:
        """Hold the request in the content of a message for as long as the content is there."""
        self._last = weakref.ref(content, self._forget), request

    def request_in(self, content: RecordDict) -> TrainRequest | None:
        """The request in this very content, if it is the last."""
        return self._last[1] if self._last is not None and self._last[0]() is content else None

    def _forget(self, gone: weakref.ref[RecordDict]) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None

    def keep(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep the parts of a request under their digests."""
        for digest, tensors in parts.items():
            self._held[digest] = tensors
            self._held.move_to_end(digest)
        total = sum(tensor.nbytes for tensors in self._held.values() for tensor in tensors.values())
        while total > self._nbytes and len(self._held) > len(parts):
            _, dropped = self._held.popitem(last=False)
            total -= sum(tensor.nbytes for tensor in dropped.values())

    def get(self, digest: str) -> Mapping[str, Tensor] | None:
        """The tensors of a part, or None if it is not held."""
        return self._held.get(digest)


def decode_request_head(content: RecordDict) -> dict[str, Any]:
    """What a train message says besides its tensors.

    Raises:
        ReplyError: if the server speaks another protocol, or asks for a wire format that this node does not know.
    """
    head: dict[str, Any] = json.loads(str(cast("ConfigRecord", content["plan"])["json"]))
    if head["protocol"] != PROTOCOL:
        raise ReplyError(
            f"the server speaks protocol {head['protocol']} (fedlora {head['fedlora']}) and this node {PROTOCOL} "
            f"(fedlora {__version__}): install the same fedlora on both",
            code="other-protocol",
        )
    if head["wire"] not in WIRES:
        raise ReplyError(
            f"the server (fedlora {head['fedlora']}) asks for wire format {str(head['wire'])[:40]!r}, and this node "
            f"(fedlora {__version__}) knows {', '.join(WIRES)}: install the same fedlora on both",
            code="unknown-wire-format",
        )
    if not (isinstance(fraction := head.get("fraction", 1.0), float) and 0 < fraction <= 1):
        raise ReplyError(
            f"the server asks for a fraction of {str(fraction)[:40]!r} of each tensor: set wire.fraction to a number "
            "above 0 and at most 1",
            code="unknown-wire-format",
        )
    times = head.get("first_times", 1)
    if not (type(times) is int and times >= 1 and set(head.get("first", ())) <= set(head["trains"])):
        raise ReplyError(
            f"the server asks to train {str(head.get('first'))[:40]} first, {str(times)[:40]} times as long as the "
            "rest: a part of what is trained, a whole number of times",
            code="unknown-part",
        )
    return head


def decode_request(content: RecordDict, head: Mapping[str, Any], held: HeldParts) -> TrainRequest | None:
    """The request in a train message; None where it leaves parts out that are not held here.

    Args:
        content: Of the message.
        head: See `decode_request_head`.
        held: Parts of earlier messages; those of this one are added.

    Raises:
        ReplyError: a buffer is not as the head lays it out, or its parts are not those that the head names.
    """
    if (before := held.request_in(content)) is not None:
        return before
    buffers, layout = _unpacked(content, head), _layout_from_json(head["layout"])
    sent = _by_part(buffers.get(ADAPTER, {}), layout, head)
    parts: dict[str, Mapping[str, Tensor]] = {}
    for part, digest in head["digests"].items():
        if part in sent and tensors_digest(sent[part]) != digest:
            raise ReplyError(
                f"{part} of the plan is not what it names (another hash): report this bug", code="parts-differ"
            )
        tensors = sent.get(part) or held.get(digest)
        if tensors is None:
            return None
        parts[digest] = tensors
    held.keep(parts)
    plan = ClientPlan(
        adapter=_adapter(layout, head["fresh_seed"], {name: t for part in parts.values() for name, t in part.items()}),
        trains=frozenset(head["trains"]),
        sends=frozenset(head["sends"]),
        base_version=head["base_version"],
        base_updates=tuple(
            unflatten_base_update(buffers[base_update_buffer(meta["version"])], meta) for meta in head["merges"]
        ),
        fresh_seed=head["fresh_seed"],
        proximal_mu=head["proximal_mu"],
        tilt=buffers.get(TILT, {}),
        asks=MEASURED.intersection(head.get("asks", ())),
        first=frozenset(head.get("first", ())),
        first_times=head.get("first_times", 1),
    )
    _require_tilt(plan, head)
    request = TrainRequest(
        plan,
        head["round"],
        head["client_id"],
        head["base_digest"],
        head["since_digest"],
        wire=head["wire"],
        fraction=head.get("fraction", 1.0),
        run=head["run"],
        ledger=str(head.get("ledger", "")),
        kept_round=int(head.get("kept_round", 0)),
    )
    held.keep_request(content, request)
    return request


def _require_tilt(plan: ClientPlan, head: Mapping[str, Any]) -> None:
    """Raise `ReplyError` for a tilt that is not the one that the head names, or not of what the client sends."""
    sent = plan.adapter.tensors(plan.sends)
    fits = all(name in sent and value.shape == sent[name].shape for name, value in plan.tilt.items())
    if not fits or (tensors_digest(plan.tilt) if plan.tilt else None) != head.get("tilt"):
        raise ReplyError(
            "the plan's tilt does not fit its adapter, or has another hash: report this bug", code="tilt-differs"
        )


def request_digest(head: Mapping[str, Any], config: str) -> str:
    """Names what is asked for, however much of it this message leaves out.

    Args:
        head: See `decode_request_head`.
        config: Digest of the config by which the node trains.
    """
    said = {key: value for key, value in head.items() if key not in ("merges", "since_digest", "buffers", "ledger")}
    return hashlib.sha256(json.dumps([said, config], sort_keys=True).encode()).hexdigest()


def _unpacked(content: RecordDict, head: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each buffer of a message; all layouts are checked before a buffer is sliced.

    Raises:
        ReplyError: a buffer is not as the head lays it out.
    """
    arrays, layouts = cast("ArrayRecord", content["arrays"]), head["buffers"]
    if not isinstance(layouts, dict) or layouts.keys() != set(arrays):
        raise ReplyError(
            "the message's buffers are not those that it names: install the same fedlora on server and node",
            code="invalid-layout",
        )
    buffers = {name: from_array(array) for name, array in arrays.items()}
    checked = {name: read_layout(layouts[name], len(buffer)) for name, buffer in buffers.items()}
    return {
        name: {key: decode_value(layout[key], part) for key, part in sliced(layout, buffers[name]).items()}
        for name, layout in checked.items()
    }


def _by_part(tensors: Mapping[str, Tensor], layout: Layout, head: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """A buffer's tensors by the part that they belong to, as `fedlora.federation.protocol.tensors_by_part` has them."""
    factors, parts = _factors(layout), defaultdict[str, dict[str, Tensor]](dict)
    for name, tensor in tensors.items():
        part = factors.get(name, "dense")
        kept = part in head["trains"] and not {part, name}.intersection(head["sends"])
        parts[KEPT if kept else part][name] = tensor
    return parts


def _factors(layout: Layout) -> dict[str, str]:
    return {f"{name}:{factor}": factor for name in layout for factor in "ABR"}


def _adapter(layout: Layout, fresh_seed: int | None, tensors: Mapping[str, Tensor]) -> AdapterState:
    """Where training starts."""
    if fresh_seed is not None:
        return AdapterState(fresh_pairs(layout, fresh_seed), dict(tensors))
    pairs = {
        name: LoraPair(tensors[f"{name}:A"], tensors[f"{name}:B"], shape.scale, tensors.get(f"{name}:R"))
        for name, shape in layout.items()
    }
    factors = _factors(layout)
    return AdapterState(pairs, {name: tensor for name, tensor in tensors.items() if name not in factors})


def _layout_from_json(layout: Mapping[str, Iterable[Any]]) -> dict[str, PairShape]:
    return {name: PairShape(*shape) for name, shape in layout.items()}


# ------------------------------------------------------------------------------------------------------ replies


def encode_reply(reply: TrainedReply, seed: int) -> RecordDict:
    """The content of a client's reply.

    Args:
        reply: What is sent.
        seed: The run's, for formats that round at random.
    """
    head, buffer = update_head(reply.request, reply.ledger), reply.request.encode(reply.tensors, seed)
    return update_content(ConfigRecord({"json": json.dumps(head)}), buffer, MetricRecord(dict(reply.figures)))


def update_content(head: ConfigRecord, buffer: bytes, figures: MetricRecord) -> RecordDict:
    """The records of a reply of a client that has trained."""
    return RecordDict({"reply": head, "update": ArrayRecord({BUFFER: to_array(buffer)}), "metrics": figures})


def encode_note(kind: str, **fields: Any) -> RecordDict:
    """A reply without tensors: see `fedlora.federation.protocol.note_head`."""
    if "error" in fields:
        fields["error"] = clean_text(fields["error"], MAX_ERROR)
    return RecordDict({"reply": ConfigRecord({"json": json.dumps(note_head(kind, **fields))})})


def decode_head(content: RecordDict) -> dict[str, Any]:
    """The head of any reply.

    Raises:
        ReplyError: if it is missing, no JSON object, or of another protocol.
    """
    try:
        record = content["reply"]
        text = record["json"]
        if not isinstance(record, ConfigRecord) or len(record) > 1 or not isinstance(text, str) or len(text) > MAX_HEAD:
            raise ValueError
        head = json.loads(text)
    except (KeyError, ValueError, RecursionError):  # ValueError: no JSON, and whole numbers of 5000 digits
        raise ReplyError("the reply has no readable head", code="unreadable-head") from None
    if not isinstance(head, dict) or head.get("protocol") != PROTOCOL:
        raise ReplyError(
            f"the reply is not of protocol {PROTOCOL}: install the same fedlora on server and node",
            code="other-protocol",
        )
    return head
