"""The gate: what a run asks of a site, held against its policy before anything is trained, and what may leave.

Three looks, each at more than the one before: at the config (`require_config`), at the request (`require_request`), and
at the site's own examples and base model (`require_workspace`). Each raises a `PolicyError` that names the clause. What
is said of an aggregation rule is the coordinator's word: it runs on the coordinator's machine.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.config import NODES, RunConfig
from fedlora.errors import PolicyError, looks_like_path
from fedlora.registry import Registry
from fedlora.site.approvals import config_hash
from fedlora.site.policy import Policy
from fedlora.site.signatures import NotSignedError, Signer, require_signed

TELL_SIZES = frozenset({"examples_seen", "steps", "seconds", "compute_seconds"})
"""Figures of a client's training from which its number of examples can be told."""


def refused(clause: str, why: str) -> PolicyError:
    """The error of a clause that does not allow what is asked."""
    return PolicyError(clause, why, code="refused-by-policy")


def require_signature(policy: Policy, signature: str, config: RunConfig, code: str) -> str | None:
    """Who signed a run; None where the policy does not ask for it.

    Args:
        policy: The site's.
        signature: That came with the run; "" for none.
        config: The run's, without the node's own facts.
        code: `fedlora.hashing.code_digest` of this machine's fedlora.

    Raises:
        PolicyError: nobody whom the policy names.
    """
    if policy.signers is None:
        return None
    known, today = [Signer.read(line) for line in policy.signers], datetime.datetime.now(datetime.UTC).date()
    try:
        return require_signed(known, signature, config_hash(config), code, today).name
    except NotSignedError as error:
        raise refused("signers", str(error)) from None


def require_config(policy: Policy, config: RunConfig, client_id: int, *, own_data: bool) -> None:
    """Hold a run's config against the policy. Nothing that the config names is imported or opened before it is allowed.

    Args:
        policy: The site's.
        config: The run's, without the node's own facts.
        client_id: Number of the client that this node is.
        own_data: Whether the node names a data file of its own.

    Raises:
        PolicyError: naming the first clause that does not allow it.
        ConfigError: a name or field in it is wrong.
    """
    _require_sources(policy, config, own_data)
    _require_base_model(policy, config)
    _require_privacy(policy, config)
    _require_code(policy, config)
    if policy.tasks is not None and config.task.name not in policy.tasks:
        raise refused("tasks", f"the run's task is {config.task.name!r}")
    if policy.rules is not None:
        _require_rule(policy.rules, config)
    if policy.columns is not None and (odd := _columns(config) - set(policy.columns)):
        raise refused("columns", f"the run reads column {min(odd)!r}")
    ranks = (config.adapter.rank, config.clients.rank_of(client_id) or 1, *config.adapter.rank_pattern.values())
    _require_at_most(policy.max_rank, max(ranks), "max_rank", "rank")
    _require_at_most(policy.max_rounds, config.rounds, "max_rounds", "number of rounds")
    if not policy.example_counts and config.example_privacy is None and config.server.weighting == "examples":
        raise refused("example_counts", "server.weighting = 'examples' weighs clients by their number of examples")


def require_request(policy: Policy, head: Mapping[str, Any], *, evaluates: bool) -> None:
    """Hold the head of a request (`fedlora.federation.protocol.request_head`) against the policy.

    Args:
        policy: The site's.
        head: What the request says besides its tensors.
        evaluates: Whether the client is asked for figures of its own examples instead of training.

    Raises:
        PolicyError: naming the first clause that does not allow it.
        ValueError: it is no head; so do KeyError, TypeError and AttributeError say.
    """
    if type(head["round"]) is not int:
        raise ValueError(f"round {head['round']!r} is no number")
    _require_at_most(policy.max_rounds, head["round"], "max_rounds", "round")
    ranks = [int(rank) for _, _, rank, _ in head["layout"].values()]
    _require_at_most(policy.max_rank, max(ranks, default=0), "max_rank", "rank of the adapter that was sent")
    if (asked := sorted(head.get("asks", ()))) and not policy.losses:
        raise refused("losses", f"the run's rule asks for the figure {asked[0]!r} of this site's examples")
    if evaluates:
        for clause in ("metrics", "losses", "example_counts"):  # sums hold all three
            if not getattr(policy, clause):
                raise refused(clause, "the run asks for figures of this site's examples")


def require_foreign(policy: Policy) -> None:
    """Hold a request of another server's strategy than fedlora's own against the policy.

    Raises:
        PolicyError: the policy names rules, which such a server does not, or keeps figures here that it needs.
    """
    if policy.rules is not None:
        raise refused("rules", "a server of another kind asks, and does not say by which rule it aggregates")
    for clause in ("losses", "example_counts"):
        if not getattr(policy, clause):
            raise refused(clause, "a server of another kind asks, whose clients report it always")


def require_workspace(
    policy: Policy, workspace: Any, client_id: int, *, evaluates: bool = False, first_times: int = 0
) -> None:
    """Hold this site's base model and examples against the policy.

    Args:
        policy: The site's.
        workspace: A `fedlora.training.workspace.Workspace` of the run, on this node.
        client_id: Number of the client that this node is.
        evaluates: See `require_request`.
        first_times: How many times as long as the rest a part is trained first; 0: none is.

    Raises:
        PolicyError: naming the first clause that does not allow it.
    """
    config: RunConfig = workspace.config
    if policy.base_models is not None:
        wanted, found = policy.base_models[config.model.name], workspace.base.fingerprint
        if found != wanted:
            raise refused("base_models", f"{config.model.name!r} has the fingerprint {found}, not {wanted}")
    declared = config.example_privacy
    if declared is not None:
        from fedlora.privacy.calibrate import schedule

        size, train = declared.public_examples_of(client_id), config.train_of(client_id)
        steps = schedule(size, train.batch_size, config.rounds, steps=train.steps, epochs=train.epochs).steps
    else:
        from fedlora.training.job import number_of_steps

        clients = workspace.data.clients
        size = len(clients[client_id]) if 0 <= client_id < len(clients) else 0
        steps = number_of_steps(size, config.train_of(client_id))
    steps *= 1 + first_times
    _require_at_most(policy.max_steps, steps, "max_steps", "number of steps in a round")
    if policy.min_examples is None:
        return
    if config.client_privacy is not None:
        raise refused("min_examples", "with privacy.unit = 'client' no number is declared, and the true one is secret")
    sizes = [size]
    if evaluates:
        sizes += [len(apart.clients[client_id]) for apart in workspace.data.apart.values()]
    if min(sizes) < policy.min_examples:
        raise refused("min_examples", f"there are {min(sizes)} examples, and the policy wants {policy.min_examples}")


def figures_kept_here(policy: Policy, config: RunConfig) -> frozenset[str]:
    """Names of the figures of a client's training that do not leave; what a private run reports tells nothing."""
    if config.privacy is not None:
        return frozenset()
    return (frozenset() if policy.losses else frozenset({"loss"})) | (
        frozenset() if policy.example_counts else TELL_SIZES
    )


# ------------------------------------------------------------------------------------------------ clauses


def _require_at_most(most: int | None, asked: int, clause: str, what: str) -> None:
    if most is not None and asked > most:
        raise refused(clause, f"the {what} is {asked}, and the policy allows {most}")


def _require_sources(policy: Policy, config: RunConfig, own_data: bool) -> None:
    """No path is the coordinator's to choose."""
    data = config.data
    if data.own is not None or data.own_test is not None:
        raise refused("sources", "the config names a node's own data file, which its node-config.toml alone does")
    if own_data and data.source != NODES:
        raise refused("sources", f"the run reads {data.source!r} instead of the data file that this node names")
    for key, name in (("source", data.source), ("test", data.test)):
        if own_data or name is None or name in (policy.sources or ()):
            continue
        if policy.sources is not None:
            raise refused("sources", f"data.{key} is {name!r}")
        if _is_path(name):
            raise refused("sources", f"data.{key} = {name!r} is a path on this machine, which the policy does not list")


def _require_base_model(policy: Policy, config: RunConfig) -> None:
    name = config.model.name
    if policy.base_models is not None and name not in policy.base_models:
        raise refused("base_models", f"the run's base model is {name!r}")
    if policy.base_models is None and _is_path(name):
        raise refused("base_models", f"model.name = {name!r} is a path on this machine, which the policy does not list")


def _is_path(name: str) -> bool:
    return looks_like_path(name) or Path(name).exists()


def _require_privacy(policy: Policy, config: RunConfig) -> None:
    private = config.example_privacy
    if policy.private_only and private is None:
        unit = "without [privacy]" if config.privacy is None else "with noise that the server adds"
        raise refused("private_only", f"the run trains {unit}")
    if policy.budget is None or private is None:
        return
    if private.epsilon is not None and private.epsilon > policy.budget.epsilon:
        raise refused("epsilon", f"the run's epsilon is {private.epsilon:g}, the policy's {policy.budget.epsilon:g}")
    if private.delta > policy.budget.delta:
        raise refused("delta", f"the run's delta is {private.delta:g}, the policy's {policy.budget.delta:g}")


def _require_code(policy: Policy, config: RunConfig) -> None:
    for name in _code(config):
        if name not in policy.code:
            raise refused("code", f"the config names {name!r}")


def _code(config: RunConfig) -> Iterator[str]:
    """Code that is not fedlora's own, as the config names it."""
    from fedlora.aggregators import rules
    from fedlora.data.source import sources
    from fedlora.partition import partitioners
    from fedlora.tasks import tasks

    if config.model.trust_remote_code:
        yield config.model.name
    named: list[tuple[Registry[Any], str]] = [(tasks, config.task.name), (sources, config.data.source)]
    named += [(partitioners, config.partition.name)] if config.partition.name != NODES else []
    named += [(rules, name) for name in _rules(config)]
    for name in (config.evaluation.metric, config.train.loop):
        if name is not None:
            yield name
    for registry, name in named:
        if registry.is_foreign(name):
            yield name


def _rules(config: RunConfig) -> Iterator[str]:
    """The rule's name, and those of the rules that it is around."""
    yield config.strategy.name
    left = list(config.strategy.fields.values())
    for value in left:
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, str):  # an inner rule's name, or a field that is no rule's
            yield value


def _require_rule(allowed: tuple[str, ...], config: RunConfig) -> None:
    from fedlora.aggregators import Claim, load_aggregator

    rule = load_aggregator(config.strategy.name, config.strategy.fields)
    claims = {claim.name for claim in Claim if claim in rule.claims}
    if config.strategy.name not in allowed and not claims.intersection(allowed):
        raise refused(
            "rules", f"the rule is {config.strategy.name!r}, which claims {', '.join(sorted(map(str, claims)))}"
        )


def _columns(config: RunConfig) -> set[str]:
    from fedlora.data import column_roles, task_columns
    from fedlora.tasks import load_task

    roles = column_roles(config.data)
    beside = {roles[role] for role in ("domain", "group") if role in roles}
    return {*task_columns(load_task(config.task), config.data, None).values(), *beside}
