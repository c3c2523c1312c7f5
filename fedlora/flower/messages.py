"""Plans and updates <-> Flower messages; how one tensor travels is in `fedlora.flower.wire`.

What a client needs of a plan is sent once: frozen parts (FFA-LoRA's A) are named by a digest and left out for a client
that is known to hold them; changes of the base are sent from the version that the client holds. A client that does not
hold what the server believes (it was restarted) answers with a `need`, and is sent everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast, final

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedlora import __version__
from fedlora.adapter import AdapterState, Layout, LoraPair, PairShape, Part, fresh_pairs
from fedlora.aggregators import BaseUpdate, ClientPlan
from fedlora.errors import ReplyError
from fedlora.flower.wire import WIRES, Header, encode_change, from_array, header_of, to_array
from fedlora.rng import derive
from fedlora.sanitize import clean_text
from fedlora.state_io import flatten_base_update, unflatten_base_update

T = TypeVar("T")

PROTOCOL = 1
MAX_HEAD = 16_384
"""Characters that the head of a reply may have."""
MAX_ERROR = 1_000
"""Characters of an error that a client tells; escaped they fit into a head."""


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
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        elif isinstance(record, ConfigRecord):
            total += sum(len(str(value)) for value in record.values())
        else:
            total += 8 * len(record)
    return total


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
        wire: in which format the reply's tensors are to come, one of `WIRES`.
        run: id of a private run's directory, the same after a resume; "" where no ledger needs it.
    """

    plan: ClientPlan
    round: int
    client_id: int
    base_digest: str = ""
    since_digest: str = ""
    wire: str = "float32"
    run: str = ""

    def starts(self) -> dict[str, Tensor]:
        """The tensors that the reply is to hold, as they are before training."""
        return self.plan.adapter.tensors(self.plan.sends)

    def headers(self) -> dict[str, Header]:
        """The manifest of the reply: the header of each tensor."""
        return {name: header_of(self.wire, t.dtype, tuple(t.shape)) for name, t in self.starts().items()}


@final
class _Kept(Generic[T]):
    """A function of named tensors that keeps its last result: most clients of a round are sent the very same tensors.

    Args:
        make: the function; what it gives is shared by all who ask.
    """

    def __init__(self, make: Callable[[dict[str, Tensor]], T]) -> None:
        self._make = make
        self._last: tuple[dict[str, Tensor], T] | None = None

    def __call__(self, tensors: dict[str, Tensor]) -> T:
        if self._last is not None:
            of, made = self._last
            if of.keys() == tensors.keys() and all(of[name] is tensor for name, tensor in tensors.items()):
                return made
        made = self._make(tensors)
        self._last = tensors, made
        return made


class PlanEncoder:
    """Turns asks into message contents; arrays that many clients share are encoded once per round."""

    def __init__(self) -> None:
        self._arrays = WeakTensorKeyDictionary()  # weak: with mixed ranks each plan has tensors of its own
        self._record = _Kept(lambda tensors: ArrayRecord({name: self.array(t) for name, t in tensors.items()}))
        self._digest = _Kept(lambda tensors: digest(tensors) if tensors else "")

    def array(self, tensor: Tensor) -> Array:
        """`to_array`, remembered while the tensor lives: for an `ArrayRecord`, which copies all but the bytes."""
        if tensor not in self._arrays:
            self._arrays[tensor] = to_array(tensor)
        made: Array = self._arrays[tensor]
        return made

    def frozen_digest(self, plan: ClientPlan) -> str:
        """Digest of the parts that the plan does not train ("" where there are none)."""
        return self._digest(frozen_tensors(plan))

    def encode(self, ask: Ask, *, with_frozen: bool = True) -> RecordDict:
        """The content of a train message; messages with the same tensors share one record of arrays.

        Args:
            ask: what to send.
            with_frozen: False for a client that holds the frozen parts already.
        """
        plan = ask.plan
        tensors = {f"adapter/{name}": tensor for name, tensor in trained_tensors(plan).items()}
        if with_frozen:
            tensors |= {f"frozen/{name}": tensor for name, tensor in frozen_tensors(plan).items()}
        base_updates = []
        for index, base_update in enumerate(plan.base_updates):
            changes, meta = flatten_base_update(base_update, f"merge/{index}/")
            tensors |= changes
            base_updates.append(meta)
        head = {
            "protocol": PROTOCOL,
            "fedlora": __version__,
            "run": ask.run,
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
            "wire": ask.wire,
            "frozen": self.frozen_digest(plan),
            "merges": base_updates,
        }
        return RecordDict({"plan": ConfigRecord({"json": json.dumps(head)}), "arrays": self._record(tensors)})


def trained_tensors(plan: ClientPlan) -> dict[str, Tensor]:
    """Tensors of a plan that always travel: what is trained, unless the client can draw it from the plan's seed."""
    tensors = plan.adapter.tensors(plan.trains)
    return tensors if plan.fresh_seed is None else {n: t for n, t in tensors.items() if n in plan.adapter.dense}


def frozen_tensors(plan: ClientPlan) -> dict[str, Tensor]:
    """Tensors of a plan that no client changes, and that travel once."""
    if plan.fresh_seed is not None:
        return {}
    return plan.adapter.tensors(cast("set[Part]", {"A", "B", "dense"} - plan.trains))


class Decoded:
    """The tensors of raw arrays, each decoded once: on a grid without a wire many clients are sent the same bytes."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str, tuple[int, ...]], tuple[bytes, Tensor]] = {}

    def tensor(self, array: Array) -> Tensor:
        """`from_array`; who asks for the same bytes object is given the same tensor, and must not change it."""
        key = id(array.data), array.dtype, array.shape
        if key not in self._held:
            self._held[key] = array.data, from_array(array)  # with the bytes, so that no others are given their id
        return self._held[key][1]


@dataclass(frozen=True)
class ReceivedPlan:
    """A plan on the client's side, before what it leaves out was filled in.

    Args:
        head: what was said of the arrays.
        arrays: by name.
        decoded: the tensors of the arrays; may be shared with other plans.
    """

    head: Mapping[str, Any]
    arrays: Mapping[str, Array]
    decoded: Decoded = field(default_factory=Decoded)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under one prefix ("adapter/" or "frozen/"), by the names of `AdapterState.tensors`."""
        return {key[len(prefix) :]: tensor for key, tensor in self._under(prefix).items()}

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {key: self.decoded.tensor(array) for key, array in self.arrays.items() if key.startswith(prefix)}

    def base_updates(self) -> tuple[BaseUpdate, ...]:
        """The changes of the base that were sent."""
        return tuple(
            unflatten_base_update(self._under(f"merge/{index}/"), meta, f"merge/{index}/")
            for index, meta in enumerate(self.head["merges"])
        )

    def digest(self, config: str) -> str:
        """Names what is asked for, however much of it this message leaves out.

        Args:
            config: digest of the config by which the node trains.
        """
        head = {key: value for key, value in self.head.items() if key not in ("merges", "since_digest")}
        text = json.dumps([head, digest(self.tensors("adapter/")), config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

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


def decode_plan(content: RecordDict, decoded: Decoded | None = None) -> ReceivedPlan:
    """Read a train message.

    Args:
        content: of the message.
        decoded: what was decoded of other messages, to be shared.

    Raises:
        ReplyError: if the server speaks another protocol, or asks for a wire format that this node does not know.
    """
    head = json.loads(str(cast("ConfigRecord", content["plan"])["json"]))
    if head["protocol"] != PROTOCOL:
        raise ReplyError(
            f"the server speaks protocol {head['protocol']} (fedlora {head['fedlora']}) and this node {PROTOCOL} "
            f"(fedlora {__version__}): install the same fedlora on both"
        )
    if head["wire"] not in WIRES:
        raise ReplyError(
            f"the server (fedlora {head['fedlora']}) asks for wire format {str(head['wire'])[:40]!r}, and this node "
            f"(fedlora {__version__}) knows {', '.join(WIRES)}: install the same fedlora on both"
        )
    return ReceivedPlan(head, cast("ArrayRecord", content["arrays"]), decoded or Decoded())


# ------------------------------------------------------------------------------------------------------ replies


def encode_upload(plan: ReceivedPlan, start: AdapterState, trained: AdapterState, seed: int) -> dict[str, Array]:
    """The parts of a trained adapter that a plan asks for, in the format that it asks for.

    Args:
        plan: what was asked.
        start: the adapter before training, as the server knows it.
        trained: the adapter after it.
        seed: the run's.
    """
    head, tensors = plan.head, trained.tensors(plan.head["sends"])
    if head["wire"] == "float32":
        return {name: to_array(tensor) for name, tensor in tensors.items()}
    before, key = start.tensors(head["sends"]), (seed, "wire", head["round"], head["client_id"])
    return {
        name: encode_change(tensor, before[name], head["wire"], derive(*key, name)) for name, tensor in tensors.items()
    }


def encode_update(
    tensors: Mapping[str, Tensor | Array], metrics: Mapping[str, float], *, round_number: int, base_digest: str
) -> RecordDict:
    """The content of a reply that carries a trained adapter's parts (tensors travel as they are)."""
    head = {"protocol": PROTOCOL, "kind": "update", "round": round_number, "base_digest": base_digest}
    arrays = ArrayRecord()
    for name, value in tensors.items():  # one by one: from a dict it would copy them
        arrays[name] = value if isinstance(value, Array) else to_array(value)
    return RecordDict(
        {
            "reply": ConfigRecord({"json": json.dumps(head)}),
            "update": arrays,
            "metrics": MetricRecord(dict(metrics)),
        }
    )


def encode_note(kind: str, **fields: Any) -> RecordDict:
    """A reply without tensors: kind "need" (frozen parts or base changes are missing), "error", "spent" or "hello"."""
    if "error" in fields:
        fields["error"] = clean_text(fields["error"], MAX_ERROR)
    return RecordDict({"reply": ConfigRecord({"json": json.dumps({"protocol": PROTOCOL, "kind": kind, **fields})})})


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
