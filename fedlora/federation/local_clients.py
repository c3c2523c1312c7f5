"""Clients that train in this process, without messages.

What the wire would do to numbers is applied, and the bytes that it would carry are counted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, final

import numpy as np

from fedlora.aggregators import Aggregator
from fedlora.config import RunConfig
from fedlora.data.own import brought_by_nodes
from fedlora.errors import ReplyError
from fedlora.federation.client import answer
from fedlora.federation.client_evaluation import measure_apart
from fedlora.federation.client_ledger import NOWHERE, LedgerPlace
from fedlora.federation.client_pool import (
    ClientEvaluation,
    ClientInfo,
    ClientReply,
    Failure,
    RoundRequest,
    ServerPart,
    SimulatedClients,
)
from fedlora.federation.client_store import NOTHING_KEPT, ClientStore
from fedlora.federation.client_training import Answer
from fedlora.federation.planner import Held, Planner
from fedlora.federation.protocol import FIGURE_BYTES, MAX_ERROR, TrainRequest, head_nbytes, note_head, update_head
from fedlora.federation.screen import Screen
from fedlora.model.base_history import bring_to, show
from fedlora.sanitize import clean_text
from fedlora.training.evaluate import Measures, measure_batches
from fedlora.training.workspace import Workspace


class _Turn(NamedTuple):
    """A client whose turn has come, be it asked or not.

    Args:
        request: What it is asked.
        reply: What is known of the outcome before it is; with a failure it is not asked.
        held: What the client holds.
    """

    request: TrainRequest
    reply: ClientReply
    held: Held


@final
class LocalClients(SimulatedClients):
    """A pool of all clients of a partition, of which so many train at once; see `fedlora.federation.client_pool`.

    Args:
        config: Of the run.
        rule: That plans.
        workspace: Model, task and data of all clients.
        cohort: How many clients train together.
        run: Id of the run's directory.
        ledgers: Where private clients keep their ledgers.
        store: Where clients keep what they train and do not send.
    """

    def __init__(
        self,
        config: RunConfig,
        rule: Aggregator,
        workspace: Workspace,
        cohort: int = 1,
        run: str = "",
        ledgers: LedgerPlace = NOWHERE,
        store: ClientStore = NOTHING_KEPT,
    ) -> None:
        super().__init__(clients_of(workspace))
        self._config, self._workspace, self._cohort = config, workspace, cohort
        self._planner = Planner(config, rule, workspace, run)
        self._screen = Screen(config, workspace)
        self._ledgers, self._store = ledgers, store
        self._held: dict[int, Held] = {}

    def train(self, request: RoundRequest) -> Generator[ClientReply, None, None]:
        """Train the sampled clients, a cohort at a time.

        Raises:
            Exception: a client met an error that is none of fedlora's: a fault of the program, which ends the run.
                Without the client the rounds would be another experiment.
        """
        group: list[_Turn] = []
        for client_id in request.clients:
            group.append(self._turn(request, self._clients[client_id], self._held.setdefault(client_id, Held())))
            if sum(turn.reply.failure is None for turn in group) == self._cohort:
                yield from self._outcomes(request, group)
                group = []
        yield from self._outcomes(request, group)

    def train_together(
        self, request: RoundRequest, clients: Sequence[ClientInfo], held: Sequence[Held]
    ) -> list[ClientReply]:
        """Train some clients as one cohort.

        Args:
            request: The round's.
            clients: At most a cohort of them.
            held: What each holds; changed in place.

        Returns:
            The outcome of each, in their order.
        """
        return self._outcomes(request, [self._turn(request, *pair) for pair in zip(clients, held, strict=True)])

    def evaluate(self, request: RoundRequest, parts: Sequence[str]) -> Generator[ClientEvaluation, None, None]:
        """Measure the state on what each client keeps apart."""
        held = [self._held.setdefault(client_id, Held()) for client_id in request.clients]
        yield from self.evaluate_some(request, [self._clients[client_id] for client_id in request.clients], held, parts)

    def measured(self, request: RoundRequest, part: ServerPart, batches: Sequence[np.ndarray]) -> list[Measures]:
        """Measure the request's state on examples of the server's; see `MeasuringProcesses.measure`."""
        base, data = self._workspace.base, self._workspace.data
        show(base, request.state, request.digests)
        examples = data.require_test() if part == "test" else data.validation
        assert examples is not None
        return measure_batches(base, self._workspace.task, examples, batches)

    def evaluate_some(
        self, request: RoundRequest, clients: Sequence[ClientInfo], held: Sequence[Held], parts: Sequence[str]
    ) -> list[ClientEvaluation]:
        """Measure the state on what some clients keep apart, one client after the other.

        Args:
            request: The round's.
            clients: Which.
            held: What each holds; changed in place.
            parts: See `ClientPool`.
        """
        bring_to(self._workspace.base, request.state, request.digests)
        return [self._evaluated(request, *pair, parts) for pair in zip(clients, held, strict=True)]

    def _evaluated(
        self, request: RoundRequest, client: ClientInfo, held: Held, parts: Sequence[str]
    ) -> ClientEvaluation:
        """What one client reports of the state, on a base that has its version."""
        asked = self._planner.evaluation(request, client, held)
        self._workspace.base.write(asked.plan.adapter)
        found = measure_apart(self._workspace, asked, parts, self._store)
        held.receive(asked)
        if isinstance(found, Failure):
            nbytes = head_nbytes(note_head("error", error=clean_text(found.why, MAX_ERROR)))
            return ClientEvaluation(client.client_id, failure=found, bytes_down=asked.nbytes, bytes_up=nbytes)
        nbytes = sum(values.nbytes for sums in found.values() for values in sums.values())
        return ClientEvaluation(client.client_id, found, bytes_down=asked.nbytes, bytes_up=nbytes)

    def _turn(self, request: RoundRequest, client: ClientInfo, held: Held) -> _Turn:
        asked = self._planner.request(request, client, held)
        return _Turn(asked, self._planner.outcome(asked), held)

    def _outcomes(self, request: RoundRequest, group: Sequence[_Turn]) -> list[ClientReply]:
        """Train those of a group whose devices answer in time; the outcome of each."""
        asked = [turn.request for turn in group if turn.reply.failure is None]
        answers: Iterator[Answer] = iter(())
        if asked:
            bring_to(self._workspace.base, request.state, request.digests)
            ledgers = self._ledgers
            answers = iter(
                answer(self._workspace, asked, lambda one: ledgers.open(one.client_id, one.run), self._store)
            )
        return [
            turn.reply if turn.reply.failure is not None else self._outcome(request, turn, next(answers))
            for turn in group
        ]

    def _outcome(self, request: RoundRequest, turn: _Turn, found: Answer) -> ClientReply:
        """What is written down of a client, and its update as the server would have received it."""
        one, reply, held = turn
        if isinstance(found, Failure):
            kind = "spent" if found.kind == "spent" else "error"
            note = note_head(kind, error=clean_text(found.why, MAX_ERROR))
            return reply.failed(Failure(found.kind, clean_text(found.why)), bytes_up=head_nbytes(note))
        if isinstance(found, Exception):
            raise found
        head = update_head(one, found.ledger)
        nbytes = one.reply_nbytes + head_nbytes(head) + FIGURE_BYTES * len(found.figures)
        reply = reply.with_bytes(up=nbytes)
        try:
            received = one.as_received(found.tensors, self._config.seed)
            admitted = self._screen.admit(reply, one, received, found.figures, request.expected)
        except ReplyError as error:
            return reply.failed(Failure("refused", clean_text(error)))
        held.receive(one)
        return admitted


def clients_of(workspace: Workspace) -> dict[int, ClientInfo]:
    """All clients of a partition."""
    shares = workspace.data.clients
    if workspace.config.privacy is not None or brought_by_nodes(workspace.config):
        return {client_id: ClientInfo(client_id) for client_id in range(len(shares))}
    return {client_id: ClientInfo(client_id, num_examples=len(share)) for client_id, share in enumerate(shares)}
