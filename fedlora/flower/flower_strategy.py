"""An aggregation rule as a Flower `Strategy`, for ServerApps of your own that exchange plain PEFT tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedlora.adapter import ALL_PARTS, AdapterState
from fedlora.aggregators import Aggregator, Claim, ClientPlan, ClientSpec, ClientUpdate, GlobalState, load_aggregator
from fedlora.config import RunConfig
from fedlora.errors import ReplyError, RuleError
from fedlora.federation.plausibility import START_LOSS
from fedlora.flower.peft_records import PeftNames, record_of, tensors_of
from fedlora.model.export import peft_name
from fedlora.sanitize import clean_text

TRAINS = "fedlora-trains"
"""Key of a train message's config: the parts that the rule lets a client train, as "A,B,dense"."""


class FedLoraStrategy(FedAvg):
    """An aggregation rule of fedlora behind Flower's own strategy interface.

    Sampling, evaluation and metrics are those of Flower's `FedAvg`, whose arguments it takes; what differs is how the
    adapters of a round become one. Messages hold what Flower's tutorials send: an ArrayRecord of PEFT's tensors under
    "arrays", and "num-examples" in the reply's metrics. All clients have one rank, and no message is larger than the
    adapter: a rule that changes the base (FLoRA) needs fedlora's own ServerApp.

    Args:
        rule: A rule's name, such as "fair", or an `Aggregator`.
        alpha: LoRA's alpha, as the clients have it: dW = (alpha / r) B A.
        use_rslora: Whether the scale is alpha / sqrt(r).
        seed: Seed of the rule's own random draws.
        options: Further arguments of Flower's `FedAvg`: fraction_train, min_train_nodes, weighted_by_key, ...

    Raises:
        RuleError: the rule changes the base.
        ConfigError: there is no rule of that name.
    """

    def __init__(
        self, rule: Aggregator | str, *, alpha: float, use_rslora: bool = False, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.rule = load_aggregator(rule, {}) if isinstance(rule, str) else rule
        if Claim.CHANGES_BASE in self.rule.claims:
            raise RuleError(
                f"{type(self.rule).__name__} changes the base model, which plain PEFT tensors cannot carry: run it by "
                "fedlora's own ServerApp (flwr run, or fedlora run), or choose a rule that leaves the base alone",
                code="changes-base",
            )
        if Claim.PERSONAL in self.rule.claims:
            raise RuleError(
                f"the clients of {type(self.rule).__name__} keep parts of what they train, and those of other "
                "strategies send everything: run it by fedlora's own ServerApp (flwr run, or fedlora run)",
                code="personal-rule",
            )
        self._alpha, self._use_rslora, self._seed = alpha, use_rslora, seed
        self._names: PeftNames | None = None
        self._state: GlobalState | None = None

    def summary(self) -> None:
        """Log the rule and Flower's own settings."""
        log(INFO, "\t├──> Rule: %s (%s)", type(self.rule).__name__, self.rule.paper or "no paper")
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round: the rule's plan as plain arrays, and the parts that it lets clients train."""
        if self._state is None:
            tensors = tensors_of(arrays)
            self._names = PeftNames.of(tensors)
            self._state = self.rule.init(self._names.read(arrays, self._scales(tensors)), seed=self._seed)
        assert self._names is not None
        plan = self._plan(self._state)
        config[TRAINS] = ",".join(sorted(plan.trains))
        return list(super().configure_train(server_round, self._names.write(plan.adapter), config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The rule's next global adapter, and the mean of the clients' metrics; what does not fit is left out."""
        assert self._names is not None, "configure_train comes first"
        assert self._state is not None
        found, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        found.sort(key=lambda message: message.metadata.src_node_id)
        plan = self._plan(self._state)
        good: list[Message] = []
        updates: list[ClientUpdate] = []
        for message in found:
            try:
                updates.append(self._update(message, plan))
                good.append(message)
            except ReplyError as error:
                node = message.metadata.src_node_id
                log(WARNING, "round %s: node %s left out: %s", server_round, node, clean_text(error))
        if not good:
            return None, None
        self._state = self.rule.aggregate(self._state, updates)
        metrics = self.train_metrics_aggr_fn([message.content for message in good], self.weighted_by_key)
        return self._names.write(self._state.adapter), metrics

    def _plan(self, state: GlobalState) -> ClientPlan:
        plan = self.rule.plan(state, ClientSpec(0, state.adapter.layout))
        if START_LOSS in plan.asks:
            raise RuleError(
                f"{type(self.rule).__name__} asks each client for its loss before training, which other clients than "
                "fedlora's do not report: run it by fedlora's own ServerApp (flwr run, or fedlora run)",
                code="loss-not-reported",
            )
        if plan.asks:
            raise RuleError(
                f"{type(self.rule).__name__} has a plan for each client, and elsewhere all clients get the same: "
                "run it by fedlora's own ServerApp (flwr run, or fedlora run)",
                code="plans-differ",
            )
        if plan.adapter.tensors(("R",)):
            raise RuleError(
                f"{type(self.rule).__name__} trains cores between A and B, which PEFT's tensors do not have: run it by "
                "fedlora's own ServerApp (flwr run, or fedlora run)",
                code="core-elsewhere",
            )
        return plan

    def _update(self, message: Message, plan: ClientPlan) -> ClientUpdate:
        """A reply as the rule takes it.

        Raises:
            ReplyError: it does not fit.
        """
        assert self._names is not None
        content = message.content
        if len(content.array_records) != 1 or len(content.metric_records) != 1:
            raise ReplyError("a reply holds one ArrayRecord and one MetricRecord", code="unexpected-records")
        scales = {name: pair.scale for name, pair in plan.adapter.pairs.items()}
        adapter = self._names.read(next(iter(content.array_records.values())), scales)
        frozen = ALL_PARTS - plan.sends
        kept = plan.adapter.tensors(frozen)
        if moved := [name for name, value in adapter.tensors(frozen).items() if not torch.equal(value, kept[name])]:
            raise ReplyError(
                f"it trained {peft_name(moved[0])!r}, which {type(self.rule).__name__} freezes: train the parts that "
                f"the message's config names under {TRAINS!r}",
                code="frozen-part-trained",
            )
        weight = next(iter(content.metric_records.values())).get(self.weighted_by_key)
        if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight <= 0:
            raise ReplyError(f"its metrics hold no positive {self.weighted_by_key!r}", code="invalid-weight")
        return ClientUpdate(message.metadata.src_node_id, adapter, float(weight))

    def _scales(self, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        assert self._names is not None
        ranks = {
            own.removesuffix(":A"): tensors[name].shape[0] for name, own in self._names.own.items() if own[-2:] == ":A"
        }
        return {module: self._alpha / (rank**0.5 if self._use_rslora else rank) for module, rank in ranks.items()}


def initial_arrays(config: RunConfig) -> ArrayRecord:
    """The initial adapter of a config as plain PEFT tensors: what a strategy starts with."""
    from fedlora.federation.given_adapter import read_start
    from fedlora.training import open_workspace

    workspace = open_workspace(config)
    start = read_start(workspace)
    adapter = workspace.base.initial_adapter(config.seed) if start is None else start.adapter
    return record_of({peft_name(name): value for name, value in adapter.tensors().items()})


def evaluate_fn(config: RunConfig) -> Callable[[int, ArrayRecord], MetricRecord]:
    """An `evaluate_fn` for `Strategy.start`: the figures of a config's test examples."""
    from fedlora.training import evaluate, open_workspace

    def measure(_round: int, arrays: ArrayRecord) -> MetricRecord:
        workspace = open_workspace(config)
        workspace.base.write(adapter_for(workspace.base.initial_adapter(config.seed), arrays))
        figures = evaluate(workspace.base, workspace.task, workspace.data.require_test()).overall
        return MetricRecord({name: float(value) for name, value in figures.items()})

    return measure


def adapter_for(like: AdapterState, arrays: ArrayRecord) -> AdapterState:
    """The adapter in a record of PEFT's tensors, in the layout of another.

    Raises:
        ReplyError: it does not fit.
    """
    wanted = like.tensors()
    names = PeftNames.of(tensors_of(arrays))
    by_own = {own: name for name, own in names.own.items()}
    if odd := by_own.keys() ^ wanted.keys():
        side = "unknown here" if min(odd) in by_own else "not in the record"
        raise ReplyError(f"the record is not for this model: {peft_name(min(odd))!r} is {side}", code="other-model")
    expected = PeftNames(
        names.own,
        {by_own[own]: value.shape for own, value in wanted.items()},
        {by_own[own]: value.dtype for own, value in wanted.items()},
    )
    return expected.read(arrays, {name: pair.scale for name, pair in like.pairs.items()})
