"""What travels between the server and a client in a round, whoever carries it: Flower's messages, or nobody.

What a client needs of a plan is sent once: frozen parts (FFA-LoRA's A) are named by a digest and left out for a client
that is known to hold them, and changes of the base are sent from the version that the client holds. A simulation sends
nothing, and counts the same bytes.

Tensors travel as one buffer for each message, and one for each part that travels by itself; see `fedlora.wire_formats`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar, cast, final

from torch import Tensor

from fedlora import __version__
from fedlora.adapter import Layout, Part
from fedlora.aggregators import ClientPlan
from fedlora.config import RunConfig
from fedlora.rng import derive
from fedlora.state_io import flatten_base_update
from fedlora.wire_formats import (
    Header,
    as_received,
    decode_change,
    encode_change,
    header_of,
    joined,
    layout_digest,
    layout_json,
    sliced,
    tensors_digest,
)

PROTOCOL = 2
MAX_ERROR = 1_000
"""Characters of an error that a client tells; escaped they fit into a head."""
FIGURE_BYTES = 8
"""Of one number among a reply's figures."""

T = TypeVar("T")


@dataclass(frozen=True)
class TrainRequest:
    """What the server asks of one client in one round.

    Args:
        plan: The rule's plan.
        round: 1-based.
        client_id: Whose plan it is.
        base_digest: Identity of the base weights on which to train ("" for the pristine base).
        since_digest: Identity of the base to which `plan.base_updates` apply.
        wire: Format of the reply's tensors, one of `fedlora.wire_formats.WIRES`.
        run: Id of a private run's directory, the same after a resume; "" where no ledger needs it.
    """

    plan: ClientPlan
    round: int
    client_id: int
    base_digest: str = ""
    since_digest: str = ""
    wire: str = "float32"
    run: str = ""

    @cached_property
    def starts(self) -> dict[str, Tensor]:
        """The tensors that the reply is to hold, as they are before training."""
        return self.plan.adapter.tensors(self.plan.sends)

    @cached_property
    def headers(self) -> dict[str, Header]:
        """The reply's layout, in the order of its tensors' names."""
        return {name: header_of(self.wire, t.dtype, tuple(t.shape)) for name, t in sorted(self.starts.items())}

    @cached_property
    def layout_digest(self) -> str:
        """Names the reply's layout: client and server must mean the same."""
        return layout_digest(self.headers)

    @property
    def reply_nbytes(self) -> int:
        """Bytes of the reply's tensors."""
        return sum(header.nbytes for header in self.headers.values())

    def encode(self, trained: Mapping[str, Tensor], seed: int) -> bytes:
        """The reply's buffer.

        Args:
            trained: The tensors that are sent, after training.
            seed: The run's, for formats that round at random.
        """
        return joined(
            encode_change(trained[name], self.starts[name], self.wire, self._rounding_seed(seed, name))
            for name in self.headers
        )

    def decode(self, buffer: bytes) -> dict[str, Tensor]:
        """The trained tensors of a buffer of `reply_nbytes`.

        Raises:
            ReplyError: it holds codes that the wire format does not make.
        """
        parts = sliced(self.headers, buffer)
        return {name: decode_change(self.headers[name], parts[name], start) for name, start in self.starts.items()}

    def as_received(self, trained: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """What the server would decode of `encode`'s buffer."""
        return {
            name: as_received(tensor, self.starts[name], self.wire, self._rounding_seed(seed, name))
            for name, tensor in trained.items()
        }

    def _rounding_seed(self, seed: int, name: str) -> int:
        return 0 if self.wire == "float32" else derive(seed, "wire", self.round, self.client_id, name)


@dataclass(frozen=True)
class TrainedReply:
    """What a client that has trained sends.

    Args:
        request: That it answers.
        tensors: The parts that were asked for, after training.
        figures: "num_examples" and what else it reports.
    """

    request: TrainRequest
    tensors: Mapping[str, Tensor]
    figures: Mapping[str, float]


def trained_tensors(plan: ClientPlan) -> dict[str, Tensor]:
    """Tensors of a plan that always travel: what is trained, unless the client can draw it from the plan's seed."""
    tensors = plan.adapter.tensors(plan.trains)
    return tensors if plan.fresh_seed is None else {n: t for n, t in tensors.items() if n in plan.adapter.dense}


def frozen_tensors(plan: ClientPlan) -> dict[str, Tensor]:
    """Tensors of a plan that no client changes, and that travel once."""
    if plan.fresh_seed is not None:
        return {}
    return plan.adapter.tensors(cast("set[Part]", {"A", "B", "dense"} - plan.trains))


@final
class OfSameTensors(Generic[T]):
    """A function of named tensors that keeps its last result: most clients of a round are sent the very same tensors.

    Args:
        make: The function; what it returns is shared by all who ask.
    """

    def __init__(self, make: Callable[[dict[str, Tensor]], T]) -> None:
        self._make = make
        self._last: tuple[dict[str, Tensor], T] | None = None

    def __call__(self, tensors: dict[str, Tensor]) -> T:
        """The function's result, which may be shared."""
        if self._last is not None:
            of, made = self._last
            if of.keys() == tensors.keys() and all(of[name] is tensor for name, tensor in tensors.items()):
                return made
        made = self._make(tensors)
        self._last = tensors, made
        return made


@final
class FrozenDigest:
    """Digest of the parts of a plan that it does not train, "" where there are none; of shared tensors taken once."""

    def __init__(self) -> None:
        self._digest = OfSameTensors(lambda tensors: tensors_digest(tensors) if tensors else "")

    def __call__(self, plan: ClientPlan) -> str:
        """The digest."""
        return self._digest(frozen_tensors(plan))


# ------------------------------------------------------------------------------------------------------ heads


def request_head(request: TrainRequest, frozen: str, buffers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What a request says besides its tensors.

    Args:
        request: To be sent.
        frozen: Digest of the plan's frozen parts.
        buffers: See `request_tensors`.
    """
    plan = request.plan
    return {
        "protocol": PROTOCOL,
        "fedlora": __version__,
        "run": request.run,
        "round": request.round,
        "client_id": request.client_id,
        "layout": _layout_json(plan.adapter.layout),
        "dense": sorted(plan.adapter.dense),
        "trains": sorted(plan.trains),
        "sends": sorted(plan.sends),
        "base_version": plan.base_version,
        "base_digest": request.base_digest,
        "since_digest": request.since_digest,
        "fresh_seed": plan.fresh_seed,
        "proximal_mu": plan.proximal_mu,
        "wire": request.wire,
        "frozen": frozen,
        "merges": [flatten_base_update(update)[1] for update in plan.base_updates],
        "buffers": {name: layout_json(tensors) for name, tensors in buffers.items()},
    }


def update_head(request: TrainRequest) -> dict[str, Any]:
    """What the reply of a client that has trained says besides tensors and figures."""
    said = {"round": request.round, "base_digest": request.base_digest, "layout": request.layout_digest}
    return {"protocol": PROTOCOL, "kind": "update", **said}


def note_head(kind: str, **fields: Any) -> dict[str, Any]:
    """A reply without tensors: kind "need" (frozen parts or base changes are missing), "error", "spent" or "hello"."""
    return {"protocol": PROTOCOL, "kind": kind, **fields}


def _layout_json(layout: Layout) -> dict[str, list[float]]:
    return {name: [shape.d_out, shape.d_in, shape.rank, shape.scale] for name, shape in layout.items()}


# ------------------------------------------------------------------------------------------------------ bytes


def request_tensors(plan: ClientPlan, *, with_frozen: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors of each buffer of a request: "adapter", "frozen", and "merge/<version>" for each change of the base.

    Args:
        plan: To be sent.
        with_frozen: False for a client that holds the frozen parts already.
    """
    buffers = {"adapter": trained_tensors(plan)}
    if with_frozen and (frozen := frozen_tensors(plan)):
        buffers["frozen"] = frozen
    return buffers | {merge_buffer(update.version): flatten_base_update(update)[0] for update in plan.base_updates}


def merge_buffer(version: int) -> str:
    """Name of the buffer of a change of the base to this version."""
    return f"merge/{version}"


def request_nbytes(request: TrainRequest, frozen: str, *, with_frozen: bool) -> int:
    """Bytes of a request: tensors, and the head as text."""
    buffers = request_tensors(request.plan, with_frozen=with_frozen)
    return tensors_nbytes(buffers) + head_nbytes(request_head(request, frozen, buffers))


def tensors_nbytes(buffers: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes of all buffers of a request."""
    return sum(tensor.nbytes for tensors in buffers.values() for tensor in tensors.values())


def head_nbytes(head: Mapping[str, Any]) -> int:
    """Characters of a head, which is ASCII."""
    return len(json.dumps(head))


# ------------------------------------------------------------------------------------------------------ configs

PLAN_TABLES = (
    "seed", "model", "adapter", "task", "data", "partition", "clients", "train", "strategy", "wire", "privacy"
)  # fmt: skip
"""The parts of a config that decide what a plan asks for, beside the plan itself."""


def plan_config(config: RunConfig) -> str:
    """Digest of what a plan depends on in a config, such as the learning rate."""
    return config.digest(*PLAN_TABLES)
