"""User-level privacy from the config: the rule with clipping and noise around it, and what is refused early."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora.aggregators import Aggregator, Claim, ClientPlan, load_aggregator
from fedlora.config import ClientPrivacyConfig, RunConfig, WireConfig
from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy.server_dp import ServerDP
from fedlora.training.dp_settings import calibrated


def load_rule(config: RunConfig) -> Aggregator:
    """The run's rule; under user-level privacy inside `ServerDP`, with noise for all planned rounds.

    Raises:
        ConfigError: the rule or one of its fields is unknown or wrong, or the models that it makes are not measured.
        PrivacyError: it does not claim LINEAR, or epsilon is out of reach.
    """
    rule = load_aggregator(config.strategy.name, config.strategy.fields)
    _require_two_models(config, rule)
    _require_measured(config, rule)
    _require_same_units(config, rule)
    require_base_unchanged(config.wire, config.strategy.name, rule)
    privacy = config.client_privacy
    if privacy is None:
        return rule
    sigma, budget = privacy.noise_multiplier, privacy.budget
    if budget is not None:
        sigma = calibrated(budget, 1.0, config.rounds)
    assert sigma is not None
    return ServerDP(
        rule,
        noise_multiplier=sigma,
        clip_norm=privacy.clip_norm,
        minimum_cohort=privacy.minimum_cohort,
        adaptive=privacy.adaptive_clipping,
        quantile=privacy.quantile,
        clip_lr=privacy.clip_lr,
    )


def makes_models(config: RunConfig, rule: Aggregator) -> bool:
    """Whether each client gets a model of its own, by a PERSONAL rule or `train.personal`."""
    return Claim.PERSONAL in rule.claims or config.train.personal is not None


def _require_two_models(config: RunConfig, rule: Aggregator) -> None:
    """Raise where clients cannot train a model of their own beside the shared one (`train.personal`)."""
    name = config.strategy.name
    if config.train.personal is None:
        return
    if config.privacy is not None:
        raise PrivacyError(
            "train.personal: a client's own model is never sent, but it would be trained on the client's data without "
            "clipping and noise, of which [privacy] says nothing: remove train.personal or [privacy], or keep parts of "
            "the private model (strategy 'keep')",
            code="personal-not-private",
        )
    if Claim.PERSONAL in rule.claims:
        raise ConfigError(
            f"with {name!r} clients keep parts of the shared model, and with train.personal a whole one beside it: "
            "remove train.personal, or choose a rule whose clients send all that they train",
            code="personal-twice",
        )
    why = ""
    if Claim.CHANGES_BASE in rule.claims:
        why = "changes the base, under the clients' own models too"
    elif not rule.keeps_basis:
        why = "gives clients a new basis in each round, in which the distance to their own factors says nothing"
    elif not rule.keeps_units:
        why = "gives clients other units of A and B in each round than those of their own models"
    if why:
        raise ConfigError(
            f"train.personal: {name!r} {why}: remove it, or choose a rule that averages the adapter, such as fedavg",
            code="no-step",
        )


def _require_measured(config: RunConfig, rule: Aggregator) -> None:
    """Raise `ConfigError` where the clients' own models would not be measured or kept."""
    if not makes_models(config, rule):
        return
    how = config.evaluation
    by = "train.personal" if config.train.personal is not None else repr(config.strategy.name)
    if how.on == "server" and config.privacy is None:
        raise ConfigError(
            f"with {by} each client has a model of its own, which the server cannot measure: set "
            "evaluation.on = 'clients', or 'both' (the server's figures are then those of a new client)",
            code="personal-models-not-measured",
        )
    if config.selection is not None and config.selection.keep == "best":
        raise ConfigError(
            f"with {by} clients keep models or parts of them, of the last rounds alone: set "
            "selection.keep = 'last', or remove [selection]",
            code="best-round-not-kept",
        )


def _require_same_units(config: RunConfig, rule: Aggregator) -> None:
    """Raise `ConfigError` where what a client keeps of a unit would be used for another one."""
    ranks = config.clients.ranks or [one.rank for one in config.clients.profiles if one.rank is not None]
    if config.train.keep_optimizer and ranks and not rule.keeps_units:
        raise ConfigError(
            f"train.keep_optimizer: {config.strategy.name!r} gives clients of a smaller rank other units of A and B in "
            "each round than those that the optimiser's state is of: remove it, or clients.ranks and the ranks of "
            "clients.profiles",
            code="state-of-other-units",
        )
    if config.wire.keeps_residual and not (rule.keeps_basis and rule.keeps_units):
        raise ConfigError(
            f"wire.error_feedback adds what a client did not send to its next change, and {config.strategy.name!r} "
            "gives it other units of A and B by then: set wire.error_feedback = false, or choose a rule that goes on "
            "from the same units, such as fedavg or ffa",
            code="residual-of-other-units",
        )


def require_base_unchanged(wire: WireConfig, name: str, rule: Aggregator) -> None:
    """Raise `ConfigError` where most of what clients are sent could not be rounded (`wire.down`).

    Args:
        wire: Of the config.
        name: Of the rule.
        rule: The rule.
    """
    if wire.down != "float32" and Claim.CHANGES_BASE in rule.claims:
        raise ConfigError(
            f"wire.down rounds where clients start, and {name!r} sends them base updates: the base has to be the "
            "same for all to the byte: remove wire.down, or choose a rule that leaves the base as it is, such as "
            "fedavg or ffa",
            code="base-not-rounded",
        )


def require_cohort(privacy: ClientPrivacyConfig, clients: int, asked: int) -> None:
    """Refuse a claim that means nothing for so few clients, and rounds that could never count.

    Args:
        privacy: of the config.
        clients: of the federation.
        asked: in each round.

    Raises:
        PrivacyError: delta is at least 1 / clients, or a round asks fewer than the smallest cohort.
    """
    if privacy.delta * clients >= 1:
        raise PrivacyError(
            f"privacy.delta {privacy.delta:g} protects nobody among {clients} clients: choose one far below "
            f"1 / {clients}",
            code="delta-too-large",
        )
    if asked < privacy.minimum_cohort:
        raise PrivacyError(
            f"privacy.minimum_cohort = {privacy.minimum_cohort}, but a round asks {asked} clients: every round would "
            "be dropped; ask more (server.fraction, server.clients_per_round)",
            code="cohort-below-minimum",
        )


def require_one_start(plans: Iterable[ClientPlan]) -> None:
    """Refuse clients that start from different adapters, such as those of other ranks: updates need a common mean.

    Raises:
        PrivacyError: two plans ask for tensors of other names or shapes.
    """
    shapes = [{name: t.shape for name, t in plan.adapter.tensors(plan.sends).items()} for plan in plans]
    for number, other in enumerate(shapes):
        if other != shapes[0]:
            raise PrivacyError(
                f"client {number} starts from an adapter of another shape than client 0, and noise is added to a mean "
                "of all: give all clients the same rank under privacy.unit = 'client'",
                code="different-starts",
            )
