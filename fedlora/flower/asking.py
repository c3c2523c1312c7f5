"""Asks the clients of a round: a plan goes out to each, its reply is checked, and what is valid becomes an update.

Replies are pulled in the order of the clients' numbers, whatever order they arrive in (the grid keeps the others), and
handed on one at a time: memory does not grow with the clients, and every engine adds the same numbers in the same
order.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedlora.aggregators import Aggregator, ClientPlan, ClientSpec, ClientUpdate, GlobalState
from fedlora.config import RunConfig
from fedlora.data.own import brought_by_nodes
from fedlora.errors import ReplyError
from fedlora.federation.initial_state import plan_for
from fedlora.federation.plausibility import UPDATE_NORM, largest_change, largest_weight
from fedlora.federation.round_record import Round
from fedlora.federation.simulated_devices import SimulatedDevices
from fedlora.flower import handshake
from fedlora.flower.bounded_pull import Allowed
from fedlora.flower.mailbox import Mailbox, Sent
from fedlora.flower.messages import Ask, PlanEncoder, frozen_tensors, payload_bytes
from fedlora.flower.node_registry import Node
from fedlora.flower.spending import check_stated
from fedlora.flower.update_checks import METRICS, Limits, Valid, check_head, check_update, l2_norm
from fedlora.privacy.disclosure import REFUSED, Disclosure
from fedlora.progress import Progress
from fedlora.sanitize import clean_text
from fedlora.simulation.capacity import examples_to_tell
from fedlora.training.dp_settings import private_settings
from fedlora.training.workspace import Workspace

logger = logging.getLogger(__name__)


class Present(Protocol):
    """Who can be asked."""

    @property
    def nodes(self) -> Mapping[int, Node]:
        """By the number of their client."""
        ...

    def is_there(self, client_id: int) -> bool:
        """Whether the client's node is there."""
        ...


class Asker:
    """The road of a plan to a client, and of its reply back.

    Args:
        grid: on which the nodes are.
        config: of the run.
        rule: that plans.
        workspace: model and data.
        progress: is told of each reply.
        remind: is given frozen parts, with the digest that names them, that a message leaves out since its node holds
            them: for nodes that are answered for by another process than before.
        run: id of a private run's directory, by which the clients' ledgers know the run.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        rule: Aggregator,
        workspace: Workspace,
        progress: Progress,
        remind: Callable[[str, Mapping[str, Tensor]], None] | None = None,
        run: str = "",
    ) -> None:
        self._grid, self._config, self._rule, self._workspace = grid, config, rule, workspace
        self._progress, self._remind, self._run = progress, remind, run
        hello = handshake.question(config, workspace.pins)
        self.mail = Mailbox(grid, hello, patience_s=config.server.node_timeout_s, ttl_s=config.server.deadline_s + 60.0)
        self._fleet = SimulatedDevices.of(config)
        uniform = config.privacy is not None and config.server.weighting == "uniform"
        most = 1 if uniform else config.server.max_examples
        metrics = METRICS if config.privacy is None else Disclosure(config.privacy.unit).figures
        self._limits = Limits(most, config.server.max_norm, metrics=metrics)
        self._own_data = brought_by_nodes(config)

    @property
    def measures_error(self) -> bool:
        """Only where weights change by s B A is D* known."""
        return self._config.server.aggregation_error and self._workspace.base.method.bilinear

    def plan(self, state: GlobalState, node: Node) -> ClientPlan:
        """What the rule asks of a node."""
        layout = self._workspace.base.layout(node.rank or self._config.clients.rank_of(node.client_id))
        return plan_for(self._rule, state, ClientSpec(node.client_id, layout, node.base_version))

    def updates(self, state: GlobalState, base_digest: str, books: Round, who: Present) -> Iterator[ClientUpdate]:
        """Ask the clients in `books.asked` and yield each valid update, in the order in which they stand there.

        Args:
            state: on which they train.
            base_digest: names the base of the state.
            books: what becomes of each is written there.
            who: can be asked; what a node holds is written there.
        """
        encoder = PlanEncoder()
        deadline = time.monotonic() + self._config.server.deadline_s
        window = getattr(self._grid, "window", None) or len(books.asked)
        todo, under_way = deque(books.asked), deque[tuple[Ask, Sent, Node]]()
        while todo or under_way:
            while todo and len(under_way) < window:
                client_id = todo.popleft()
                if not who.is_there(client_id):
                    self._refuse(client_id, "its node is not there", books)
                    continue
                node = who.nodes[client_id]
                ask = self._ask(state, base_digest, node, books.number, everything=False)
                content = self._content(ask, node, encoder, books)
                if self._answers_in_time(ask, content, books):
                    under_way.append((ask, self._send(ask, node, content), node))
            if not under_way:
                continue
            ask, sent, node = under_way.popleft()
            update = self._await(state, ask, sent, node, encoder, deadline, books)
            if update is not None:
                yield update

    # ------------------------------------------------------------------------------------------------ asking

    def _ask(self, state: GlobalState, base_digest: str, node: Node, number: int, *, everything: bool) -> Ask:
        """The plan for one client; `everything` for one that turned out to hold nothing."""
        if everything:
            node.frozen, node.base_version, node.base_digest = "", 0, ""
        plan = self.plan(state, node)
        since = node.base_digest if plan.base_updates and plan.base_updates[0].since == node.base_version else ""
        if not plan.base_updates:
            since = base_digest
        return Ask(plan, number, node.client_id, base_digest, since, self._config.wire.up, self._run)

    def _content(self, ask: Ask, node: Node, encoder: PlanEncoder, books: Round) -> RecordDict:
        digest = encoder.frozen_digest(ask.plan)
        holds = node.frozen == digest
        if holds and digest and self._remind is not None:
            self._remind(digest, frozen_tensors(ask.plan))
        content = encoder.encode(ask, with_frozen=not holds)
        books.bytes_down += payload_bytes(content)
        return content

    def _answers_in_time(self, ask: Ask, content: RecordDict, books: Round) -> bool:
        """Whether the client's simulated device will answer before the simulated deadline."""
        if not self._fleet.simulated:
            return True
        client_id = ask.client_id
        seconds = self._fleet.seconds(
            client_id,
            bytes_down=payload_bytes(content),
            examples=examples_to_tell(self._workspace, client_id),
            bytes_up=sum(header.nbytes for header in ask.headers().values()),
        )
        books.simulated_s[client_id] = seconds
        if self._fleet.drops_out(books.number, client_id):
            books.dropped.append(client_id)
        elif self._fleet.too_late(seconds):
            books.late.append(client_id)
        else:
            return True
        return False

    def _send(self, ask: Ask, node: Node, content: RecordDict) -> Sent:
        allowed = Allowed({name: header.nbytes for name, header in ask.headers().items()})
        return self.mail.send(content, node.node_id, MessageType.TRAIN, str(ask.round), allowed)

    # ------------------------------------------------------------------------------------------------ replies

    def _await(
        self, state: GlobalState, ask: Ask, sent: Sent, node: Node, encoder: PlanEncoder, deadline: float, books: Round
    ) -> ClientUpdate | None:
        """Wait for one client's reply, check it, and write it into the books; None if there is no usable one."""
        client_id = ask.client_id
        try:
            reply = self._receive(sent, deadline, books)
            if reply is not None and self._head(reply, books, client_id)["kind"] == "need":
                ask = self._ask(state, ask.base_digest, node, books.number, everything=True)
                again = self._send(ask, node, self._content(ask, node, encoder, books))
                reply = self._receive(again, deadline, books)
                if reply is not None and self._head(reply, books, client_id)["kind"] == "need":
                    raise ReplyError("it asks for parts that it was just sent")
            if reply is None:
                books.missing.append(client_id)
                self._progress.reply(books.number, client_id, False, "no reply before the deadline")
                return None
            valid = self._checked(reply, ask)
            self._require_plausible(ask, valid.change, books)
            if self._config.example_privacy is not None:
                check_stated(valid.metrics, private_settings(self._config, client_id))
        except ReplyError as error:
            self._refuse(client_id, str(error), books)
            return None
        return self._accept(ask, valid, node, encoder, books)

    def _checked(self, reply: Message, ask: Ask) -> Valid:
        """`check_update`; under user-level privacy a refusal does not say what the values were."""
        try:
            return check_update(reply.content, ask, self._limits_for(ask.client_id))
        except ReplyError as error:
            if self._config.client_privacy is None:
                raise
            logger.debug("client %d: %s", ask.client_id, error)
            raise ReplyError(REFUSED) from None

    def _limits_for(self, client_id: int) -> Limits:
        """What this client's reply may at most be by itself."""
        if self._config.privacy is not None or self._own_data:
            return self._limits
        most = max(1, len(self._workspace.data.clients[client_id]))  # the server knows who has what
        return replace(self._limits, max_examples=min(self._limits.max_examples, most))

    def _require_plausible(self, ask: Ask, change: float, books: Round) -> None:
        """Raise `ReplyError` for a change that is far too large beside the others' and what was sent."""
        ratio = self._config.server.max_norm_ratio
        if ratio == "off" or self._config.client_privacy is not None:
            return
        if not change <= largest_change(1.0, books.median_change, ratio):  # nearly always that is enough
            start = l2_norm(ask.plan.adapter.tensors().values())
            if not change <= (most := largest_change(start, books.median_change, ratio)):
                raise ReplyError(
                    f"its change has norm {change:.4g}, far above the others': the most is {most:.4g} "
                    f"(server.max_norm_ratio = {ratio:g})"
                )

    def _weight(self, client_id: int, claimed: int, books: Round) -> float:
        """What a reply weighs in the mean."""
        if self._config.server.weighting != "examples":
            return 1.0
        ratio = self._config.server.max_weight_ratio
        if not self._own_data or ratio == "off":
            return float(claimed)
        return min(float(claimed), largest_weight(client_id, books.claims, ratio))

    def _refuse(self, client_id: int, why: str, books: Round) -> None:
        books.refused[client_id] = clean_text(why)
        self._progress.reply(books.number, client_id, False, books.refused[client_id])

    def _receive(self, sent: Sent, deadline: float, books: Round) -> Message | None:
        """The reply, with its bytes in the books, whether it can be used or not."""
        reply = self.mail.receive(sent, deadline)
        if reply is not None and not reply.has_error():
            books.bytes_up += payload_bytes(reply.content)
        return reply

    def _head(self, reply: Message, books: Round, client_id: int) -> dict[str, Any]:
        """`check_head`; a client whose privacy budget is spent is refused."""
        if self._config.example_privacy is None:
            return check_head(reply)
        head = check_head(reply, ("update", "need", "spent"))
        if head["kind"] == "spent":
            books.spent.append(client_id)
            raise ReplyError(clean_text(head.get("error", "its privacy budget is spent")))
        return head

    def _accept(self, ask: Ask, valid: Valid, node: Node, encoder: PlanEncoder, books: Round) -> ClientUpdate:
        node.frozen = encoder.frozen_digest(ask.plan)
        node.base_version, node.base_digest = ask.plan.base_version, ask.base_digest
        adapter = ask.plan.adapter.with_tensors(valid.tensors)
        weight = self._weight(ask.client_id, valid.num_examples, books)
        books.answered.append(ask.client_id)
        # Under user-level privacy no figure of one client is written down, but for the weight, which counts as public.
        hidden = self._config.client_privacy is not None
        figures = {"num_examples": weight} if hidden else {"num_examples": valid.num_examples, **valid.metrics}
        if self._config.privacy is None:
            if math.isfinite(valid.change):
                figures[UPDATE_NORM] = valid.change
            if self._own_data and weight < valid.num_examples and self._config.server.weighting == "examples":
                figures["weight"] = weight
        books.clients[ask.client_id] = figures
        if ask.client_id in books.simulated_s:
            books.clients[ask.client_id]["simulated_seconds"] = books.simulated_s[ask.client_id]
        if self.measures_error:
            books.ideal.add(adapter.pairs, weight)
            books.weight += weight
        self._progress.reply(books.number, ask.client_id, True, "")
        return ClientUpdate(ask.client_id, adapter, weight, ask.plan.base_version, valid.metrics)
