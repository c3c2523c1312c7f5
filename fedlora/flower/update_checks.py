"""Nothing that a node sends touches a tensor before it passed these checks, in this order.

1. the reply is no error; 2. its records are exactly those that were asked for, with one buffer of tensors; 3. that
buffer is laid out as was asked for (names, shapes, types and wire format of all tensors, by a digest) and as long as
that; 4. it is for the round and the base that were asked for; 5. it holds codes that the wire format can make.

Which values are used is decided by `fedlora.federation.screen`, in simulations too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedlora import __version__
from fedlora.errors import ReplyError
from fedlora.federation.protocol import TrainRequest
from fedlora.flower.arrays import from_array
from fedlora.flower.messages import BUFFER, decode_head
from fedlora.sanitize import clean_text

RECORDS = {"reply": ConfigRecord, "update": ArrayRecord, "metrics": MetricRecord}
"""What the reply of a client that has trained holds."""


def check_head(reply: Message, kinds: Sequence[str] = ("update", "need")) -> dict[str, Any]:
    """Check 1: the head of a reply of one of these kinds; `ReplyError` for an error of any sort."""
    if reply.has_error():
        raise ReplyError(error_text(reply), code="flower-error")
    head = decode_head(reply.content)
    kind = head.get("kind")
    if kind == "error":
        raise ReplyError(clean_text(head.get("error", "")) or "no reason given", code="client-error")
    if kind not in kinds:
        raise ReplyError(f"the reply is of unknown kind {clean_text(kind, 40)!r}", code="unknown-kind")
    return head


@dataclass(frozen=True)
class Hello:
    """A node's answer to "hello".

    Args:
        client_id: Number of the client that it serves.
        rank: LoRA rank that it requests, if any.
        num_examples: Number of its training examples; None in private runs, where it does not say.
        ledger: Head of its privacy ledger; "" where it has none.
    """

    client_id: int
    rank: int | None = None
    num_examples: int | None = None
    ledger: str = ""


def check_hello(reply: Message | None, fingerprint: str, clients: int, max_rank: int, max_examples: int) -> Hello:
    """Check a node's answer to "hello".

    Args:
        reply: Reply to "hello"; None if none arrived.
        fingerprint: Hash of the server's base model.
        clients: Number of clients in the federation.
        max_rank: Largest rank that a node may request.
        max_examples: Largest number of examples that a node may claim.

    Raises:
        ReplyError: if the node cannot take part; the message says why.
    """
    if reply is None:
        raise ReplyError("it did not answer", code="no-answer")
    head = check_head(reply, ("hello",))
    if head.get("fedlora") != __version__:
        theirs = clean_text(head.get("fedlora"), 40)
        raise ReplyError(f"it runs fedlora {theirs}, the server {__version__}: install the same", code="other-version")
    if head.get("fingerprint") != fingerprint:
        raise ReplyError(
            "its base model is not the server's (another hash): fetch the same model and revision", code="other-base"
        )
    client_id = head.get("client_id")
    if type(client_id) is not int or not 0 <= client_id < clients:
        raise ReplyError(
            f"it says to be client {clean_text(client_id, 40)}, and there are {clients}, numbered from 0",
            code="no-such-client",
        )
    rank = head.get("rank")
    if rank is not None and (type(rank) is not int or not 1 <= rank <= max_rank):
        raise ReplyError(
            f"it asks for rank {clean_text(rank, 40)}, and a rank is a whole number from 1 to {max_rank}: change rank "
            "in the node's own config, or raise server.max_rank",
            code="invalid-rank",
        )
    count = head.get("num_examples")
    if count is not None and (type(count) is not int or not 0 <= count <= max_examples):
        raise ReplyError(
            f"it says to have {clean_text(count, 40)} examples, and that is no whole number from 0 to "
            f"server.max_examples = {max_examples}",
            code="invalid-weight",
        )
    return Hello(client_id, rank, count, ledger_of(head) if "ledger" in head else "")


def ledger_of(head: Mapping[str, Any]) -> str:
    """The head of a client's ledger, as its reply states it.

    Raises:
        ReplyError: it states none.
    """
    ledger = head.get("ledger")
    if not isinstance(ledger, str) or not re.fullmatch(r"[0-9a-f]{64}", ledger):
        raise ReplyError("it does not state the head of its privacy ledger", code="ledger-not-stated")
    return ledger


def check_update(content: RecordDict, request: TrainRequest) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Checks 2 to 5.

    Args:
        content: Of a reply whose head was checked.
        request: That it answers.

    Returns:
        The tensors, decoded, and the figures that the client reports.

    Raises:
        ReplyError: naming the first check that failed.
    """
    head = decode_head(content)
    buffer = require_buffer(content, RECORDS)
    require_layout(head, buffer, request.layout_digest, request.reply_nbytes)
    require_same_round(head, request)
    return request.decode(buffer), dict(cast("MetricRecord", content["metrics"]))


def require_buffer(content: RecordDict, records: Mapping[str, type]) -> bytes:
    """Check 2: the one buffer of a reply of these records, one of which is an ArrayRecord."""
    if {name: type(record) for name, record in content.items()} != records:
        *names, last = records
        raise ReplyError(
            f"the reply does not hold exactly the records {', '.join(names)} and {last}", code="unexpected-records"
        )
    arrays = cast("ArrayRecord", next(content[name] for name, kind in records.items() if kind is ArrayRecord))
    if list(arrays) != [BUFFER]:
        raise ReplyError(
            f"the reply's tensors are not in one array {BUFFER!r}: install the same fedlora on server and node",
            code="unexpected-records",
        )
    return from_array(arrays[BUFFER])


def require_layout(head: Mapping[str, Any], buffer: bytes, digest: str, nbytes: int) -> None:
    """Check 3: the buffer is laid out as was asked for, and as long as that."""
    if head.get("layout") != digest:
        raise ReplyError(
            "the reply's tensors are others than were asked for, or of other shapes, types or wire format: install the "
            "same fedlora on server and node",
            code="other-layout",
        )
    if len(buffer) != nbytes:
        raise ReplyError(f"the reply has {len(buffer)} bytes of tensors, {nbytes} were asked for", code="other-size")


def require_same_round(head: Mapping[str, Any], request: TrainRequest) -> None:
    """Check 4: the reply is for the round and the base that were asked for."""
    if type(head.get("round")) is not int or head["round"] != request.round:
        theirs = clean_text(head.get("round"), 20)
        raise ReplyError(f"the reply is for round {theirs}, not {request.round}", code="other-round")
    if head.get("base_digest") != request.base_digest:
        raise ReplyError("the reply is about another version of the base", code="other-base")


def error_text(reply: Message) -> str:
    """One line of a Flower error: its last line carries the exception."""
    lines = [clean_text(line) for line in reply.error.reason[-20_000:].splitlines()] if reply.error.reason else []
    said = [line for line in lines if line]
    return f"{said[-1] if said else 'no reason given'} (Flower error code {reply.error.code})"
