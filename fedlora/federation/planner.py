"""From the global state to what one client is asked: the rule's plan, cut to what the client does not hold yet."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import final

from torch import Tensor

from fedlora.aggregators import Aggregator, Claim, ClientPlan, ClientSpec, GlobalState, on_current_base
from fedlora.config import RunConfig
from fedlora.federation.client_pool import ClientInfo, ClientReply, Failure, RoundRequest
from fedlora.federation.last_result import LastResult, same_tensors
from fedlora.federation.plausibility import START_LOSS
from fedlora.federation.protocol import KEPT, PartDigests, TrainRequest, tensors_by_part
from fedlora.federation.simulated_devices import SimulatedDevices, examples_to_tell
from fedlora.hash_chain import START
from fedlora.training.workspace import Workspace
from fedlora.wire_formats import as_sent

but_tensors = operator.attrgetter(*({field.name for field in fields(ClientPlan)} - {"adapter", "base_updates", "tilt"}))
"""All of a plan but its tensors."""


@dataclass
class Held:
    """What a client holds from earlier rounds, as far as is known.

    Args:
        digests: Of the parts of the adapter that it was sent last.
        base_version: Of the base, with its digest.
        base_digest: See `base_version`.
        ledger: Head of its ledger when it was last seen; see `fedlora.federation.protocol.TrainRequest`.
    """

    digests: frozenset[str] = frozenset()
    base_version: int = 0
    base_digest: str = ""
    ledger: str = START

    def forget(self) -> None:
        """The client turned out to hold nothing."""
        self.digests, self.base_version, self.base_digest = frozenset(), 0, ""

    def receive(self, request: TrainRequest) -> None:
        """The client holds now what it was sent."""
        self.digests = frozenset(request.digests.values())
        self.base_version, self.base_digest = request.plan.base_version, request.base_digest


def shared_plans() -> LastResult[ClientPlan, ClientPlan]:
    """A function that returns the plan it was given last in the place of one that asks the same with the very same
    tensors, as most plans of a round do: what follows from a plan is then worked out once."""
    return LastResult(lambda plan: plan, _same)


def _same(one: ClientPlan, other: ClientPlan) -> bool:
    """Whether two plans ask the same, with the very same tensors."""
    if one.adapter is not other.adapter or one.tilt or other.tilt or len(one.base_updates) != len(other.base_updates):
        return False
    return all(map(operator.is_, one.base_updates, other.base_updates)) and but_tensors(one) == but_tensors(other)


@final
class Planner:
    """Plans for the clients of a run.

    Args:
        config: Of the run.
        rule: That plans.
        workspace: With the base model and, for simulated devices, the partition.
        run: Id of the run's directory.
    """

    def __init__(self, config: RunConfig, rule: Aggregator, workspace: Workspace, run: str = "") -> None:
        self._config, self._rule, self._workspace, self._run = config, rule, workspace, run
        self._devices = SimulatedDevices.of(config)
        self._shared, self._digests = shared_plans(), PartDigests()
        self._sizes = LastResult[ClientPlan, dict[tuple[object, ...], int]](lambda _: {})
        self._rounded = LastResult(self._as_sent, same_tensors)

    @property
    def measures_error(self) -> bool:
        """Whether the aggregation error is measured: the ideal update D* is known where weights change by s B A, and
        where what a client trains is sent."""
        known = self._workspace.base.method.bilinear and Claim.PERSONAL not in self._rule.claims
        return self._config.server.aggregation_error and known

    def plan(self, state: GlobalState, client: ClientInfo, base_version: int = 0) -> ClientPlan:
        """What the rule asks of a client that holds some version of the base.

        Raises:
            RuleError: the rule cannot serve the client.
        """
        layout = self._workspace.base.layout(client.rank or self._config.clients.rank_of(client.client_id))
        return plan_for(self._rule, state, ClientSpec(client.client_id, layout, base_version))

    def request(self, asked: RoundRequest, client: ClientInfo, held: Held) -> TrainRequest:
        """What a client is asked in a round."""
        return self._sent(asked, client, held, self.plan(asked.state, client, held.base_version))

    def _sent(self, asked: RoundRequest, client: ClientInfo, held: Held, plan: ClientPlan) -> TrainRequest:
        """A plan as it is sent."""
        since = held.base_digest if plan.base_updates and plan.base_updates[0].since == held.base_version else ""
        if not plan.base_updates:
            since = asked.base_digest
        wire, exact = self._config.wire, None
        down = wire.down if asked.of_run else "float32"  # an adapter from elsewhere is measured as it is
        if down != "float32":
            travels = {name: value for part in tensors_by_part(plan).values() for name, value in part.items()}
            exact, plan = plan.adapter, replace(plan, adapter=plan.adapter.with_tensors(self._rounded(travels)))
        plan = self._shared(plan)
        private, digests = self._config.example_privacy is not None, self._digests(plan)
        keeps = KEPT in digests or self._config.clients_keep
        return TrainRequest(
            plan,
            asked.number,
            client.client_id,
            asked.base_digest,
            since,
            wire=wire.up,
            fraction=wire.fraction,
            run=self._run,
            ledger=held.ledger if private else "",
            kept_round=asked.kept_rounds.get(client.client_id, 0) if keeps else 0,
            down=down,
            exact=exact,
            digests=digests,
            held=frozenset(part for part, digest in digests.items() if digest in held.digests),
        )

    def _as_sent(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: as_sent(self._config.wire.down, value) for name, value in tensors.items()}

    def _nbytes(self, request: TrainRequest) -> int:
        """Bytes of a request, counted once for those of one plan that differ in nothing that makes a head longer."""
        said = request.round, request.base_digest, request.since_digest, request.kept_round, request.down, request.held
        key = (*said, len(str(request.client_id)), len(request.ledger))
        sizes = self._sizes(request.plan)
        if key not in sizes:
            sizes[key] = request.nbytes
        return sizes[key]

    def evaluation(self, asked: RoundRequest, client: ClientInfo, held: Held) -> TrainRequest:
        """What a client is sent to measure a state: the plan of one that trains, with the global adapter; it
        answers with sums."""
        if not asked.of_run:
            plan = ClientPlan(asked.state.adapter, frozenset(), frozenset())
            return self._sent(asked, client, held, on_current_base(plan, asked.state, held.base_version))
        plan = self.plan(asked.state, client, held.base_version)
        plan = replace(plan, adapter=asked.state.adapter, fresh_seed=None, tilt={}, asks=frozenset(), first=frozenset())
        return self._sent(asked, client, held, plan)

    def outcome(self, request: TrainRequest) -> ClientReply:
        """What is known of the outcome before a client is asked: the bytes, and what its simulated device makes of it.

        With a failure it is not asked.
        """
        reply = ClientReply(request.client_id, bytes_down=self._nbytes(request))
        if not self._devices.simulated:
            return reply
        seconds = self._devices.seconds(
            request.client_id,
            bytes_down=reply.bytes_down,
            examples=self._examples_to_compute(request),
            bytes_up=request.reply_nbytes,
        )
        reply = replace(reply, simulated_s=seconds)
        if self._devices.drops_out(request.round, request.client_id):
            return reply.failed(Failure("dropped"))
        return reply.failed(Failure("late")) if self._devices.too_late(seconds) else reply

    def _examples_to_compute(self, request: TrainRequest) -> int:
        """How many examples a client trains on in a round, all its models and phases together; those that it only
        measures count a third, as a forward pass takes of a training step."""
        plan, client_id = request.plan, request.client_id
        models = 1 if self._config.train.personal is None else 2
        first_phase = plan.first_times if plan.first else 0
        trained = examples_to_tell(self._workspace, client_id) * (models + first_phase)
        measured = len(self._workspace.data.clients[client_id]) if START_LOSS in plan.asks else 0
        return trained + measured // 3


def plan_for(rule: Aggregator, state: GlobalState, client: ClientSpec) -> ClientPlan:
    """The rule's plan; a rule that leaves the base alone need not know that its method did not."""
    plan = rule.plan(state, client)
    if Claim.CHANGES_BASE in rule.claims or not state.base_updates:
        return plan
    return on_current_base(plan, state, client.base_version)
