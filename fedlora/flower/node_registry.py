"""Who is there: nodes say hello at the start, and whoever comes or comes back later takes part from the next round.

A client is known by its number, a node by Flower's id. An authenticated node keeps its id; another one comes back under
a new id, which takes the old one's place once the grid no longer holds that to be there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Message

from fedlora.config import RunConfig
from fedlora.errors import ReplyError, RoundError
from fedlora.federation.client_pool import ClientInfo, nobody
from fedlora.federation.planner import Held
from fedlora.federation.round_record import quorum_of
from fedlora.flower import mailbox
from fedlora.flower.identities import Bindings, Identity
from fedlora.flower.mailbox import LOST, TRIES, Mailbox, Sent
from fedlora.flower.update_checks import Hello, check_hello
from fedlora.hash_chain import START
from fedlora.sanitize import clean_text


@dataclass(frozen=True)
class Node:
    """What the server knows of one client's node.

    Args:
        node_id: Flower's id of the node.
        info: Of the client.
        held: What it holds from earlier rounds; changed in place.
    """

    node_id: int
    info: ClientInfo
    held: Held = field(default_factory=Held)


class NodeRegistry:
    """The nodes of a run.

    Args:
        mail: Messages to and from the nodes.
        config: The run's config.
        expected: Number of clients in the federation.
        fingerprint: Hash of the server's base model.
        say: Called with a line whenever a node is refused.
        bindings: Which node may be which client.
        ledgers: Client -> head of its privacy ledger when it was last seen; those of new clients are added.
    """

    def __init__(
        self,
        mail: Mailbox,
        config: RunConfig,
        expected: int,
        fingerprint: str,
        say: Callable[[str], None],
        bindings: Bindings | None = None,
        ledgers: dict[int, str] | None = None,
    ) -> None:
        self._mail, self._server, self._say = mail, config.server, say
        self._max_rank = config.max_rank
        self._ledgers = {} if ledgers is None else ledgers
        self._bindings = bindings or Bindings(config.server.nodes)
        self._who: dict[int, Identity | None] = {}
        self._expected, self._fingerprint = expected, fingerprint
        self.nodes: dict[int, Node] = {}
        self._there: list[int] = []
        self._asked: dict[int, list[Sent]] = {}
        self._refused: dict[int, str] = {}

    @property
    def turned_away(self) -> dict[str, str]:
        """Each node that does not take part, by its name, where it is registered under one, and Flower's id -> why."""
        return {self._called(node_id): why for node_id, why in self._refused.items()}

    def is_there(self, client_id: int) -> bool:
        """Whether the grid held the client's node to be there at the last look."""
        return self.nodes[client_id].node_id in self._there

    def name(self, client_id: int) -> str:
        """A client with the name of its node, where that has one."""
        node = self._bindings.name(client_id)
        return f"client {client_id}" + (f" (node {clean_text(node, 80)})" if node else "")

    def _called(self, node_id: int) -> str:
        who = self._who.get(node_id)
        return f"{clean_text(who.name, 80)} (node {node_id})" if who and who.name else str(node_id)

    def client_of(self, node_id: int) -> int | None:
        """The client of a node, as far as its key tells; see `Bindings.client_of`."""
        return self._bindings.client_of(self._who.get(node_id))

    def begin(self) -> None:
        """Wait until all clients are there; after `server.node_timeout_s`, until a quorum of them is.

        Raises:
            RoundError: no node is there, or none can take part.
        """
        server, started = self._server, time.monotonic()
        while True:
            self.look()
            waited = time.monotonic() - started
            if len(self.nodes) == self._expected:
                return
            patient = waited < server.node_timeout_s
            if not self._there and not patient:
                raise RoundError(
                    f"no node is there after {server.node_timeout_s:g} s: start the SuperNodes, "
                    "or raise server.node_timeout_s",
                    code="no-node",
                )
            if not patient and len(self.nodes) >= quorum_of(self._expected, server.quorum):
                break
            if not self._asked and (not patient or len(self._there) >= self._expected):
                break
            time.sleep(mailbox.POLL_S[1])
        if not self.nodes:
            raise nobody(self.turned_away)
        away = ", ".join(self.name(k) for k in range(self._expected) if k not in self.nodes)
        self._say(
            f"only {len(self.nodes)} of {self._expected} clients are there; the run goes on without the others: {away}"
        )

    def gather(self, number: int, needed: int) -> None:
        """Before a round: who has come since; waits, for `server.node_timeout_s` at most, only below the quorum.

        Args:
            number: Number of the round.
            needed: Number of clients that must be there.
        """
        self.look()
        for node_id in self._refused.keys() & set(self._there) - self._asked.keys():
            self._asked[node_id] = [self._mail.ask_hello(node_id)]  # it may have been put right
        end, said = time.monotonic() + self._server.node_timeout_s, False
        while (there := sum(map(self.is_there, self.nodes))) < min(needed, len(self.nodes)):
            if not said:
                who = f"{there or 'no'} node{'s are' if there > 1 else ' is'} there, the quorum is {needed}"
                self._say(f"round {number}: {who}; waiting up to {self._server.node_timeout_s:g} s")
                said = True
            if time.monotonic() >= end:
                break
            time.sleep(mailbox.POLL_S[1])
            self.look()

    def look(self) -> None:
        """Ask nodes that are new, and hear those that were asked; waits for nobody."""
        self._who = self._mail.nodes()
        before, self._there = self._there, list(self._who)
        for client_id, node in self.nodes.items():
            if (node.node_id in before) != (node.node_id in self._there):
                what = "is registered and away: is its SuperNode running, and can it reach the SuperLink?"
                self._say(f"{self.name(client_id)} {'is back' if node.node_id in self._there else what}")
        known = {node.node_id for node in self.nodes.values()}
        for node_id in self._there:
            if node_id not in known and node_id not in self._asked and node_id not in self._refused:
                self._asked[node_id] = [self._mail.ask_hello(node_id)]
        for node_id, questions in list(self._asked.items()):
            try:
                reply = self._answer(node_id, questions)
                if reply is None and time.monotonic() - questions[0].at < self._server.deadline_s:
                    continue
                most = self._max_rank, self._server.max_examples
                self._let_in(check_hello(reply, self._fingerprint, self._expected, *most), node_id)
            except ReplyError as error:
                self.refuse(node_id, str(error))
            self._asked.pop(node_id, None)

    def _answer(self, node_id: int, questions: list[Sent]) -> Message | None:
        """The first answer of a node that was asked; it is asked again where one was lost, or is long in coming."""
        lost = False
        for sent in questions:
            try:
                if (reply := self._mail.look(sent)) is not None:
                    return reply
            except ReplyError as error:
                if error.code not in LOST or len(questions) == TRIES:
                    raise
                lost = lost or sent is questions[-1]
        late = time.monotonic() - questions[-1].at > self._server.node_timeout_s / TRIES
        if (lost or late) and len(questions) < TRIES and node_id in self._there:
            questions.append(self._mail.ask_hello(node_id))
        return None

    def refuse(self, node_id: int, why: str) -> None:
        """Leave a node out, until it is asked again before the next round."""
        why = clean_text(why)
        self.nodes = {k: node for k, node in self.nodes.items() if node.node_id != node_id}
        if self._refused.get(node_id) != why:
            who = self._who.get(node_id)
            self._say(f"refused node {node_id}{f' {clean_text(who.name, 80)!r}' if who and who.name else ''}: {why}")
        self._refused[node_id] = why

    def _let_in(self, hello: Hello, node_id: int) -> None:
        client_id = hello.client_id
        old = self.nodes.get(client_id)
        if old is not None and old.node_id in self._there and old.node_id != node_id:
            raise ReplyError(f"client {client_id} is there already", code="client-already-there")
        self._bindings.bind(client_id, self._who.get(node_id, Identity()))  # who has left since is nobody
        self.nodes[client_id] = Node(node_id, ClientInfo(client_id, hello.rank, hello.num_examples))
        self.nodes[client_id].held.ledger = self._ledgers.setdefault(client_id, hello.ledger or START)
        self._refused.pop(node_id, None)
