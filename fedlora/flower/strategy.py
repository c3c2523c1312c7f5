"""The server's loop over rounds: ask, fold in, drop; on any grid.

Updates are folded into the rule one at a time, as they come. A round goes on without the replies that are missing at
its deadline, if the quorum is there.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from flwr.serverapp import Grid

from fedlora.adapter import relative_error
from fedlora.aggregators import Aggregator, Claim, ClientPlan, ClientUpdate, GlobalState, broadcast_change
from fedlora.config import RunConfig
from fedlora.errors import FedloraError, PoolError, PrivacyError, RoundError
from fedlora.federation.generations import write_samples
from fedlora.federation.initial_state import first_state
from fedlora.federation.load_rule import require_one_start
from fedlora.federation.plausibility import median_change
from fedlora.federation.round_record import Round, quorum_of
from fedlora.federation.simulated_devices import SimulatedDevices
from fedlora.flower.asking import Asker
from fedlora.flower.crew import WorkerPool
from fedlora.flower.following import chain_digest, next_digest, show
from fedlora.flower.identities import Bindings, Identity
from fedlora.flower.local_grid import raise_unexpected
from fedlora.flower.node_registry import Node, NodeRegistry
from fedlora.flower.servable import clients_wanted, require_servable
from fedlora.flower.server_ledger import ServerLedger
from fedlora.flower.spending import Spending
from fedlora.privacy.server_dp import ServerDP
from fedlora.progress import Progress
from fedlora.rng import derive
from fedlora.runs.outcomes import write_outcomes
from fedlora.runs.rundir import RunDir
from fedlora.training.dp_settings import private_settings
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import Workspace

NODES_FILE = "nodes.json"
"""In a run's folder: which node is which client, by its key."""


class Federation:
    """One run on a grid.

    Args:
        grid: in-process, Ray or a SuperLink.
        config: of the run.
        rule: that combines the updates.
        workspace: the server's model, task and test data.
        rundir: where metrics and checkpoints go.
        progress: is told what happens.
        spending: of a private run: what is known of the clients' ledgers.
        crew: the processes that ask clients, each its share; None: this one does.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        rule: Aggregator,
        workspace: Workspace,
        rundir: RunDir,
        progress: Progress,
        spending: Spending | None = None,
        crew: WorkerPool | None = None,
    ) -> None:
        self.grid, self.config, self.rule, self.workspace = grid, config, rule, workspace
        self.rundir, self.progress = rundir, progress
        run = "" if config.example_privacy is None else rundir.run_id
        self.asker, self.crew = Asker(grid, config, rule, workspace, progress, run=run), crew
        known = {int(k): Identity(**row) for k, row in (rundir.read_json(NODES_FILE) or {}).items()}
        bindings = Bindings(config.server.nodes, known, self._remember)
        everybody, fingerprint = len(workspace.data.clients), workspace.base.fingerprint
        self.registry = NodeRegistry(self.asker.mail, config, everybody, fingerprint, progress, bindings)
        self.base_digest = ""
        self._digests = {0: ""}
        self.devices = SimulatedDevices.of(config)
        self.spending = spending or (None if config.example_privacy is None else Spending(config, rundir))
        self.account = ServerLedger(config, rule, rundir) if isinstance(rule, ServerDP) else None
        if (config.client_privacy is None) != (self.account is None):
            raise PrivacyError("privacy.unit = 'client' needs the rule that load_rule makes of the config, no other")
        self.spent: set[int] = set()
        self._failed = 0
        self._median_change: float | None = None
        self._told: set[int] = set()

    @property
    def nodes(self) -> dict[int, Node]:
        """The nodes that take part, by the number of their client."""
        return self.registry.nodes

    # ------------------------------------------------------------------------------------------------ the run

    def run(self, state: GlobalState | None) -> GlobalState:
        """All rounds that are left.

        Args:
            state: of the last checkpoint, or None to start.

        Returns:
            The state after the last round.
        """
        self.registry.begin()
        raise_unexpected(self.grid)
        fresh = state is None
        if state is None:
            state = first_state(self.rule, self.workspace.base, self.config.seed)
        known = self.spending.base_of(state) if self.spending else None
        self.base_digest = chain_digest("", state.base_updates) if known is None else known
        self._digests |= {state.base_version: self.base_digest}
        self._median_change = median_change(self.rundir.read_metrics())
        self._set_aside(state)
        plans = (self._plan(state, client_id) for client_id in self.nodes)
        require_servable(self.config, self.workspace, plans, self.nodes)
        if self.config.example_privacy is not None:
            before = self.rundir.read_metrics()
            self.spent = set(before[-1].get("spent", ())) if before else set()
        self.progress.started(self.config, len(self.nodes), self.config.rounds)
        if fresh:
            record = {"round": 0, **self._evaluate(state)}
            write_samples(self.rundir, self.workspace, "before")
            self.rundir.append_metrics(record)
            self.rundir.save_checkpoint(state)
            self.progress.round_ended(record)
        for number in range(state.round + 1, self.config.rounds + 1):
            with self.account.round(number) if self.account else nullcontext():
                state = self._round(state, number)
        self._show(state)
        write_samples(self.rundir, self.workspace, "after")
        return state

    def _round(self, state: GlobalState, number: int) -> GlobalState:
        self._gather(state, number)
        started = time.perf_counter()
        books = self._sample(number)
        self.progress.round_started(number, books.asked)
        if self.spending is not None:
            self.spending.ask(number, books.asked, state, self.base_digest)
        after = self._merge(state, books)
        _require_finite(after, number)
        record = self._record(state, after, books)
        self.base_digest = next_digest(self.base_digest, state, after)
        self._digests[after.base_version] = self.base_digest
        trained = time.perf_counter()
        if number % self.config.server.evaluate_every == 0 or number == self.config.rounds:
            record |= self._evaluate(after)
        ended = time.perf_counter()
        if self.config.privacy is None:  # how long clients take tells of their data
            record |= {"seconds": ended - started, "seconds_train": trained - started}
            record |= {"seconds_evaluate": ended - trained}
        self.rundir.append_metrics(record)
        self._end_if_failing(books)  # with its line written, and without a checkpoint: a resume repeats the round
        self.rundir.save_checkpoint(after)
        self.progress.round_ended(record)
        return after

    def _remember(self, known: Mapping[int, Identity]) -> None:
        self.rundir.write_json(NODES_FILE, {str(k): asdict(node) for k, node in sorted(known.items())})

    def _set_aside(self, state: GlobalState) -> None:
        """Leave out nodes whose own config the rule cannot serve; what the run's config says is the run's to cure.

        Raises:
            RoundError: no node is left.
        """
        usual = [client_id for client_id, node in self.nodes.items() if node.rank is None][:1]
        for client_id, node in list(self.nodes.items()):
            if node.rank is not None:
                try:
                    plans = [self._plan(state, k) for k in (*usual, client_id)]
                    if self.config.client_privacy is not None:
                        require_one_start(plans)
                except FedloraError as error:
                    self.registry.refuse(node.node_id, f"its own config asks for rank {node.rank}: {error}")
        if not self.nodes:
            raise self.registry.nobody()

    def _gather(self, state: GlobalState, number: int) -> None:
        """Let in who has come since the last round, unless the rule cannot serve it."""
        needed = quorum_of(clients_wanted(self.config, len(self.nodes)), self.config.server.quorum)
        for client_id in self.registry.gather(number, needed):
            try:
                plan = self._plan(state, client_id)
                if self.config.client_privacy is not None:
                    require_one_start([self._plan(state, min(self.nodes)), plan])
                if self.config.example_privacy is not None:
                    private_settings(self.config, client_id)
            except FedloraError as error:
                self.registry.refuse(self.nodes[client_id].node_id, str(error))
                continue
            self.progress.message(f"client {client_id} takes part from round {number} on")

    def _merge(self, state: GlobalState, books: Round) -> GlobalState:
        """The rule's next state; the old one, for the next round, if too few replies came."""
        quorum, updates = self.config.server.quorum, self._updates(state, books)
        try:
            after = self.rule.aggregate(state, updates)
        except FedloraError as error:
            if books.has_quorum(quorum) or isinstance(error, PoolError):
                raise
            after = state  # most likely the cause
        finally:
            updates.close()  # what is under way ends with this round
            self.spent.update(books.spent)
            raise_unexpected(self.grid)
        books.lost = not books.has_quorum(quorum)
        if books.lost:
            return replace(state, round=books.number, metrics={})
        return after if after.round == books.number else replace(after, round=books.number)

    def _updates(self, state: GlobalState, books: Round) -> Generator[ClientUpdate, None, None]:
        """What the round's clients sent, or of a rule that needs sums alone, sums of it."""
        if self.crew is None:
            yield from self.asker.updates(state, self.base_digest, books, self.registry)
        else:
            yield from self.crew.updates(state, self.base_digest, books, self.nodes, self.progress)

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

    def _plan(self, state: GlobalState, client_id: int) -> ClientPlan:
        return self.asker.plan(state, self.nodes[client_id])

    def _sample(self, number: int) -> Round:
        """Open a round's books: draw its clients from those that are there."""
        solvent = sorted(self.nodes.keys() - self.spent)
        if not solvent:
            raise RoundError(
                f"round {number}: the privacy budget of every client is spent: the state after round {number - 1} is "
                f"in {self.rundir.path}; for more, start a new run with a larger privacy.epsilon or fewer rounds"
            )
        there = [k for k in solvent if self.devices.available(number, k)]
        wanted = min(clients_wanted(self.config, len(self.nodes)), len(there))
        generator = np.random.default_rng(derive(self.config.seed, "sample", number))
        asked = sorted(int(k) for k in generator.choice(there, size=wanted, replace=False)) if there else []
        claims = {k: node.num_examples for k, node in self.nodes.items() if node.num_examples is not None}
        offline = sorted(set(solvent) - set(there))
        return Round(number, asked, offline=offline, median_change=self._median_change, claims=claims)

    # ------------------------------------------------------------------------------------------------ figures

    def _record(self, before: GlobalState, after: GlobalState, books: Round) -> dict[str, Any]:
        books.doubt()
        for client_id in books.doubted:
            said = f"client {client_id} reports a loss far from all others'"
            self.progress.message(f"round {books.number}: {said}: it is left out of the mean")
        for client_id, row in books.clients.items():
            if "weight" in row and client_id not in self._told:
                self._told.add(client_id)
                self.progress.message(
                    f"client {client_id} says it has {row['num_examples']} examples and counts as {row['weight']:.0f}: "
                    "if it is so, raise server.max_weight_ratio"
                )
        here = median_change([{"clients": books.clients}])
        self._median_change = self._median_change if here is None else here
        record: dict[str, Any] = {
            "round": books.number,
            "train_loss": books.mean("loss"),
            **books.outcome(),
            **books.simulated(self.devices),
            "rule": dict(after.metrics),
            **(
                {"turned_away": away} if (away := {str(n): why for n, why in self.registry.turned_away.items()}) else {}
            ),
        }
        if self.asker.measures_error and not books.lost:
            # Under [privacy] the updates are noised already: what is computed from them gives nothing away.
            record["aggregation_error"] = self._aggregation_error(before, after, books)
        if self.spending is not None:
            self.spending.settle(record)
            record |= {"spent": sorted(self.spent), "epsilon": self.spending.largest()}
        if self.account is not None:
            record |= self.account.settle(record)
        return record

    def _aggregation_error(self, before: GlobalState, after: GlobalState, books: Round) -> float:
        change = broadcast_change(before, after)
        if Claim.CHANGES_BASE not in self.rule.claims:
            # What the base gave up at the start belongs to both sides: they are changes of the pristine base.
            for base_update in before.base_updates:
                change.add(base_update.change.pairs)
                books.ideal.add(base_update.change.pairs, books.weight)
        return relative_error(change, books.ideal, books.weight)

    def _show(self, state: GlobalState) -> None:
        """Write the global model to the server's own base."""
        show(self.workspace.base, state, self.base_digest, self._digests)

    def _evaluate(self, state: GlobalState) -> Mapping[str, Any]:
        self._show(state)
        result = evaluate(
            self.workspace.base,
            self.workspace.task,
            self.workspace.data.test,
            domain_column=self.workspace.data.domain_column,
        )
        if state.round == self.config.rounds:
            write_outcomes(self.rundir.path, state.round, self.workspace.data.test_digest, result.measures)
        self.rundir.measured = frozenset(result.overall)
        return {**result.overall, "domains": dict(result.domains)}


def _require_finite(state: GlobalState, number: int) -> None:
    tensors = {**state.adapter.tensors()}
    for base_update in state.base_updates[-1:]:
        tensors.update(base_update.change.tensors())
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RoundError(
                f"round {number}: the merged {name!r} is not finite, though every reply was: "
                "set server.max_norm to refuse replies that are far too large"
            )
