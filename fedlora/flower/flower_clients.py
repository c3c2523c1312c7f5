"""Clients on a Flower grid: a request goes out to each as a message, its reply is checked, and what is valid is used.

Replies are pulled in the order of the clients' numbers, whatever order they arrive in (the grid keeps the others), and
handed on one at a time: memory does not grow with the clients, and every pool adds the same numbers in the same order.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, final

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.aggregators import Aggregator
from fedlora.config import RunConfig
from fedlora.errors import ReplyError
from fedlora.federation.client_pool import (
    ClientEvaluation,
    ClientInfo,
    ClientReply,
    Failure,
    RoundRequest,
    Sums,
)
from fedlora.federation.planner import Planner
from fedlora.federation.protocol import TrainRequest
from fedlora.federation.screen import Screen
from fedlora.flower import handshake
from fedlora.flower.bounded_pull import Allowed
from fedlora.flower.evaluation_messages import check_sums, layout_of
from fedlora.flower.identities import Bindings, Identity
from fedlora.flower.mailbox import LOST, TRIES, Mailbox, Sent
from fedlora.flower.messages import RequestEncoder, payload_bytes
from fedlora.flower.node_registry import Node, NodeRegistry
from fedlora.flower.update_checks import check_head, check_update, ledger_of
from fedlora.privacy.disclosure import REFUSED
from fedlora.runs.rundir import RunDir
from fedlora.sanitize import clean_text
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import Workspace

logger = logging.getLogger(__name__)

NODES_FILE = "nodes.json"
"""In a run's folder: which node is which client, by its key."""
LEDGERS_FILE = "ledgers.json"
"""In a private run's folder: the head of each client's ledger when it was last seen."""


@dataclass(frozen=True)
class _Round:
    """What all clients of a round have in common.

    Args:
        request: Of the round.
        deadline: By `time.monotonic`.
        parts: Of their own examples on which clients evaluate; none: they train.
        encoder: Of their requests.
    """

    request: RoundRequest
    deadline: float
    parts: Sequence[str] = ()
    encoder: RequestEncoder = field(default_factory=RequestEncoder)


@dataclass
class _Asked:
    """A client that was sent a request.

    Args:
        common: Of its round.
        request: What was asked.
        node: Whom.
        sent: The message.
        reply: What is known of the outcome so far.
    """

    common: _Round
    request: TrainRequest
    node: Node
    sent: Sent
    reply: ClientReply

    def count(self, message: Message) -> None:
        """Add the bytes of a reply, whether it can be used or not."""
        if not message.has_error():
            self.reply = self.reply.with_bytes(up=payload_bytes(message.content))


@final
class FlowerClients:
    """A pool of the nodes of a grid; see `fedlora.federation.client_pool`.

    Args:
        grid: Of Flower's simulation or a SuperLink.
        config: Of the run.
        rule: That plans.
        workspace: The server's.
        rundir: Remembers which node is which client.
        say: Told who is refused.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        rule: Aggregator,
        workspace: Workspace,
        rundir: RunDir,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._rundir, self._workspace, self._say = config, rundir, workspace, say
        self._planner = Planner(config, rule, workspace, rundir.run_id)
        self._screen = Screen(config, workspace)
        question = handshake.question(config, workspace.pins)
        self._ledgers = {int(k): str(head) for k, head in (rundir.read_json(LEDGERS_FILE) or {}).items()}

        def hello(node_id: int) -> RecordDict:
            client_id = self.registry.client_of(node_id)
            known = None if client_id is None else self._ledgers.get(client_id)
            return question if known is None else handshake.with_ledger(question, known)

        self.mail = Mailbox(grid, hello, patience_s=config.server.node_timeout_s, ttl_s=config.server.deadline_s + 60.0)
        known = {int(k): Identity(**row) for k, row in (rundir.read_json(NODES_FILE) or {}).items()}
        bindings = Bindings(config.server.nodes, known, self._remember)
        everybody, fingerprint = len(workspace.data.clients), workspace.base.fingerprint
        self.registry = NodeRegistry(self.mail, config, everybody, fingerprint, say, bindings, self._ledgers)

    @property
    def left_out(self) -> Mapping[str, str]:
        """See `NodeRegistry.turned_away`."""
        return self.registry.turned_away

    def available(self, round_number: int, needed: int) -> Mapping[int, ClientInfo]:
        """The clients whose nodes have said hello."""
        if round_number == 0:
            self.registry.begin()
        else:
            self.registry.gather(round_number, needed)
        return {client_id: node.info for client_id, node in self.registry.nodes.items()}

    def leave_out(self, client_id: int, why: str) -> None:
        """Refuse a client's node, until it is asked again before the next round."""
        self.registry.refuse(self.registry.nodes[client_id].node_id, why)

    def train(self, request: RoundRequest) -> Generator[ClientReply, None, None]:
        """Send all requests, then wait for each reply until the round's deadline."""
        for one in self._all_asked(request):
            yield one if isinstance(one, ClientReply) else self._outcome(one)
        if self._config.example_privacy is not None:
            self._rundir.write_json(LEDGERS_FILE, {str(k): head for k, head in sorted(self._ledgers.items())})

    def evaluate(self, request: RoundRequest, parts: Sequence[str]) -> Generator[ClientEvaluation, None, None]:
        """Send all requests, then wait for each reply until the round's deadline."""
        for one in self._all_asked(request, parts):
            sums: Mapping[str, Sums] = {}
            reply = one if isinstance(one, ClientReply) else one.reply
            if isinstance(one, _Asked):
                try:
                    if (message := self._heard(one)) is not None:
                        sums = check_sums(message.content, one.request, self._sums_like, parts)
                        one.node.held.receive(one.request)
                    reply = one.reply
                except ReplyError as error:
                    reply = one.reply.failed(Failure("refused", clean_text(error)))
            traffic = {"bytes_down": reply.bytes_down, "bytes_up": reply.bytes_up}
            yield ClientEvaluation(reply.client_id, sums, reply.failure, **traffic)

    @property
    def measuring(self) -> None:
        """None: nodes have none of the server's examples."""
        return None

    @cached_property
    def _sums_like(self) -> Sums:
        """Sums of one example: those of clients are of the same shapes."""
        base, task, probes = self._workspace.base, self._workspace.task, self._workspace.data.probes
        return evaluate(base, task, probes, indices=np.arange(1)).sums

    # ------------------------------------------------------------------------------------------------ asking

    def _all_asked(self, request: RoundRequest, parts: Sequence[str] = ()) -> Iterator[_Asked | ClientReply]:
        """Send all clients their requests; of each that was handed on nothing is kept."""
        common = _Round(request, time.monotonic() + self._config.server.deadline_s, parts)
        asked = deque(self._ask(common, client_id) for client_id in request.clients)
        while asked:
            yield asked.popleft()

    def _ask(self, common: _Round, client_id: int) -> _Asked | ClientReply:
        """Send a client its request; its outcome, where it is not asked."""
        if not self.registry.is_there(client_id):
            return ClientReply(client_id).failed(Failure("refused", "its node is not there"))
        return self._send(common, self.registry.nodes[client_id])

    def _send(self, common: _Round, node: Node) -> _Asked | ClientReply:
        parts = common.parts
        asked = (self._planner.evaluation if parts else self._planner.request)(common.request, node.info, node.held)
        content = common.encoder.encode(asked, parts)
        reply = ClientReply(node.info.client_id) if parts else self._planner.outcome(asked)
        reply = replace(reply, bytes_down=payload_bytes(content))
        if reply.failure is not None:
            return reply
        nbytes, kind = asked.reply_nbytes, MessageType.TRAIN
        if parts:
            nbytes = sum(header.nbytes for header in layout_of(self._sums_like, parts).values())
            kind = MessageType.EVALUATE
        sent = self.mail.send(content, node.node_id, kind, str(common.request.number), Allowed(nbytes))
        return _Asked(common, asked, node, sent, reply)

    # ------------------------------------------------------------------------------------------------ replies

    def _outcome(self, asked: _Asked) -> ClientReply:
        """Wait for one client's reply, and check it."""
        try:
            message = self._heard(asked)
            if message is None:
                return asked.reply
            head = check_head(message, self._kinds(asked))
            if head["kind"] == "spent":
                why = clean_text(head.get("error", "its privacy budget is spent"))
                return asked.reply.failed(Failure("spent", why))
            if self._config.example_privacy is not None:
                asked.node.held.ledger = self._ledgers[asked.node.info.client_id] = ledger_of(head)
            tensors, figures = self._checked(message, asked)
            admitted = self._screen.admit(asked.reply, asked.request, tensors, figures, asked.common.request.expected)
        except ReplyError as error:
            return asked.reply.failed(Failure("refused", clean_text(error)))
        asked.node.held.receive(asked.request)
        return admitted

    def _kinds(self, asked: _Asked) -> tuple[str, ...]:
        """Replies that a client may send."""
        if asked.common.parts:
            return ("sums", "need")
        return ("update", "need") if self._config.example_privacy is None else ("update", "need", "spent")

    def _heard(self, asked: _Asked) -> Message | None:
        """Wait for one client's reply; it is sent everything if it needs that. None: `asked.reply` says why."""
        kinds = self._kinds(asked)
        message = self._receive(asked)
        if message is not None and check_head(message, kinds)["kind"] == "need":
            asked.node.held.forget()
            if self._ask_again(asked) is not None:  # with everything it would be too late
                return None
            message = self._receive(asked)
            if message is not None and check_head(message, kinds)["kind"] == "need":
                raise ReplyError("it asks for parts that it was just sent", code="needs-what-it-has")
        if message is None:
            asked.reply = asked.reply.failed(Failure("missing", "no reply before the deadline"))
        return message

    def _ask_again(self, asked: _Asked) -> Failure | None:
        """Send a client its request again, in place of what was asked; why it is not sent, if it is not."""
        again = self._send(asked.common, asked.node)
        up, down = asked.reply.bytes_up, asked.reply.bytes_down
        if isinstance(again, ClientReply):
            asked.reply = again.with_bytes(up=up, down=down)
        else:
            asked.request, asked.sent, asked.reply = again.request, again.sent, again.reply.with_bytes(up=up, down=down)
        return asked.reply.failure

    def _receive(self, asked: _Asked) -> Message | None:
        """Wait for a reply; a node that is there is asked again at once for one that was lost on the way.

        It answers with what it has kept (`fedlora.flower.client_app`): nothing is trained or spent twice.
        """
        deadline = asked.common.deadline
        for left in reversed(range(TRIES)):
            try:
                message = self.mail.receive(asked.sent, deadline)
                if message is not None:
                    asked.count(message)
                return message
            except ReplyError as error:
                client_id = asked.node.info.client_id
                if error.code not in LOST or not left or time.monotonic() >= deadline:
                    raise
                self.registry.look()
                if not self.registry.is_there(client_id) or self._ask_again(asked) is not None:
                    raise
                self._say(
                    f"round {asked.common.request.number}: client {client_id} is asked again: {clean_text(error)}"
                )
        raise AssertionError("the last try returns or raises")

    def _checked(self, message: Message, asked: _Asked) -> tuple[Mapping[str, Any], Mapping[str, object]]:
        """`check_update`; under user-level privacy a refusal does not say what the values were."""
        try:
            return check_update(message.content, asked.request)
        except ReplyError as error:
            if self._config.client_privacy is None:
                raise
            logger.debug("client %d: %s", asked.node.info.client_id, error)
            raise ReplyError(REFUSED, code="withheld") from None

    def _remember(self, known: Mapping[int, Identity]) -> None:
        self._rundir.write_json(NODES_FILE, {str(k): asdict(node) for k, node in sorted(known.items())})
