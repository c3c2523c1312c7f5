"""The server's loop: available -> sample -> plan -> train -> aggregate -> evaluate -> callbacks.

Updates are handed to the rule one at a time, as they come. A round goes on without the replies that are missing at its
deadline, if the quorum is there. Where the clients are is the pool's business.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch

from fedlora.aggregators import Aggregator, Claim, ClientUpdate, GlobalState, broadcast_change
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import FedloraError, RoundError
from fedlora.federation.checks import clients_wanted, require_servable
from fedlora.federation.client_pool import ClientInfo, ClientPool, PartialAggregate, RoundRequest, nobody
from fedlora.federation.client_store import last_used
from fedlora.federation.evaluator import Evaluator
from fedlora.federation.given_adapter import Start
from fedlora.federation.initial_state import first_state
from fedlora.federation.load_rule import makes_models, require_one_start
from fedlora.federation.planner import Planner
from fedlora.federation.plausibility import (
    COUNTED_LOSS,
    FEWEST,
    SMALLEST_LOSS,
    START_LOSS,
    Expectations,
    largest_loss,
    median_change,
    median_loss,
)
from fedlora.federation.privacy_account import PrivacyAccount
from fedlora.federation.round_record import RoundRecord, failed_at_the_end, quorum_of
from fedlora.federation.selection import Selection
from fedlora.federation.simulated_devices import SimulatedDevices
from fedlora.lowrank import relative_error
from fedlora.model.base_history import chain_digest, next_digest
from fedlora.rng import derive
from fedlora.training.dp_settings import private_settings
from fedlora.training.workspace import Workspace


@final
class FederatedServer:
    """One run of a federation.

    Args:
        pool: The clients.
        config: Of the run.
        rule: That aggregates the updates.
        workspace: The server's model, task and test data.
        account: What the run spends of its clients' privacy.
        callbacks: Told what happens.
        where: The run's folder, for messages that name it.
    """

    def __init__(
        self,
        pool: ClientPool,
        config: RunConfig,
        rule: Aggregator,
        workspace: Workspace,
        account: PrivacyAccount,
        callbacks: Callback,
        where: str = "",
    ) -> None:
        self.pool, self.config, self.rule, self.workspace = pool, config, rule, workspace
        self.account, self.callbacks, self.where = account, callbacks, where
        self.clients: Mapping[int, ClientInfo] = {}
        self._planner = Planner(config, rule, workspace)
        self._evaluator = Evaluator(pool, config, workspace, makes_models(config, rule), callbacks)
        self._devices = SimulatedDevices.of(config)
        self._digests = {0: ""}
        self._kept_rounds: dict[int, int] = {}
        self._failed_rounds = 0
        self._interrupted: Exception | None = None
        self._median_change: float | None = None
        self._median_loss: float | None = None
        self._capped: set[int] = set()
        self._cut: set[int] = set()
        self._said_unchecked = False
        self._selection: Selection | None = None

    def run(
        self, state: GlobalState | None, history: Sequence[Mapping[str, Any]], start: Start | None = None
    ) -> GlobalState:
        """All rounds that are left.

        Args:
            state: Of the last checkpoint, or None to start.
            history: Lines of metrics so far.
            start: The adapter that a new run begins with; None: as the method draws one.

        Returns:
            The state after the last round.
        """
        everybody = len(self.workspace.data.clients)
        self.clients = self.pool.available(0, quorum_of(everybody, self.config.server.quorum))
        fresh = state is None
        state = state or first_state(self.rule, self.workspace.base, self.config.seed, start)
        known = self.account.base_of(state)
        self._digests[state.base_version] = chain_digest("", state.base_updates) if known is None else known
        self._median_change, self._median_loss = median_change(history), median_loss(history)
        self._kept_rounds = last_used(history)
        self._failed_rounds = failed_at_the_end(history, self.config.server.quorum)
        if self.config.selection is not None:
            self._selection = Selection(self.config, self.workspace.task, history)
            if self._selection.best is not None and self._selection.best.round == state.round:
                self.callbacks.best_reached(state)  # a kill may have come between its checkpoint and this
        self._require_servable(state)
        self.callbacks.started(self.config, len(self.clients), self.config.rounds)
        self._evaluator.announce(range(state.round + 1, self.config.rounds))
        if fresh:
            record = {"round": 0, **self._evaluate(state)}
            self.callbacks.measured(record)
            self.callbacks.state_reached(state)
            self.callbacks.round_ended(record)
        for number in range(state.round + 1, self.config.rounds + 1):
            if self._selection is not None and self._selection.stopped is not None:
                self.callbacks.message(f"the run ends after round {state.round}: {self._selection.stopped}")
                break
            state, line = self._round(state, number)
            if self._selection is not None:
                if self._selection.see(line):
                    self.callbacks.best_reached(state)
                if self._selection.said:
                    self.callbacks.message(self._selection.said)
        self._evaluator.show(state, self._digests)
        self.callbacks.ended(state)
        return state

    # ------------------------------------------------------------------------------------------------ a round

    def _round(self, state: GlobalState, number: int) -> tuple[GlobalState, Mapping[str, Any]]:
        self._take_in(state, number)
        started = time.perf_counter()
        record = self._sample(number)
        self.callbacks.round_started(number, record.asked)
        claims = {k: info.num_examples for k, info in self.clients.items() if info.num_examples is not None}
        expected = Expectations(self._median_change, claims, self._median_loss)
        request = RoundRequest(number, record.asked, state, dict(self._digests), expected, dict(self._kept_rounds))
        with self.account.round(request):
            after = self._aggregate(request, record)
            _require_finite(after, number)
            line = self._line(state, after, record)
            self._kept_rounds |= last_used([line])
            self._digests[after.base_version] = next_digest(request.base_digest, state, after)
            trained = time.perf_counter()
            if number % self.config.evaluation.every == 0 or number == self.config.rounds:
                line |= self._evaluate(after, lost=record.lost)
            ended = time.perf_counter()
            if self.config.privacy is None:  # how long clients take tells of their data
                line |= {"seconds": ended - started, "seconds_train": trained - started}
                line |= {"seconds_evaluate": ended - trained}
            self.callbacks.measured(line)
            self._require_progress(record)  # without a checkpoint: a resume repeats the round
            self.callbacks.state_reached(after)
            self.callbacks.round_ended(line)
        return after, line

    def _take_in(self, state: GlobalState, number: int) -> None:
        """See who can be asked, and whether the rule can serve who has come since the last round."""
        before = self.clients
        needed = quorum_of(clients_wanted(self.config, len(before)), self.config.server.quorum)
        self.clients = self.pool.available(number, needed)
        for client_id, info in self.clients.items():
            if before.get(client_id) is not info and self._is_servable(state, info, min(self.clients)):
                self.callbacks.message(f"client {client_id} takes part from round {number} on")

    def _sample(self, number: int) -> RoundRecord:
        """Draw a round's clients from those that are there."""
        solvent = self.account.solvent(self.clients)
        if not solvent:
            raise RoundError(
                f"round {number}: the privacy budget of every client is spent: the state after round {number - 1} is "
                f"in {self.where}; for more, start a new run with a larger privacy.epsilon or fewer rounds",
                code="budgets-spent",
            )
        there = [k for k in solvent if self._devices.available(number, k)]
        wanted = min(clients_wanted(self.config, len(self.clients)), len(there))
        generator = np.random.default_rng(derive(self.config.seed, "sample", number))
        asked = sorted(int(k) for k in generator.choice(there, size=wanted, replace=False)) if there else []
        offline = sorted(set(solvent) - set(there))
        return RoundRecord(number, asked, offline=offline, measures_error=self._planner.measures_error)

    def _aggregate(self, request: RoundRequest, record: RoundRecord) -> GlobalState:
        """The rule's next state; the old one, for the next round, if too few replies came."""
        quorum, updates = self.config.server.quorum, self._updates(request, record)
        try:
            after = self.rule.aggregate(request.state, updates)
        except FedloraError as error:
            if record.has_quorum(quorum) or error is self._interrupted:
                raise
            after = request.state  # most likely the cause
        finally:
            updates.close()  # what is under way ends with this round
        record.lost = not record.has_quorum(quorum)
        if record.lost:
            return replace(request.state, round=record.number, metrics={})
        return after if after.round == record.number else replace(after, round=record.number)

    def _updates(self, request: RoundRequest, record: RoundRecord) -> Generator[ClientUpdate, None, None]:
        """What the round's clients sent; the outcome of each is written down.

        Updates whose losses nothing is known to compare with are kept until all are there: those of the first round.
        """
        replies, held = self.pool.train(request), list[ClientUpdate]()
        try:
            for reply in replies:
                if isinstance(reply, PartialAggregate):
                    record.add_partial(reply)
                    yield from reply.updates
                    continue
                record.add(reply)
                if reply.failure is None:
                    self.callbacks.reply(record.number, reply.client_id, True, "")
                elif reply.failure.why:  # a simulated device that drops out says nothing
                    self.callbacks.reply(record.number, reply.client_id, False, reply.failure.why)
                if reply.update is None:
                    continue
                if START_LOSS in reply.update.facts and request.expected.median_loss is None:
                    held.append(reply.update)
                else:
                    yield reply.update
        except Exception as error:  # of the pool or of a callback, and no fault of the rule
            self._interrupted = error
            raise
        finally:
            replies.close()
        if held:
            yield from self._bounded(held, record)

    def _bounded(self, updates: Sequence[ClientUpdate], record: RoundRecord) -> Generator[ClientUpdate, None, None]:
        """Updates of the first round, with losses that count no more than that round's own allow."""
        most = largest_loss(median_loss([{"clients": record.clients}]))
        if len(updates) < FEWEST and not self._said_unchecked:
            self._said_unchecked = True
            self.callbacks.message(
                f"round {record.number}: fewer than {FEWEST} clients report a loss before training: nothing is known "
                "to compare it with, and it counts as it is"
            )
        for update in updates:
            row = record.clients[update.client_id]
            if row[START_LOSS] > most:
                row[COUNTED_LOSS] = most
                update = replace(update, facts={**update.facts, START_LOSS: most + SMALLEST_LOSS})
            yield update

    def _require_progress(self, record: RoundRecord) -> None:
        """Raise `RoundError` after too many rounds without a quorum in a row, and after such a last round."""
        server = self.config.server
        if not record.failed(server.quorum):
            self._failed_rounds = 0
            return
        self._failed_rounds += 1
        cure = f"cure the clients, then: fedlora run --resume {self.where}"
        error = record.no_quorum(server.quorum, server.deadline_s, cure)
        if self._failed_rounds > server.max_failed_rounds or record.number == self.config.rounds:
            raise error
        self.callbacks.message(f"{error.args[0]}; going on with round {record.number + 1}")

    # ------------------------------------------------------------------------------------------------ clients

    def _require_servable(self, state: GlobalState) -> None:
        """Leave clients out that ask for what the rule cannot serve; what the run's config says is the run's to cure.

        Raises:
            RoundError: no client is left.
        """
        usual = [k for k, info in self.clients.items() if info.rank is None][:1]
        for client_id, info in list(self.clients.items()):
            if info.rank is not None:
                try:
                    plans = [self._planner.plan(state, self.clients[k]) for k in (*usual, client_id)]
                    if self.config.client_privacy is not None:
                        require_one_start(plans)
                except FedloraError as error:
                    self._leave_out(client_id, f"its own config asks for rank {info.rank}: {error}")
        if not self.clients:
            raise nobody(self.pool.left_out)
        plans_of_all = (self._planner.plan(state, info) for info in self.clients.values())
        require_servable(self.config, self.workspace, plans_of_all, self.clients)

    def _is_servable(self, state: GlobalState, info: ClientInfo, first: int) -> bool:
        """Whether rule and privacy can serve a client that came later; it is left out otherwise."""
        try:
            plan = self._planner.plan(state, info)
            if self.config.client_privacy is not None:
                require_one_start([self._planner.plan(state, self.clients[first]), plan])
            if self.config.example_privacy is not None:
                private_settings(self.config, info.client_id)
        except FedloraError as error:
            self._leave_out(info.client_id, str(error))
            return False
        return True

    def _leave_out(self, client_id: int, why: str) -> None:
        self.pool.leave_out(client_id, why)
        self.clients = {k: info for k, info in self.clients.items() if k != client_id}

    # ------------------------------------------------------------------------------------------------ figures

    def _line(self, before: GlobalState, after: GlobalState, record: RoundRecord) -> dict[str, Any]:
        """The round's line of metrics, but for evaluation and times."""
        self._say_doubts(record)
        here = median_change([{"clients": record.clients}])
        self._median_change = self._median_change if here is None else here
        losses = median_loss([{"clients": record.clients}])
        self._median_loss = self._median_loss if losses is None else max(losses, self._median_loss or 0.0)
        left_out = self.pool.left_out
        line: dict[str, Any] = {
            "round": record.number,
            "train_loss": record.mean("loss"),
            **record.outcome(),
            **record.simulated(self._devices),
            "rule": dict(after.metrics),
            **({"turned_away": dict(left_out)} if left_out else {}),
        }
        if self._planner.measures_error and not record.lost:
            # Under [privacy] the updates are noised already: what is computed from them gives nothing away.
            line["aggregation_error"] = self._aggregation_error(before, after, record)
        return line | self.account.settle(line, record.spent)

    def _say_doubts(self, record: RoundRecord) -> None:
        record.doubt()
        for client_id in record.doubted:
            said = f"client {client_id} reports a loss far from all others'"
            self.callbacks.message(f"round {record.number}: {said}: it is left out of the mean")
        for client_id, row in record.clients.items():
            if "weight" in row and client_id not in self._capped:
                self._capped.add(client_id)
                self.callbacks.message(
                    f"client {client_id} says it has {row['num_examples']:.0f} examples and counts as "
                    f"{row['weight']:.0f}: if it is so, raise server.max_weight_ratio"
                )
            if COUNTED_LOSS in row and client_id not in self._cut:
                self._cut.add(client_id)
                self.callbacks.message(
                    f"client {client_id} reports a loss of {row[START_LOSS]:g} before training, which counts as "
                    f"{row[COUNTED_LOSS]:g}: ten times the largest median of the clients in a round"
                )

    def _aggregation_error(self, before: GlobalState, after: GlobalState, record: RoundRecord) -> float:
        change = broadcast_change(before, after)
        if Claim.CHANGES_BASE not in self.rule.claims:
            # What the base gave up at the start belongs to both sides: they are changes of the pristine base.
            for update in before.base_updates:
                change.add(update.change.pairs)
                record.ideal.add(update.change.pairs, record.weight)
        return relative_error(change, record.ideal, record.weight)

    def _evaluate(self, state: GlobalState, *, lost: bool = False) -> Mapping[str, Any]:
        request = RoundRequest(state.round, (), state, dict(self._digests), kept_rounds=dict(self._kept_rounds))
        return self._evaluator.measure(request, self.clients, lambda seen: self._in_full(state, {**seen, "lost": lost}))

    def _in_full(self, state: GlobalState, validation: Mapping[str, Any]) -> bool:
        """Whether a round's model is the first or last of the run, or one that may be kept."""
        if state.round in (0, self.config.rounds):
            return True
        ahead = copy(self._selection)  # as it will be after this round
        return ahead is not None and (ahead.see({"round": state.round, **validation}) or ahead.stopped is not None)


def _require_finite(state: GlobalState, number: int) -> None:
    tensors = {**state.adapter.tensors()}
    for update in state.base_updates[-1:]:
        tensors.update(update.change.tensors())
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RoundError(
                f"round {number}: the aggregated {name!r} is not finite, though every reply was: "
                "set server.max_norm to refuse replies that are far too large",
                code="state-not-finite",
            )
