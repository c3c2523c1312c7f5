"""The server's loop over rounds: ask, validate, fold in, drop; on any grid.

Replies are pulled in the order of the clients' numbers, whatever order they arrive in (the grid keeps the others), and
folded into the rule one at a time: memory does not grow with the clients, and every engine adds the same numbers in the
same order. A round goes on without the replies that are missing at its deadline, if the quorum is there.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.adapter import relative_error
from fedlora.aggregators import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    Merge,
    broadcast_change,
    merge_chain,
)
from fedlora.config import RunConfig
from fedlora.devices import Fleet, train_config
from fedlora.errors import FedloraError, PrivacyError, ReplyError, RoundError
from fedlora.flower import handshake
from fedlora.flower.books import Round, quorum_of
from fedlora.flower.codec import Ask, PlanEncoder, payload_bytes
from fedlora.flower.following import chain_digest, digest_of, follow, next_digest
from fedlora.flower.meeting import Meeting, Node
from fedlora.flower.post import Post, Sent
from fedlora.flower.servable import clients_wanted, require_servable
from fedlora.flower.server_ledger import ServerLedger
from fedlora.flower.spending import Spending, asked_in
from fedlora.flower.validate import METRICS, Limits, Valid, check_head, check_update
from fedlora.model.starting import first_state, plan_for
from fedlora.outcomes import write_outcomes
from fedlora.privacy.central import Central
from fedlora.privacy.dpsgd import RELEASABLE
from fedlora.progress import Progress
from fedlora.rng import derive
from fedlora.rundir import RunDir
from fedlora.training.central import require_one_start
from fedlora.training.evaluate import evaluate
from fedlora.training.job import examples_of
from fedlora.training.private import private_settings
from fedlora.training.samples import write_samples
from fedlora.training.workbench import Workbench


class Federation:
    """One run on a grid.

    Args:
        grid: in-process, Ray or a SuperLink.
        config: of the run.
        rule: that combines the updates.
        bench: the server's model, task and test data.
        rundir: where metrics and checkpoints go.
        progress: is told what happens.
        spending: of a private run: what the clients' ledgers say.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        rule: Aggregator,
        bench: Workbench,
        rundir: RunDir,
        progress: Progress,
        spending: Spending | None = None,
    ) -> None:
        self.grid, self.config, self.rule, self.bench = grid, config, rule, bench
        self.rundir, self.progress = rundir, progress
        hello = handshake.question(config)
        self.mail = Post(grid, hello, patience_s=config.server.node_timeout_s, ttl_s=config.server.deadline_s + 60.0)
        self.meeting = Meeting(self.mail, config, len(bench.data.clients), bench.base.fingerprint, progress)
        self.base_digest = ""
        self._digests = {0: ""}
        self._led = 0
        self.fleet = Fleet.of(config)
        self.spending = spending or (None if config.example_privacy is None else Spending(config, None))
        self.account = ServerLedger(config, rule, rundir) if isinstance(rule, Central) else None
        if (config.client_privacy is None) != (self.account is None):
            raise PrivacyError("privacy.unit = 'client' needs the rule that load_rule makes of the config, no other")
        self.spent: set[int] = set()
        self._failed = 0
        self._asked: Counter[int] = Counter()
        private = config.example_privacy is not None
        most, metrics = (1, RELEASABLE) if private else (config.server.max_examples, METRICS)
        self._limits = Limits(most, config.server.max_norm, metrics)

    @property
    def nodes(self) -> dict[int, Node]:
        """The nodes that take part, by the number of their client."""
        return self.meeting.nodes

    # ------------------------------------------------------------------------------------------------ the run

    def run(self, state: GlobalState | None) -> GlobalState:
        """All rounds that are left.

        Args:
            state: of the last checkpoint, or None to start.

        Returns:
            The state after the last round.
        """
        self.meeting.begin()
        fresh = state is None
        if state is None:
            state = first_state(self.rule, self.bench.base, self.config.seed)
        self.base_digest = chain_digest("", state.merges)
        self._digests |= {state.base_version: self.base_digest}
        plans = (self._plan(state, client_id) for client_id in self.nodes)
        require_servable(self.config, self.bench, plans, self.nodes)
        if self.config.example_privacy is not None:
            before = self.rundir.read_metrics()
            self._asked = asked_in(before)
            self.spent = set(before[-1].get("spent", ())) if before else set()
        self.progress.started(self.config, len(self.nodes), self.config.rounds)
        if fresh:
            record = {"round": 0, **self._evaluate(state)}
            write_samples(self.rundir, self.bench, "before")
            self.rundir.append_metrics(record)
            self.rundir.save_checkpoint(state)
            self.progress.round_ended(record)
        for number in range(state.round + 1, self.config.rounds + 1):
            with self.account.round(number) if self.account else nullcontext():
                state = self._round(state, number)
        self._show(state)
        write_samples(self.rundir, self.bench, "after")
        return state

    def _round(self, state: GlobalState, number: int) -> GlobalState:
        self._gather(state, number)
        self._lead(state)
        started = time.perf_counter()
        books = self._sample(number)
        self.progress.round_started(number, books.asked)
        after = self._merge(state, books)
        _require_finite(after, number)
        record = self._record(state, after, books)
        self.base_digest = next_digest(self.base_digest, state, after)
        self._digests[after.base_version] = self.base_digest
        trained = time.perf_counter()
        if number % self.config.server.evaluate_every == 0 or number == self.config.rounds:
            record |= self._evaluate(after)
        ended = time.perf_counter()
        record |= {"seconds": ended - started, "seconds_train": trained - started, "seconds_evaluate": ended - trained}
        self.rundir.append_metrics(record)
        self._end_if_failing(books)  # with its line written, and without a checkpoint: a resume repeats the round
        self.rundir.save_checkpoint(after)
        self.progress.round_ended(record)
        return after

    def _gather(self, state: GlobalState, number: int) -> None:
        """Let in who has come since the last round, unless the rule cannot serve it."""
        needed = quorum_of(clients_wanted(self.config, len(self.nodes)), self.config.server.quorum)
        for client_id in self.meeting.gather(number, needed):
            try:
                plan = self._plan(state, client_id)
                if self.config.client_privacy is not None:
                    require_one_start([self._plan(state, min(self.nodes)), plan])
                if self.config.example_privacy is not None:
                    private_settings(self.config, client_id)
            except FedloraError as error:
                self.meeting.refuse(self.nodes[client_id].node_id, str(error))
                continue
            self.progress.message(f"client {client_id} takes part from round {number} on")

    def _merge(self, state: GlobalState, books: Round) -> GlobalState:
        """The rule's next state; the old one, for the next round, if too few replies came."""
        quorum = self.config.server.quorum
        try:
            after = self.rule.merge(state, self._updates(state, books))
        except FedloraError:
            if books.has_quorum(quorum):
                raise
            after = state  # most likely the cause
        books.lost = not books.has_quorum(quorum)
        if books.lost:
            return replace(state, round=books.number, metrics={})
        return after if after.round == books.number else replace(after, round=books.number)

    def _end_if_failing(self, books: Round) -> None:
        """Raise `RoundError` after too many rounds without a quorum in a row, and after such a last round."""
        server = self.config.server
        if not books.lost or books.lost_to_devices(server.quorum):
            self._failed = 0
            return
        self._failed += 1
        cure = f"cure the clients, then: fedlora run --resume {self.rundir.path}"
        error = books.no_quorum(server.quorum, server.deadline_s, cure)
        if self._failed > server.max_failed_rounds or books.number == self.config.rounds:
            raise error
        self.progress.message(f"{error.args[0]}; going on with round {books.number + 1}")

    def _sample(self, number: int) -> Round:
        """Open a round's books: draw its clients from those that are there."""
        solvent = sorted(self.nodes.keys() - self.spent)
        if not solvent:
            raise RoundError(
                f"round {number}: the privacy budget of every client is spent: the state after round {number - 1} is "
                f"in {self.rundir.path}; for more, start a new run with a larger privacy.epsilon or fewer rounds"
            )
        there = [k for k in solvent if self.fleet.available(number, k)]
        wanted = min(clients_wanted(self.config, len(self.nodes)), len(there))
        generator = np.random.default_rng(derive(self.config.seed, "sample", number))
        asked = sorted(int(k) for k in generator.choice(there, size=wanted, replace=False)) if there else []
        return Round(number, asked, offline=sorted(set(solvent) - set(there)))

    # ------------------------------------------------------------------------------------------------ asking

    def _plan(self, state: GlobalState, client_id: int) -> ClientPlan:
        node = self.nodes[client_id]
        layout = self.bench.base.layout(node.rank or self.config.clients.rank_of(client_id))
        return plan_for(self.rule, state, ClientSpec(client_id, layout, node.base_version))

    def _ask(self, state: GlobalState, client_id: int, number: int, *, everything: bool) -> Ask:
        """The plan for one client; `everything` for one that turned out to hold nothing."""
        node = self.nodes[client_id]
        if everything:
            node.frozen, node.base_version, node.base_digest = "", 0, ""
        plan = self._plan(state, client_id)
        since = node.base_digest if plan.merges and plan.merges[0].since == node.base_version else ""
        if not plan.merges:
            since = self.base_digest
        return Ask(plan, number, client_id, self.base_digest, since, self.config.wire.up)

    def _updates(self, state: GlobalState, books: Round) -> Iterator[ClientUpdate]:
        """Ask the round's clients and yield each valid update, in the order of their numbers."""
        encoder = PlanEncoder()
        deadline = time.monotonic() + self.config.server.deadline_s
        window = getattr(self.grid, "window", None) or len(books.asked)
        todo, under_way = deque(books.asked), deque[tuple[Ask, Sent]]()
        while todo or under_way:
            while todo and len(under_way) < window:
                client_id = todo.popleft()
                if not self.meeting.is_there(client_id):
                    self._refuse(client_id, "its node is not there", books)
                    continue
                ask = self._ask(state, client_id, books.number, everything=False)
                content = self._content(ask, encoder, books)
                if self._answers_in_time(ask, content, books):
                    under_way.append((ask, self._send(ask, content)))
            if not under_way:
                continue
            ask, sent = under_way.popleft()
            update = self._await(state, ask, sent, encoder, deadline, books)
            if update is not None:
                yield update

    def _content(self, ask: Ask, encoder: PlanEncoder, books: Round) -> RecordDict:
        holds = self.nodes[ask.client_id].frozen == encoder.frozen_digest(ask.plan)
        content = encoder.encode(ask, with_frozen=not holds)
        books.bytes_down += payload_bytes(content)
        return content

    def _answers_in_time(self, ask: Ask, content: RecordDict, books: Round) -> bool:
        """Whether the client's simulated device will answer before the simulated deadline."""
        if not self.fleet.simulated:
            return True
        client_id = ask.client_id
        if self.config.example_privacy is not None:  # what it plans, in public; how many there are is secret
            plan = private_settings(self.config, client_id).schedule
            examples = round(plan.steps * plan.expected_batch_size)
        else:
            size = len(self.bench.data.clients[client_id])
            examples = examples_of(size, train_config(self.config, client_id))
        seconds = self.fleet.seconds(
            client_id,
            bytes_down=payload_bytes(content),
            examples=examples,
            bytes_up=sum(header.nbytes for header in ask.headers().values()),
        )
        books.simulated_s[client_id] = seconds
        if self.fleet.drops_out(books.number, client_id):
            books.dropped.append(client_id)
        elif self.fleet.too_late(seconds):
            books.late.append(client_id)
        else:
            return True
        return False

    def _send(self, ask: Ask, content: RecordDict) -> Sent:
        return self.mail.send(content, self.nodes[ask.client_id].node_id, MessageType.TRAIN, str(ask.round))

    def _await(
        self, state: GlobalState, ask: Ask, sent: Sent, encoder: PlanEncoder, deadline: float, books: Round
    ) -> ClientUpdate | None:
        """Wait for one client's reply, check it, and write it into the books; None if there is no usable one."""
        client_id = ask.client_id
        try:
            reply = self._receive(sent, deadline, books)
            if reply is not None and self._head(reply, books, client_id)["kind"] == "need":
                ask = self._ask(state, client_id, books.number, everything=True)
                reply = self._receive(self._send(ask, self._content(ask, encoder, books)), deadline, books)
                if reply is not None and self._head(reply, books, client_id)["kind"] == "need":
                    raise ReplyError("it asks for parts that it was just sent")
            if reply is None:
                books.missing.append(client_id)
                self.progress.reply(books.number, client_id, False, "no reply before the deadline")
                return None
            valid = check_update(reply.content, ask, self._limits)
        except ReplyError as error:
            self._refuse(client_id, str(error), books)
            return None
        return self._accept(ask, valid, encoder, books)

    def _refuse(self, client_id: int, why: str, books: Round) -> None:
        books.refused[client_id] = why
        self.progress.reply(books.number, client_id, False, why)

    def _receive(self, sent: Sent, deadline: float, books: Round) -> Message | None:
        """The reply, with its bytes in the books, whether it can be used or not."""
        reply = self.mail.receive(sent, deadline)
        if reply is not None and not reply.has_error():
            books.bytes_up += payload_bytes(reply.content)
        return reply

    def _head(self, reply: Message, books: Round, client_id: int) -> dict[str, Any]:
        """`check_head`; a client whose privacy budget is spent is refused, and not asked again."""
        if self.config.example_privacy is None:
            return check_head(reply)
        head = check_head(reply, ("update", "need", "spent"))
        if head["kind"] == "spent":
            books.spent.append(client_id)
            self.spent.add(client_id)
            raise ReplyError(str(head.get("error", "its privacy budget is spent"))[:400])
        return head

    def _accept(self, ask: Ask, valid: Valid, encoder: PlanEncoder, books: Round) -> ClientUpdate:
        node = self.nodes[ask.client_id]
        node.frozen = encoder.frozen_digest(ask.plan)
        node.base_version, node.base_digest = ask.plan.base_version, ask.base_digest
        adapter = ask.plan.adapter.with_tensors(valid.tensors)
        weight = float(valid.num_examples) if self.config.server.weighting == "examples" else 1.0
        books.answered.append(ask.client_id)
        # Under user-level privacy no figure of one client is written down, but for the weight, which counts as public.
        figures = {"num_examples": weight} if self.account else {"num_examples": valid.num_examples, **valid.metrics}
        books.clients[ask.client_id] = figures
        if ask.client_id in books.simulated_s:
            books.clients[ask.client_id]["simulated_seconds"] = books.simulated_s[ask.client_id]
        if self._measures_error:
            books.ideal.add(adapter.pairs, weight)
            books.weight += weight
        self.progress.reply(books.number, ask.client_id, True, "")
        return ClientUpdate(ask.client_id, adapter, weight, ask.plan.base_version, valid.metrics)

    # ------------------------------------------------------------------------------------------------ figures

    def _record(self, before: GlobalState, after: GlobalState, books: Round) -> dict[str, Any]:
        record: dict[str, Any] = {
            "round": books.number,
            "train_loss": books.mean("loss"),
            **books.outcome(),
            **books.simulated(self.fleet),
            "rule": dict(after.metrics),
            **({"turned_away": away} if (away := {str(n): why for n, why in self.meeting.turned_away.items()}) else {}),
        }
        if self._measures_error and not books.lost:
            # Under [privacy] the updates are noised already: what is computed from them gives nothing away.
            record["aggregation_error"] = self._aggregation_error(before, after, books)
        if self.spending is not None:
            self._asked.update(books.asked)
            record |= {"spent": sorted(self.spent), "epsilon": self.spending.largest(self._asked)}
        if self.account is not None:
            record |= self.account.settle(record)
        return record

    @property
    def _measures_error(self) -> bool:
        """Only where weights change by s B A is D* known."""
        return self.config.server.aggregation_error and self.bench.base.method.bilinear

    def _aggregation_error(self, before: GlobalState, after: GlobalState, books: Round) -> float:
        change = broadcast_change(before, after)
        if Claim.CHANGES_BASE not in self.rule.claims:
            # What the base gave up at the start belongs to both sides: they are changes of the pristine base.
            for merge in before.merges:
                change.add(merge.change.pairs)
                books.ideal.add(merge.change.pairs, books.weight)
        return relative_error(change, books.ideal, books.weight)

    def _show(self, state: GlobalState) -> None:
        """Write the global model to the server's own base."""
        base = self.bench.base
        here = base.base_version if digest_of(base) == self._digests.get(base.base_version) else 0
        follow(base, *self._way(state, here))
        base.write(state.adapter)

    def _way(self, state: GlobalState, here: int) -> tuple[Sequence[Merge], int, str, str]:
        """The merges that take a base from version `here` to the state's, and the rest of what `follow` asks."""
        chain = merge_chain(state.merges, here)
        since = self._digests[here] if not chain or chain[0].since == here else ""
        return chain, state.base_version, self.base_digest, since

    def _lead(self, state: GlobalState) -> None:
        """Bring the bases of a grid's processes to the state's, where it has any."""
        follow_all = getattr(self.grid, "follow", None)
        if follow_all is not None and self._led != state.base_version:
            follow_all(*self._way(state, self._led))
            self._led = state.base_version

    def _evaluate(self, state: GlobalState) -> Mapping[str, Any]:
        self._show(state)
        result = evaluate(
            self.bench.base, self.bench.task, self.bench.data.test, domain_column=self.bench.data.domain_column
        )
        if state.round == self.config.rounds:
            write_outcomes(self.rundir.path, state.round, self.bench.data.test_digest, result.measures)
        return {**result.overall, "domains": dict(result.domains)}


def _require_finite(state: GlobalState, number: int) -> None:
    tensors = {**state.adapter.tensors()}
    for merge in state.merges[-1:]:
        tensors.update(merge.change.tensors())
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RoundError(
                f"round {number}: the merged {name!r} is not finite, though every reply was: "
                "set server.max_norm to refuse replies that are far too large"
            )
