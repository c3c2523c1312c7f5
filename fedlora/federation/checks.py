"""What is refused before a round is trained: a rule, a privacy, a number of clients that cannot be served."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import chain

import numpy as np

from fedlora.aggregators import Aggregator, Claim, ClientPlan, ClientSpec
from fedlora.config import RunConfig
from fedlora.data.own import brought_by_nodes
from fedlora.errors import ConfigError, PrivacyError, RoundError
from fedlora.federation.given_adapter import read_start
from fedlora.federation.initial_state import first_state
from fedlora.federation.load_rule import load_rule, require_cohort, require_one_start
from fedlora.federation.planner import plan_for
from fedlora.federation.plausibility import START_LOSS
from fedlora.training.cohort import why_alone
from fedlora.training.dp_check import check_model
from fedlora.training.dp_settings import private_settings
from fedlora.training.fits import require_fit_of_any
from fedlora.training.job import TrainJob, number_of_steps
from fedlora.training.own_loop import load_loop, require_plain_plan
from fedlora.training.stacked_lora import cannot_stack
from fedlora.training.workspace import Workspace


def refuse_early(config: RunConfig, workspace: Workspace, *, begun: bool = False) -> None:
    """Raise for a config whose rule cannot serve its clients, before a run directory is made or an old one removed.

    Args:
        config: of the run.
        workspace: opened for it.
        begun: whether the run goes on from a state that it saved, and needs no `adapter.start` any more.

    Raises:
        ConfigError: the rule or one of its fields is unknown or wrong, or the data are the nodes' own.
        RuleError: the rule refuses a client's rank.
        RoundError: more clients are asked for than there are.
        PrivacyError: a private run would not be private with this model or task, or within this epsilon.
        ModelError: see `fedlora.federation.given_adapter.read_start`.
        RunDirError: see there.
    """
    if brought_by_nodes(config):
        raise ConfigError(
            "the nodes bring their own data, of which nothing is here: start the run with flwr run, or simulate it "
            "with data.source and a partition",
            code="nodes-bring-data",
        )
    rule = load_rule(config)
    state = first_state(rule, workspace.base, config.seed, None if begun else read_start(workspace))
    clients = range(len(workspace.data.clients))
    plans = (
        plan_for(rule, state, ClientSpec(client_id, workspace.base.layout(config.clients.rank_of(client_id))))
        for client_id in clients
    )
    require_servable(config, workspace, plans, clients)
    clients_wanted(config, len(clients))
    _require_effect(config, workspace, rule)


def _require_effect(config: RunConfig, workspace: Workspace, rule: Aggregator) -> None:
    """Refuse keys that could be told to be in vain only now that rule, method and data are known."""
    if config.adapter.export_rank is not None and not (
        Claim.CHANGES_BASE in rule.claims or workspace.base.method.whole_rank
    ):
        raise ConfigError(
            f"adapter.export_rank is for rules that change the base, and {config.strategy.name!r} exports the adapter "
            "as it is: remove it",
            code="export-rank-not-used",
        )
    if config.train.loop is not None:
        load_loop(config.train)
    if not config.train.warmup_steps:
        return
    if config.example_privacy is not None:
        steps = [private_settings(config, k).schedule.steps for k in range(len(workspace.data.clients))]
    else:
        steps = [number_of_steps(len(rows), config.train_of(k)) for k, rows in enumerate(workspace.data.clients)]
    if config.train.warmup_steps >= max(steps):
        raise ConfigError(
            f"train.warmup_steps = {config.train.warmup_steps} lasts for all of a round, whose longest training has "
            f"{max(steps)} steps, so that train.lr is never reached: lower it below {max(steps)}, or train longer",
            code="warmup-too-long",
        )


def require_servable(
    config: RunConfig, workspace: Workspace, plans: Iterator[ClientPlan], clients: Collection[int]
) -> None:
    """Raise for clients whom rule or privacy cannot serve, before anything is trained.

    Args:
        config: of the run.
        workspace: the server's.
        plans: of the clients; looked at one by one and not kept, since a rule may draw each client its own adapter.
        clients: their numbers, at least one.
    """
    first = next(plans)
    if config.client_privacy is not None:
        require_one_start(chain([first], plans))
        require_cohort(config.client_privacy, len(clients), clients_wanted(config, len(clients)))
    for plan in chain([first], plans):
        _require_steps_as_planned(config, plan)
        _require_cores_trained(config, workspace, plan)
        if config.train.personal is not None and plan.adapter.layout != workspace.base.layout():
            raise ConfigError(
                "train.personal: clients' own models are measured and exported in the shared one's rank, adapter.rank, "
                "and a client has another: remove clients.ranks and the ranks of clients.profiles, or train.personal",
                code="personal-mixed-ranks",
            )
        require_plain_plan(config.train, plan.proximal_mu)
        if START_LOSS in plan.asks and workspace.task.refers:
            raise ConfigError(
                f"{config.strategy.name!r} goes by clients' losses before training, and this task's loss compares a "
                "model with the one that the round starts from, which are the same then: choose another rule, or a "
                "loss without a reference, as the preference task's loss_type = 'orpo' is",
                code="relative-loss",
            )
    if config.example_privacy is not None:
        _require_private(config, workspace, first, clients)


def _require_steps_as_planned(config: RunConfig, plan: ClientPlan) -> None:
    """Raise `ConfigError` where [train] would make other steps than those that a plan is about."""
    train, rule = config.train, config.strategy.name
    if "rates" in plan.asks:
        if config.wire.up == "topk":
            raise ConfigError(
                f"{rule!r} takes what a client sends for its whole change, which it is not with wire.up = 'topk': "
                "remove it, or set strategy.name = 'feddyn'",
                code="no-plain-steps",
            )
        if brought_by_nodes(config) and train.steps is None and config.server.weighting != "examples":
            raise ConfigError(
                f"{rule!r} needs to know how many steps a client makes, and with train.epochs a node with its own data "
                f"would say so itself at no cost under server.weighting = {config.server.weighting!r}: set train.steps",
                code="no-plain-steps",
            )
        others = {
            f"loop = {train.loop!r}": train.loop is not None,
            "optimizer = 'adamw'": train.optimizer != "sgd",
            f"momentum = {train.momentum:g}": train.momentum,
            f"clip_norm = {train.clip_norm}": train.clip_norm is not None,
            f"proximal_mu = {train.proximal_mu:g}": train.proximal_mu,
        }
        for key in (key for key, there in others.items() if there):
            raise ConfigError(
                f"{rule!r} takes a client's change for the sum of its gradients times the learning rates, which it "
                f"is not with train.{key}: let fedlora's loop train with train.optimizer = 'sgd', without momentum, "
                "clip_norm and proximal_mu; strategy 'feddyn' goes with AdamW too",
                code="no-plain-steps",
            )
    if plan.first and train.keep_optimizer:
        raise ConfigError(
            f"with {rule!r} a client trains {' and '.join(sorted(plan.first))} first and then the rest, each with an "
            "optimiser of its own: remove train.keep_optimizer",
            code="two-optimizers",
        )
    if plan.proximal_mu and train.proximal_mu:
        raise ConfigError(
            f"{rule!r} sets the weight of the proximal term itself, to {plan.proximal_mu:g}: remove train.proximal_mu",
            code="proximal-term-twice",
        )


def _require_cores_trained(config: RunConfig, workspace: Workspace, plan: ClientPlan) -> None:
    """Raise `ConfigError` where nothing here trains what lies between two factors (`LoraPair.core`)."""
    if not plan.adapter.tensors(("R",)):
        return
    why = cannot_stack(workspace.base)
    if config.example_privacy is not None:
        why = why_alone(workspace.base)
    if config.train.loop is not None:
        why = "train.loop is given PEFT's layers, which have none"
    if why is not None:
        raise ConfigError(
            f"{config.strategy.name!r} trains cores between frozen factors, which is done in layers for many clients "
            f"alone: {why}; choose a rule that trains factors, such as 'ffa'",
            code="core-not-trained",
        )


def _require_private(config: RunConfig, workspace: Workspace, plan: ClientPlan, clients: Iterable[int]) -> None:
    """Calibrate every client's noise, and look at the model on two of the server's own test examples."""
    if plan.first:
        raise PrivacyError(
            f"with {config.strategy.name!r} a client trains in two phases, and the noise is reckoned for one: choose "
            "'fedper', or remove [privacy]",
            code="phases-not-private",
        )
    if START_LOSS in plan.asks:
        raise PrivacyError(
            f"{config.strategy.name!r} asks each client for the loss on its examples, which would leave it without "
            "noise: choose a rule that goes by what clients send alone, such as fedavg, or remove [privacy]",
            code="fact-not-private",
        )
    require_fit_of_any(config, workspace.base, workspace.task)
    for client_id in clients:
        private_settings(config, client_id)
    job = TrainJob(plan.adapter, frozenset(plan.trains), np.empty(0, np.int64), 0)
    check_model(workspace.base, workspace.task, workspace.data.probes, job)


def clients_wanted(config: RunConfig, there: int) -> int:
    """How many clients a round asks.

    Raises:
        RoundError: if the config wants more than are there.
    """
    wanted = config.server.clients_per_round or max(1, round(config.server.fraction * there))
    if wanted > there:
        raise RoundError(
            f"server.clients_per_round = {wanted}, but only {there} clients are there: lower it", code="too-few-clients"
        )
    return wanted
