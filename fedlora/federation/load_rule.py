"""User-level privacy from the config: the rule with clipping and noise around it, and what is refused early."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora.aggregators import Aggregator, Claim, ClientPlan, load_aggregator
from fedlora.config import ClientPrivacyConfig, RunConfig
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
    _require_measured(config, rule)
    _require_same_units(config, rule)
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


def _require_measured(config: RunConfig, rule: Aggregator) -> None:
    """Raise `ConfigError` where the clients' own models, which a PERSONAL rule makes, would not be measured or kept."""
    if Claim.PERSONAL not in rule.claims:
        return
    how = config.evaluation
    if how.on == "server" and config.privacy is None:
        raise ConfigError(
            f"with {config.strategy.name!r} each client has a model of its own, which the server cannot measure: set "
            "evaluation.on = 'clients', or 'both' (the server's figures are then those of a new client)",
            code="personal-models-not-measured",
        )
    if config.selection is not None and config.selection.keep == "best":
        raise ConfigError(
            f"with {config.strategy.name!r} clients keep parts of their models, of the last rounds alone: set "
            "selection.keep = 'last', or remove [selection]",
            code="best-round-not-kept",
        )


def _require_same_units(config: RunConfig, rule: Aggregator) -> None:
    """Raise `ConfigError` where what a client has still to send would be added to another unit's change."""
    if config.wire.keeps_residual and not (rule.keeps_basis and rule.keeps_units):
        raise ConfigError(
            f"wire.error_feedback adds what a client did not send to its next change, and {config.strategy.name!r} "
            "gives it other units of A and B by then: set wire.error_feedback = false, or choose a rule that goes on "
            "from the same units, such as fedavg or ffa",
            code="residual-of-other-units",
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
