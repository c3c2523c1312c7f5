"""Messages out and replies in, on a grid that loses some: a reply comes, or it is said why none will.

Flower says NODE_UNAVAILABLE of a node that it misses, after a minute or so. A node that is back before that has lost
the message that it had, and nobody says so: a question that is sent after the message and answered before it does. (A
SuperNode works off its messages one at a time, in their order.) The same shows a reply that the node could not send,
which Flower drops. Whatever was lost of a message to a node that is there is lost with a code of `LOST`: it can be sent
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedlora.errors import ReplyError
from fedlora.flower.bounded_pull import Allowed, pull_reply
from fedlora.flower.identities import Identity, identities

POLL_S = (0.02, 0.5)
"""Shortest and longest pause between two looks for a reply."""
SOONEST_S = 5.0
"""Seconds without a reply before which no node is asked whether it still has the message."""
PUSHES = 3
"""How often a message is handed to the grid while parts of it do not arrive; it is the same one, by its id."""
TRIES = 4
"""How often a node is asked for an answer that is lost on the way each time."""
LOST = frozenset({"message-lost", "incomplete-reply"})
"""Codes of a `ReplyError` after which nobody works on the message any more, and the node may still be there."""
UNAVAILABLE = frozenset({ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE})
"""What Flower answers for a message or a reply that it no longer has."""


@dataclass(frozen=True)
class Sent:
    """A message under way.

    Args:
        message_id: Flower's id; None if the grid did not accept the message.
        node_id: Flower's id of the recipient.
        at: Time of sending on the monotonic clock, in seconds.
        allowed: The tensors that its reply may hold.
    """

    message_id: str | None
    node_id: int
    at: float
    allowed: Allowed = field(default_factory=Allowed)


class Mailbox:
    """What goes between the server and its nodes.

    Args:
        grid: In-process, Ray or a SuperLink.
        hello: Gives for a node the content of the question by which it is asked to identify itself.
        patience_s: Seconds without a reply after which a node is asked whether it still has the message; once there has
            been a reply it is twice the longest wait for one.
        ttl_s: How long the grid keeps a message, in seconds.
    """

    def __init__(self, grid: Grid, hello: Callable[[int], RecordDict], *, patience_s: float, ttl_s: float) -> None:
        self._grid, self._hello, self._patience_s, self._ttl_s = grid, hello, patience_s, ttl_s
        self._longest_s = 0.0

    def nodes(self) -> dict[int, Identity | None]:
        """The nodes that the grid holds to be there, and who they are."""
        return identities(self._grid)

    def send(
        self, content: RecordDict, node_id: int, kind: str, group: str = "", allowed: Allowed | None = None
    ) -> Sent:
        """Hand a message to the grid.

        Args:
            content: Content of the message.
            node_id: Flower's id of the recipient.
            kind: Flower's message type, such as "train" or "query.hello".
            group: The round, for the nodes' logs.
            allowed: The tensors that the reply may hold; None: none.
        """
        message = Message(content, node_id, kind, group_id=group, ttl=self._ttl_s)
        message_id = None
        for _ in range(PUSHES):
            with suppress(ObjectPushError):  # the SuperLink gave up waiting for the rest of it
                message_id = next(iter(self._grid.push_messages([message])), None)
                break
        return Sent(message_id or None, node_id, time.monotonic(), allowed or Allowed())

    def ask_hello(self, node_id: int) -> Sent:
        """Ask a node who it is."""
        return self.send(self._hello(node_id), node_id, f"{MessageType.QUERY}.hello")

    def look(self, sent: Sent, patience_s: float | None = None) -> Message | None:
        """The reply, or None if it is not there yet.

        Args:
            sent: The message.
            patience_s: How long to wait for the rest of a reply that has arrived in part; None: as long as for a node.

        Raises:
            ReplyError: the grid did not take the message, or the reply cannot be read or is another node's.
        """
        if sent.message_id is None:
            raise ReplyError(
                "the grid did not take its message: it is too large, or the node is gone", code="message-not-taken"
            )
        reply = pull_reply(self._grid, sent.message_id, sent.allowed, patience_s or self._patience_s)
        if reply is not None and reply.has_error() and reply.error.code in UNAVAILABLE:
            raise ReplyError("the SuperLink no longer has its message or reply", code="message-lost")
        if reply is not None and not reply.has_error() and reply.metadata.src_node_id != sent.node_id:
            raise ReplyError(
                f"node {reply.metadata.src_node_id} answers what another node was asked", code="answer-of-another-node"
            )
        return reply

    def receive(self, sent: Sent, deadline: float) -> Message | None:
        """Wait for a reply; None if it is not there at the deadline (on the monotonic clock).

        Raises:
            ReplyError: the grid did not take the message, the node lost it, or its reply cannot be read.
        """
        pause, question = POLL_S[0], None
        while True:
            answered = question is not None and self.look(question) is not None
            reply = self.look(sent, max(deadline - time.monotonic(), self._patience_s))
            if reply is not None:
                self._longest_s = max(self._longest_s, time.monotonic() - sent.at)
                return reply
            if answered:
                raise ReplyError(
                    "its node no longer has the message: it was started again, or could not send the reply",
                    code="message-lost",
                )
            now = time.monotonic()
            if now >= deadline:
                return None
            # Twice the longest so far: who is slow is not asked in every round.
            quiet_s = max(SOONEST_S, 2 * self._longest_s) if self._longest_s else self._patience_s
            if question is None and now - sent.at > quiet_s:
                question = self.ask_hello(sent.node_id)
                if question.message_id is None:
                    question = None
            time.sleep(min(pause, max(0.0, deadline - now)))
            pause = min(2 * pause, POLL_S[1])
