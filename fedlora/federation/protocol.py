"""What travels between the server and a client in a round, whoever carries it: Flower's messages, or nobody.

What a client holds is not sent again: each part of an adapter (A, B, dense) is named by its digest and left out for a
client that is known to hold it, as FFA-LoRA's A in all rounds but a client's first, or the factor that RoLoRA trains
next. Base updates are sent from the version that the client holds. A simulation sends nothing, and counts the same
bytes.

The adapter travels as one buffer, and each base update as one; see `fedlora.wire_formats`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any, final

import torch
from torch import Tensor

from fedlora import __version__
from fedlora.adapter import AdapterState, Layout, Part
from fedlora.aggregators import ClientPlan, Fact
from fedlora.config import RunConfig
from fedlora.federation.last_result import LastResult, same_tensors
from fedlora.federation.plausibility import START_LOSS
from fedlora.hashing import tensors_digest
from fedlora.rng import derive
from fedlora.state_io import flatten_base_update
from fedlora.wire_formats import (
    Header,
    as_received,
    decode_change,
    encode_change,
    header_of,
    header_of_value,
    joined,
    layout_digest,
    layout_json,
    sliced,
)

PROTOCOL = 3
ADAPTER = "adapter"
"""Name of the buffer of the adapter's tensors."""
TILT = "tilt"
"""Name of the buffer of what is added to each step's gradient."""
KEPT = "kept"
"""Name of the part that a client keeps, beside "A", "B" and "dense"."""
MEASURED: frozenset[Fact] = frozenset({START_LOSS})
"""What of `ClientPlan.asks` a client measures; the server knows the others by itself."""
MAX_ERROR = 1_000
"""Characters of an error that a client tells; escaped they fit into a head."""
FIGURE_BYTES = 8
"""Of one number among a reply's figures."""


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
        fraction: Of each tensor's entries that the format "topk" sends.
        run: Id of the run's directory, the same after a resume.
        ledger: Head of the client's ledger when the server last saw it, `fedlora.hash_chain.START` if it never did; ""
            where there is none.
        kept_round: The round whose kept tensors the client goes on from: the last one of which the server used its
            update; 0 if there is none.
        down: Format of the plan's adapter on the way to the client. The plan has it as the client decodes it.
        exact: The adapter as the server has it, if that is another; it does not travel.
        digests: Of the plan's parts, as `PartDigests` gives them; a client has no use for them.
        held: The parts that the client holds already: they do not travel.
    """

    plan: ClientPlan
    round: int
    client_id: int
    base_digest: str = ""
    since_digest: str = ""
    wire: str = "float32"
    fraction: float = 1.0
    run: str = ""
    ledger: str = ""
    kept_round: int = 0
    down: str = "float32"
    exact: AdapterState | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    held: frozenset[str] = frozenset()

    @cached_property
    def starts(self) -> dict[str, Tensor]:
        """The tensors that the reply is to hold, as they are before training."""
        return self.plan.adapter.tensors(self.plan.sends)

    @property
    def headers(self) -> Mapping[str, Header]:
        """The reply's layout, in the order of its tensors' names."""
        return self._layout[0]

    @property
    def layout_digest(self) -> str:
        """Names the reply's layout: client and server must mean the same."""
        return self._layout[1]

    @cached_property
    def _layout(self) -> tuple[Mapping[str, Header], str]:
        starts = tuple((name, start.dtype, start.shape) for name, start in self.starts.items())
        return _reply_layout(self.wire, self.fraction, starts)

    @property
    def measured(self) -> frozenset[str]:
        """The facts that the client itself is to measure; they are among its reply's figures."""
        return self.plan.asks & MEASURED

    @property
    def nbytes(self) -> int:
        """Bytes of the request: tensors, and the head as text."""
        buffers = request_tensors(self.plan, self.held)
        return tensors_nbytes(buffers, self.down) + head_nbytes(request_head(self, buffers))

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
            encode_change(header, trained[name], self.starts[name], self._rounding_seed(seed, name))
            for name, header in self.headers.items()
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
            name: as_received(self.headers[name], tensor, self.starts[name], self._rounding_seed(seed, name))
            for name, tensor in trained.items()
        }

    def updated(self, received: Mapping[str, Tensor]) -> AdapterState:
        """The server's adapter with what the client changed.

        Where the client started from rounded values, what it changed *of these* is added to the server's own: a state
        that is not rounded, and clients that compute their gradients beside it (Philippenko and Dieuleveut, NeurIPS
        2021, arXiv 2102.12528). Of the clients' tensors themselves a mean would be the rounded state's, in which
        changes below half a step are lost in every round.

        Args:
            received: See `decode`.
        """
        if self.exact is None:
            return self.plan.adapter.with_tensors(received)
        own = self.exact.tensors()
        return self.exact.with_tensors(
            {
                name: (own[name].double() + (tensor.double() - self.starts[name].double())).to(own[name].dtype)
                for name, tensor in received.items()
            }
        )

    def _rounding_seed(self, seed: int, name: str) -> int:
        return 0 if self.wire in ("float32", "topk") else derive(seed, "wire", self.round, self.client_id, name)


@lru_cache(maxsize=64)  # most clients of a run have the same
def _reply_layout(
    wire: str, fraction: float, starts: tuple[tuple[str, torch.dtype, torch.Size], ...]
) -> tuple[Mapping[str, Header], str]:
    """The headers of a reply, in the order of their names, and the layout's digest."""
    headers = {
        name: header_of(wire, dtype, tuple(shape), fraction) for name, dtype, shape in sorted(starts, key=itemgetter(0))
    }
    return headers, layout_digest(headers)


@dataclass(frozen=True)
class TrainedReply:
    """What a client that has trained sends.

    Args:
        request: That it answers.
        tensors: The parts that were asked for, after training.
        figures: "num_examples" and what else it reports.
        ledger: Head of its ledger with this round's line; "" where there is none.
    """

    request: TrainRequest
    tensors: Mapping[str, Tensor]
    figures: Mapping[str, float]
    ledger: str = ""


def tensors_by_part(plan: ClientPlan) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part of a plan's adapter, but those that a client can draw from the plan's seed.

    What a client keeps is a part of its own, `KEPT`: it does not change, and is sent once.
    """
    parts: tuple[Part, ...] = ("A", "B", "R", "dense") if plan.fresh_seed is None else ("dense",)
    kept, found = plan.kept, dict[str, dict[str, Tensor]]()
    for part in parts:
        found[part] = {name: value for name, value in plan.adapter.tensors({part}).items() if name not in kept}
    found[KEPT] = kept
    return {part: tensors for part, tensors in found.items() if tensors}


@final
class PartDigests:
    """The digest of each part of a plan's adapter; of tensors that plans share it is taken once."""

    def __init__(self) -> None:
        self._of_part = defaultdict[str, LastResult[dict[str, Tensor], str]](
            lambda: LastResult(tensors_digest, same_tensors)
        )
        self._of_plan = LastResult(self._digests)

    def __call__(self, plan: ClientPlan) -> Mapping[str, str]:
        """The digests."""
        return self._of_plan(plan)

    def _digests(self, plan: ClientPlan) -> dict[str, str]:
        return {part: self._of_part[part](tensors) for part, tensors in tensors_by_part(plan).items()}


# ------------------------------------------------------------------------------------------------------ heads


def request_head(request: TrainRequest, buffers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What a request says besides its tensors.

    Args:
        request: To be sent.
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
        "trains": sorted(plan.trains),
        "sends": sorted(plan.sends),
        "base_version": plan.base_version,
        "base_digest": request.base_digest,
        "since_digest": request.since_digest,
        "fresh_seed": plan.fresh_seed,
        "proximal_mu": plan.proximal_mu,
        "wire": request.wire,
        **({"fraction": request.fraction} if request.wire == "topk" else {}),
        "digests": request.digests,
        "merges": [flatten_base_update(update)[1] for update in plan.base_updates],
        "buffers": {name: layout_json(tensors, format_of(name, request.down)) for name, tensors in buffers.items()},
        **({"tilt": tensors_digest(plan.tilt)} if plan.tilt else {}),
        **({"asks": sorted(request.measured)} if request.measured else {}),
        **({"first": sorted(plan.first), "first_times": plan.first_times} if plan.first else {}),
        **({"ledger": request.ledger} if request.ledger else {}),
        **({"kept_round": request.kept_round} if request.kept_round else {}),
    }


def update_head(request: TrainRequest, ledger: str = "") -> dict[str, Any]:
    """What the reply of a client that has trained says besides tensors and figures.

    Args:
        request: That it answers.
        ledger: See `TrainedReply`.
    """
    said = {"round": request.round, "base_digest": request.base_digest, "layout": request.layout_digest}
    return {"protocol": PROTOCOL, "kind": "update", **said, **({"ledger": ledger} if ledger else {})}


def note_head(kind: str, **fields: Any) -> dict[str, Any]:
    """A reply without tensors: kind "need" (parts or base updates are missing), "error", "spent" or "hello"."""
    return {"protocol": PROTOCOL, "kind": kind, **fields}


def _layout_json(layout: Layout) -> dict[str, list[float]]:
    return {name: [shape.d_out, shape.d_in, shape.rank, shape.scale] for name, shape in layout.items()}


# ------------------------------------------------------------------------------------------------------ bytes


def request_tensors(plan: ClientPlan, held: Container[str] = ()) -> dict[str, dict[str, Tensor]]:
    """The tensors of each buffer of a request: `ADAPTER` and `TILT`, if anything is in them, and one for each base
    update.

    Args:
        plan: To be sent.
        held: Parts that the client holds already.
    """
    parts = tensors_by_part(plan).items()
    adapter = {name: tensor for part, tensors in parts if part not in held for name, tensor in tensors.items()}
    buffers = ({ADAPTER: adapter} if adapter else {}) | ({TILT: dict(plan.tilt)} if plan.tilt else {})
    return buffers | {
        base_update_buffer(update.version): flatten_base_update(update)[0] for update in plan.base_updates
    }


def format_of(buffer: str, down: str) -> str:
    """The wire format of a buffer of a request: the adapter's may be rounded, the others travel as they are."""
    return down if buffer == ADAPTER else "float32"


def base_update_buffer(version: int) -> str:
    """Name on the wire of the buffer of the base update to this version."""
    return f"merge/{version}"


def tensors_nbytes(buffers: Mapping[str, Mapping[str, Tensor]], down: str) -> int:
    """Bytes of all buffers of a request."""
    return sum(
        header_of_value(format_of(name, down), tensor.dtype, tuple(tensor.shape)).nbytes
        for name, tensors in buffers.items()
        for tensor in tensors.values()
    )


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
