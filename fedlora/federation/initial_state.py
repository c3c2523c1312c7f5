"""Where a rule and a method meet: the state before the first round, and a refusal where they do not go together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from fedlora.adapter import AdapterState
from fedlora.aggregators import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    GlobalState,
    names_claiming,
    on_current_base,
)
from fedlora.errors import ModelError, RuleError
from fedlora.model.adapter_files import read_adapter
from fedlora.model.base_model import Base
from fedlora.model.peft_methods import Method
from fedlora.rng import derive


def first_state(rule: Aggregator, base: Base, seed: int) -> GlobalState:
    """The state that a run starts from: the rule's own, and what the base gives up for the method's sake.

    Raises:
        RuleError: the rule cannot average what the method trains, or would throw its starting values away.
        ModelError: see `first_adapter`.
    """
    require_method(rule, base.method)
    adapter = first_adapter(base, seed)
    state = rule.init(adapter, seed=derive(seed, "rule"))
    given = base.adapter_config.start is not None
    if (given and not state.base_updates) or base.method.start != "kaiming":  # in the base, nothing of it is lost
        planned = rule.plan(state, ClientSpec(0, base.layout())).adapter.tensors(("A", "B"))
        if any(not torch.equal(planned[name], value) for name, value in adapter.tensors(("A", "B")).items()):
            lost, cure = f"method {base.method.name!r} starts from", "set adapter.method = 'lora'"
            if given:
                lost, cure = "adapter.start holds", "remove adapter.start"
            raise RuleError(
                f"{type(rule).__name__} draws its clients' A and B anew, and what {lost} would be lost: {cure}, or "
                "choose a rule whose clients go on from the global A and B, such as fedavg",
                code="rule-method-mismatch",
            )
    base_updates = base.initial_base_updates(adapter)
    return replace(state, base_updates=base_updates) if base_updates else state


def first_adapter(base: Base, seed: int) -> AdapterState:
    """The adapter that training starts from: the one in `adapter.start`, or as the method draws it.

    Raises:
        ModelError: see `Base.initial_adapter`; or the folder's adapter is not for this base, or is of another rank or
            scale than the config's.
    """
    drawn, folder = base.initial_adapter(seed), base.adapter_config.start
    if folder is None:
        return drawn
    if base.method.start in ("pissa", "olora"):
        raise ModelError(
            f"method {base.method.name!r} starts from the base's weights, and adapter.start from a folder: set "
            "adapter.method = 'lora', or remove adapter.start",
            code="two-starts",
        )
    found = read_adapter(base, Path(folder))
    for name, pair in drawn.pairs.items():
        own = found.pairs[name]
        if (own.rank, own.A.shape) != (pair.rank, pair.A.shape) or not math.isclose(own.scale, pair.scale):
            raise ModelError(
                f"the adapter in {folder!r} has rank {own.rank} and scale {own.scale:g} at {name}, and the config "
                f"{pair.rank} and {pair.scale:g} (alpha over rank): set adapter.rank and adapter.alpha as it was "
                "trained, or rank_pattern and alpha_pattern",
                code="shape-mismatch",
            )
    return found


def plan_for(rule: Aggregator, state: GlobalState, client: ClientSpec) -> ClientPlan:
    """The rule's plan; a rule that leaves the base alone need not know that its method did not."""
    plan = rule.plan(state, client)
    if Claim.CHANGES_BASE in rule.claims:
        return plan
    return on_current_base(plan, state, client.base_version)


def require_method(rule: Aggregator, method: Method) -> None:
    """Raise `RuleError` unless the rule can average what the method trains, as far as its claims say."""
    if not method.pairs and Claim.ANY_TENSORS not in rule.claims:
        raise RuleError(
            f"{type(rule).__name__} averages pairs of A and B, and method {method.name!r} trains others "
            f"({method.trains}): choose strategy {' or '.join(map(repr, names_claiming(Claim.ANY_TENSORS)))}, or set "
            "adapter.method = 'lora'",
            code="rule-method-mismatch",
        )
    if method.magnitudes and Claim.CHANGES_BASE in rule.claims:
        raise RuleError(
            f"{type(rule).__name__} merges into the base, which magnitudes ({method.name!r}) do not survive: "
            "set adapter.method = 'lora', or choose a rule that leaves the base alone, such as fedavg",
            code="rule-method-mismatch",
        )
