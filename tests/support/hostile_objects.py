"""A SuperLink's answers about one reply, whose objects a node with a patched Flower has pushed.

The bytes are those that `HttpGrid` would see: every object's id is its hash, as the SuperLink requires; anything else
can be wrong.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
)
from flwr.superlink.grid.http_grid import HttpGrid

DIVIDER = b"\x00"


@dataclass
class Thing:
    """One object, before it has an id."""

    kind: str
    children: list[Thing]
    body: bytes
    length: int | None = None  # that its head says, if not the true one
    named: Callable[[Sequence[str]], Sequence[str]] = list  # ids of its children -> those that its head names
    said: Any = None  # body as JSON, in which ids of children are their places
    shows: list[Thing] | None = None  # children in the SuperLink's tree, if not the true ones

    def edit(self, change: Callable[[Any], Any]) -> None:
        """Change the JSON of the body."""
        self.body = json.dumps(change(json.loads(self.body))).encode()


def thing_of(message: Message) -> Thing:
    """A message's objects, as its node would push them; ids of children in bodies become "<place>"."""
    contents = {key: item.deflate() for key, item in get_all_nested_objects(message).items()}

    def build(key: str) -> Thing:
        kind, children, _ = get_object_head_values_from_object_content(contents[key])
        body = contents[key][contents[key].index(DIVIDER) + 1 :]
        for place, child in enumerate(children):
            body = body.replace(child.encode(), f"<{place}>".encode())
        return Thing(kind, [build(child) for child in children], body)

    return build(message.object_id)


def everything(root: Thing) -> list[Thing]:
    """All objects of a tree, each as often as it is there."""
    return [root, *(below for child in root.children for below in everything(child))]


@dataclass
class Pushed:
    """What a SuperLink holds of one reply.

    Args:
        contents: by id.
        tree: of ids.
    """

    contents: dict[str, bytes] = field(default_factory=dict)
    tree: ObjectTree = field(default_factory=ObjectTree)

    @classmethod
    def of(cls, root: Thing) -> Pushed:
        pushed = cls()
        pushed.tree = pushed._push(root, {})
        return pushed

    @property
    def size(self) -> int:
        return sum(map(len, self.contents.values()))

    def _push(self, thing: Thing, done: dict[int, ObjectTree]) -> ObjectTree:
        if id(thing) in done:
            return done[id(thing)]
        below = [self._push(child, done) for child in thing.children]
        ids = list(dict.fromkeys(tree.object_id for tree in below))
        body = thing.body
        for place, tree in enumerate(below):
            body = body.replace(f"<{place}>".encode(), tree.object_id.encode())
        length = len(body) if thing.length is None else thing.length
        content = (
            f"{thing.kind} {','.join(thing.named(ids))} {length}".encode("utf-8", "surrogatepass") + DIVIDER + body
        )
        key = hashlib.sha256(content).hexdigest()
        self.contents[key] = content
        shown = below if thing.shows is None else [self._push(child, done) for child in thing.shows]
        done[id(thing)] = ObjectTree(object_id=key, children=shown)
        return done[id(thing)]


def _no_tree(_: Any) -> ObjectTree:
    return ObjectTree(object_id="0" * 64)


class Link:
    """In place of Flower's client of the Runtime API: one reply to one message is there."""

    def __init__(self, reply: Message, pushed: Pushed, missing: Sequence[str] = ()) -> None:
        self._reply, self._pushed, self._missing = message_to_proto(remove_content_from_message(reply)), pushed, missing
        self._client = SimpleNamespace(event_hooks={"request": [], "response": []})
        self.beside: list[Any] = []  # messages to the server that come in the same answer
        self.confirmed: list[str] = []
        self.pulled = 0

    def PullMessages(self, _: Any) -> Any:
        return SimpleNamespace(
            messages_list=[*self.beside, self._reply],
            message_object_trees=[*map(_no_tree, self.beside), self._pushed.tree],
        )

    def PullObject(self, request: Any) -> Any:
        content = self._pushed.contents.get(request.object_id)
        there = content is not None and request.object_id not in self._missing
        for hook in self._client.event_hooks["response"]:  # as httpx does, before it reads a body
            hook(SimpleNamespace(headers={"content-length": str(len(content or b""))}))
        self.pulled += len(content or b"")
        received = None if content is None else bytes(bytearray(content))  # a copy of its own, as from a socket
        return SimpleNamespace(object_found=there, object_available=there, object_content=received)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)


def grid_on(link: Any) -> HttpGrid:
    """Flower's grid with that link, without a SuperLink."""
    grid = HttpGrid(token="token")
    grid._client = link
    return grid


# ------------------------------------------------------------------------------------------------ mutations

ODD: list[Any] = [
    *(None, True, 0, -1, 1, 99, 2**31, 2**63, 10**400, 1.5, 1e308, "", "x", "\ud800", "float32", "\x1b[2J"),
    *([], [0], [0] * 500, [[0]], [1.0], [True], ["0"], [-1], [2**62] * 4, [1] * 4000, {}, {"a": 1}, "<0>", "f" * 64),
]
GARBAGE = [
    *(b"", b"\xff", b"\xff\xfe", b"null", b"[]", b"{}", b"7", b'"x"', b"\x0a\xff", b"\x0a\x00" * 4000, b"[" * 100_000),
    *(b"[" * 3000, b"{}" * 100, b"\x00" * 100_000, b"\x0a\x80\x80\x80\x80\x80\x01", b'{"a":' * 2000, b"9" * 5000),
    *(
        b"[" + b"[]," * 10_000 + b"[]]",
        b'{"a":"' + b"\\ud800" * 100 + b'"}',
        bytes(range(256)),
        b"\x12\x02\x08\x01" * 999,
    ),
]
KINDS = ["Message", "RecordDict", "ArrayRecord", "ConfigRecord", "MetricRecord", "Array", "ArrayChunk", "X", "", "a b"]


def _json(thing: Thing, draw: random.Random) -> None:
    try:
        said = json.loads(thing.body)
    except (RecursionError, ValueError):
        _garbage(thing, draw)
        return
    if not isinstance(said, dict) or not said or draw.random() < 0.1:
        said = draw.choice(ODD)
    else:
        key = draw.choice(list(said))
        what = draw.randrange(4)
        if what == 0:
            del said[key]
        elif what == 1:
            said[draw.choice(["", "x", "\ud800", "\x1b]0;x\x07", "dtype", "n" * 3000])] = said[key]
        elif what == 2 and isinstance(said[key], list):
            said[key] = said[key] + [draw.choice(ODD)]
        else:
            said[key] = draw.choice(ODD)
    thing.body = json.dumps(said).encode("utf-8", "surrogatepass")


def _garbage(thing: Thing, draw: random.Random) -> None:
    thing.body = draw.choice(GARBAGE)


def _flip(thing: Thing, draw: random.Random) -> None:
    body = bytearray(thing.body or b"\x00")
    for _ in range(draw.randint(1, 4)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    thing.body = bytes(body)


def _cut(thing: Thing, draw: random.Random) -> None:
    thing.body = thing.body[: draw.randrange(len(thing.body) + 1)]


def _grow(thing: Thing, draw: random.Random) -> None:
    thing.body = thing.body * draw.choice([2, 10, 1000])


def _kind(thing: Thing, draw: random.Random) -> None:
    thing.kind = draw.choice(KINDS)


def _length(thing: Thing, draw: random.Random) -> None:
    thing.length = draw.choice([0, -1, 10**12, len(thing.body) + 1])


def _named(thing: Thing, draw: random.Random) -> None:
    odd = draw.choice(["0" * 64, "x", "", "f" * 64])
    more = draw.choice([1, 3, 5000])
    thing.named = draw.choice(
        [
            lambda ids: ids[:-1],
            lambda ids: [*ids, *ids],
            lambda ids: ids[::-1],
            lambda ids: [*ids, odd],
            lambda ids: [*ids, *(f"{n:064x}" for n in range(more))],
        ]
    )


def _children(thing: Thing, draw: random.Random) -> None:
    if thing.children and draw.random() < 0.5:
        thing.children.pop(draw.randrange(len(thing.children)))
    else:
        extra = Thing(draw.choice(KINDS), [], draw.choice(GARBAGE))
        thing.children.insert(draw.randrange(len(thing.children) + 1), extra)


def _shown(thing: Thing, draw: random.Random) -> None:
    more = [Thing("ArrayChunk", [], f"{n}".encode()) for n in range(draw.choice([1, 20, 300]))]
    thing.shows = draw.choice([[], [*thing.children, *more], thing.children * 2, more])


def _nested(thing: Thing, draw: random.Random) -> None:
    inner = Thing(thing.kind, thing.children, thing.body)
    for _ in range(draw.choice([1, 3, 30])):
        inner = Thing(draw.choice([thing.kind, draw.choice(KINDS)]), [inner], b"{}")
    thing.children = [inner]


def _chunks(thing: Thing, draw: random.Random) -> None:
    if thing.kind == "Array":
        thing.body = json.dumps(
            {
                "dtype": "uint8",
                "shape": [312],
                "stype": "fedlora.buffer.v1",
                "arraychunk_ids": draw.choice(
                    [[0] * 400, [0] * 1300, [-1], [7], [0.0], ["0"], [True], 0, None, {"0": 0}]
                ),
            }
        ).encode()
    for child in thing.children:
        if child.kind == "ArrayChunk":
            child.body = bytes(draw.choice([0, 1, 127, 1 << 12, 1 << 20]))


MUTATIONS = (_json, _garbage, _flip, _cut, _grow, _kind, _length, _named, _children, _shown, _nested, _chunks)


def mutate(root: Thing, draw: random.Random) -> str:
    """Change one to three objects of a tree; says what was done."""
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        thing = draw.choice(everything(root))
        change = draw.choice(MUTATIONS)
        change(thing, draw)
        done.append(f"{change.__name__[1:]} of {thing.kind}")
    return ", ".join(done)


def bombs(size: int) -> Mapping[str, Callable[[list[Thing]], None]]:
    """Ways to make a reply large, or larger than what was pushed; each changes a tree of one array of `size` bytes."""

    def array(things: list[Thing]) -> Thing:
        found = [thing for thing in things if thing.kind == "Array"]
        return max(found, key=lambda thing: sum(len(chunk.body) for chunk in thing.children))

    def refer(times: int) -> Callable[[list[Thing]], None]:
        def change(things: list[Thing]) -> None:
            array(things).edit(lambda said: {**said, "arraychunk_ids": said["arraychunk_ids"] * times})

        return change

    def one_chunk_named_often(things: list[Thing]) -> None:
        array(things).children = [Thing("ArrayChunk", [], bytes(1 << 20))]
        array(things).edit(lambda said: {**said, "arraychunk_ids": [0] * 300})

    def larger_chunk(things: list[Thing]) -> None:
        array(things).children[0].body = bytes(3 * size)

    def chunks_that_nobody_names(things: list[Thing]) -> None:
        array(things).children += [Thing("ArrayChunk", [], bytes([n]) * (1 << 20)) for n in range(size >> 19)]

    def many_arrays(things: list[Thing]) -> None:
        record = next(thing for thing in things if thing.kind == "ArrayRecord")
        found = array(things)
        for n in range(30):
            body = json.dumps({**json.loads(found.body), "shape": [n]}).encode()
            record.children.append(Thing("Array", found.children, body))
        record.edit(lambda said: {f"t{n}": f"<{n}>" for n in range(33)})

    def chunks_under_other_parents(things: list[Thing]) -> None:
        things[0].shows = [*things[0].children, *(Thing("ArrayChunk", [], bytes([n]) * size) for n in range(4))]

    return {
        "as it was asked for": lambda things: None,
        "one chunk named 300 times": one_chunk_named_often,
        "all chunks named twice": refer(2),
        "a larger chunk": larger_chunk,
        "chunks that nobody names": chunks_that_nobody_names,
        "many arrays of the same chunks": many_arrays,
        "chunks under other parents": chunks_under_other_parents,
    }
