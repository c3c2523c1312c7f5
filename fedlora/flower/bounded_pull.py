"""Pulls one reply from a grid and checks its size and structure before anything of it is joined.

A reply is a tree of objects: Message > RecordDict > ArrayRecord, ConfigRecord or MetricRecord; ArrayRecord > Array >
ArrayChunk. `HttpGrid.pull_messages` pulls all of them and inflates them, whatever they are: 1 MB can become 3 GB (an
Array may name one chunk many times), and an object that cannot be inflated raises in the middle of it. Here the same
calls are made with a budget of bytes; what is wrong with the objects is a `ReplyError` of the one who sent them, and
what is wrong with the server's own link raises as it would in Flower.

Everything private to flwr's inflation and its HTTP client is touched in this file alone.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import httpx
from flwr.app import Array, Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
from flwr.superlink.grid.http_grid import HttpGrid

from fedlora.errors import ReplyError
from fedlora.sanitize import clean_text

SLACK = 1 << 20
"""Bytes that a reply may have besides its tensors: heads, names, metrics, words."""
LARGEST_BODY = {
    "Message": 1 << 15,
    "RecordDict": 1 << 12,
    "MetricRecord": 1 << 13,
    "ConfigRecord": 1 << 15,
    "ArrayRecord": 1 << 12,
}
"""Bytes of an object's body, by its type: parsed, it takes up to fifty times as much."""
SMALLEST_CHUNK = 1 << 16
"""Bytes; Flower cuts arrays into chunks of 5 MB. Of smaller ones there would be too many objects."""
LARGEST_OBJECT = 1 << 24
"""Bytes; the HTTP client holds an object three times while it reads it."""
BACKOFF_S = (0.1, 1.0)
"""Shortest and longest pause before an object is asked for again that its node is still sending, in seconds. Flower's
own, 1 and 10, are longer than it takes to send a large reply."""


@dataclass(frozen=True)
class Allowed:
    """What a reply may hold.

    Args:
        tensor_bytes: Bytes of its tensors, which are in one array.
    """

    tensor_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        """Bytes of the whole reply."""
        return self.tensor_bytes + SLACK

    @property
    def objects(self) -> int:
        """How many objects it may consist of."""
        return 18 + self.tensor_bytes // SMALLEST_CHUNK

    def largest_body(self, kind: str) -> int:
        """Bytes of the body of an object of that type."""
        if kind == "Array":  # it has a number for each chunk
            return (1 << 12) + 8 * (self.tensor_bytes // SMALLEST_CHUNK)
        return LARGEST_BODY.get(kind, 0)


def over_a_superlink(grid: Grid) -> bool:
    """Whether the nodes are other people's, or of a simulation."""
    return isinstance(grid, HttpGrid)


def pull_reply(grid: Grid, message_id: str, allowed: Allowed, patience_s: float) -> Message | None:
    """The reply to a message, or None if it is not there yet.

    Args:
        grid: The grid on which the message was sent.
        message_id: Flower's id of the message that is answered.
        allowed: What the reply may hold.
        patience_s: How long to wait for objects that the SuperLink announces but does not hold yet, in seconds.

    Raises:
        ReplyError: the reply is too large, incomplete, or cannot be inflated.
    """
    if isinstance(grid, HttpGrid):
        return _pull(grid, message_id, allowed, patience_s)
    with _blamed_on_the_sender():
        replies = list(grid.pull_messages([message_id]))
    return next((reply for reply in replies if reply.metadata.reply_to_message_id == message_id), None)


# ------------------------------------------------------------------------------------------------ a grid's own road


@contextmanager
def _blamed_on_the_sender() -> Iterator[None]:
    """Inside, an error that comes out of Flower's inflation is a `ReplyError`; any other is the grid's own."""
    try:
        yield
    except Exception as error:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code is inflate_object_from_contents.__code__:
                raise _unreadable(error) from error
            trace = trace.tb_next
        raise


def _unreadable(error: Exception) -> ReplyError:
    return ReplyError(
        f"its reply cannot be read ({type(error).__name__}: {clean_text(error, 120)})", code="unreadable-reply"
    )


# ------------------------------------------------------------------------------------------------ over a SuperLink


def _pull(grid: HttpGrid, message_id: str, allowed: Allowed, patience_s: float) -> Message | None:
    client: Any = grid._runtime_client
    with _bounded(client, allowed.most_bytes) as budget:
        response = client.PullMessages(PullAppMessagesRequest(message_ids=[message_id]))
        # A node can also send messages to the server that reply to nothing; they come along, and nobody asked for them.
        pairs = zip(response.messages_list, response.message_object_trees, strict=True)
        found = [(p.metadata.run_id, tree) for p, tree in pairs if p.metadata.reply_to_message_id == message_id]
        if not found:
            return None
        run_id, tree = found[0]
        pull_one = make_pull_object_fn_protobuf(client.PullObject, grid.node, run_id)

        def pull(ids: Sequence[str]) -> dict[str, bytes]:
            def one(object_id: str) -> bytes:
                return budget.count(pull_one(object_id))

            try:
                return pull_objects(
                    list(ids),
                    one,
                    max_time=patience_s,
                    max_tries_per_object=None,
                    initial_backoff=BACKOFF_S[0],
                    backoff_cap=BACKOFF_S[1],
                )
            except ObjectPullError as error:
                raise ReplyError(
                    f"its reply is not complete: {clean_text(error, 200)}", code="incomplete-reply"
                ) from None

        try:
            contents, chunks = _by_depth(tree, allowed)
            objects = pull(contents)
            with _reading():
                _require_fitting(objects, allowed)
            bodies = pull(chunks)
        finally:  # so that the SuperLink lets go of what it keeps, good or bad
            received = ConfirmMessageReceivedRequest(node=grid.node, run_id=run_id, message_object_id=tree.object_id)
            client.ConfirmMessageReceived(received)
    with _reading():
        message = _inflate(tree.object_id, objects, bodies, allowed)
        if message.metadata.reply_to_message_id != message_id:
            raise ReplyError("its reply says that it is to another message", code="other-message")
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message


class _Budget:
    """Bytes that may still come. Several threads read at once: what each will read is taken off before it does."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._lock, self._here = threading.Lock(), threading.local()

    def spend(self, count: int) -> None:
        with self._lock:
            self._left -= count
            if self._left < 0:
                raise _too_large()

    def look(self, response: httpx.Response) -> None:
        """Before a response's body is read."""
        size = response.headers.get("content-length", "")
        self._here.told = size.isdecimal()
        if self._here.told:
            if int(size) > LARGEST_OBJECT + 4096:
                raise _too_large()
            self.spend(int(size))

    def count(self, content: bytes) -> bytes:
        """What this thread has just read; it is taken off now if its response did not say how long it is."""
        if not getattr(self._here, "told", False):
            self.spend(len(content))
        return content


def _too_large() -> ReplyError:
    return ReplyError(
        "its reply is larger than what was asked for: nothing of it was read further", code="reply-too-large"
    )


@contextmanager
def _bounded(client: Any, most: int) -> Iterator[_Budget]:
    """Inside, no response of the SuperLink is read that is larger than what is left of the budget."""
    budget = _Budget(most)
    hooks = client._client.event_hooks
    client._client.event_hooks = {**hooks, "response": [*hooks["response"], budget.look]}
    try:
        yield budget
    finally:
        client._client.event_hooks = hooks


@contextmanager
def _reading() -> Iterator[None]:
    """Around what only reads objects that a node sent: whatever fails there is their sender's fault."""
    try:
        yield
    except ReplyError:
        raise
    except Exception as error:
        raise _unreadable(error) from error


def _by_depth(tree: ObjectTree, allowed: Allowed) -> tuple[list[str], list[str]]:
    """Ids of the objects of a reply down to its arrays, and of the chunks below them, each once."""
    layer, objects, chunks = [tree], dict[str, None](), dict[str, None]()
    left = 2 * allowed.objects  # an object that several others name is there several times
    for depth in range(6):
        left -= len(layer)
        if left < 0:
            raise ReplyError(f"its reply consists of more than {allowed.objects} objects", code="too-many-objects")
        (chunks if depth == 4 else objects).update(dict.fromkeys(node.object_id for node in layer))
        layer = [child for node in layer for child in node.children]
        if not layer:
            return list(objects), [key for key in chunks if key not in objects]
    raise ReplyError("its reply is nested deeper than a message is", code="too-many-objects")


def _require_fitting(objects: Mapping[str, bytes], allowed: Allowed) -> None:
    """Raise `ReplyError` where an object that is no chunk is larger than one of its type can be."""
    longest_head = 128 + 65 * allowed.objects  # it has the ids of the children
    for content in objects.values():
        if len(content) - len(_body(content)) > longest_head:
            raise ReplyError(
                f"its reply has an object with more than {allowed.objects} children", code="too-many-objects"
            )
        kind, _, _ = get_object_head_values_from_object_content(content)
        if (size := len(_body(content))) > allowed.largest_body(kind):
            raise ReplyError(f"its reply has a {clean_text(kind, 20)!r} of {size} bytes", code="object-too-large")


def _inflate(root: str, objects: dict[str, bytes], chunks: dict[str, bytes], allowed: Allowed) -> Message:
    """The message; its arrays are joined here, when all sizes are known, and the rest is Flower's work."""
    headers = {key: _Header.of(content) for key, content in objects.items() if content.startswith(b"Array ")}
    bodies = {key: _chunk(content) for key, content in chunks.items()}
    size = sum(len(bodies[key]) for header in headers.values() for key in header.chunks)
    if size > allowed.tensor_bytes:
        raise ReplyError(
            f"the reply has {size} bytes of tensors, {allowed.tensor_bytes} were asked for", code="reply-too-large"
        )
    uses = Counter(key for header in headers.values() for key in header.chunks)
    chunks.clear()
    arrays: dict[str, InflatableObject] = {}
    for key, header in headers.items():
        data = BytesIO()
        for chunk in header.chunks:
            data.write(bodies[chunk])
            uses[chunk] -= 1
            if not uses[chunk]:
                del bodies[chunk]  # so that a reply is never there twice as a whole
        arrays[key] = header.array(data.getvalue())
    message = inflate_object_from_contents(root, objects, objects=arrays)
    if not isinstance(message, Message):
        raise ReplyError(f"its reply is a {type(message).__name__} and no message", code="not-a-message")
    return message


@dataclass(frozen=True)
class _Header:
    """An Array without its bytes; chunks by their ids, in their order."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    chunks: tuple[str, ...]

    @classmethod
    def of(cls, content: bytes) -> _Header:
        _, children, _ = get_object_head_values_from_object_content(content)
        said = json.loads(bytes(_body(content)))
        places = said["arraychunk_ids"]
        if not all(type(place) is int and 0 <= place < len(children) for place in places):
            raise ReplyError("its reply has an array that names chunks that are not there", code="invalid-object")
        shape = tuple(said["shape"])
        if not all(type(side) is int for side in shape):
            raise ReplyError("its reply has an array whose shape is no whole numbers", code="invalid-object")
        return cls(said["dtype"], shape, said["stype"], tuple(children[place] for place in places))

    def array(self, data: bytes) -> Array:
        return Array(dtype=self.dtype, shape=self.shape, stype=self.stype, data=data)


def _body(content: bytes) -> memoryview:
    return memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]


def _chunk(content: bytes) -> memoryview:
    if not content.startswith(b"ArrayChunk  "):  # and no children
        raise ReplyError("its reply has something else where the bytes of an array should be", code="invalid-object")
    return _body(content)
