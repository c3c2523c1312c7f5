"""Where a rule and a method meet: the state before the first round, and a refusal where they do not go together."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.adapter import AdapterState
from fedlora.aggregators import (
    Aggregator,
    Claim,
    ClientSpec,
    GlobalState,
    names_claiming,
)
from fedlora.errors import RuleError
from fedlora.federation.given_adapter import Start
from fedlora.federation.planner import plan_for
from fedlora.lowrank import frobenius
from fedlora.model.base_model import Base
from fedlora.model.peft_methods import Method
from fedlora.rng import derive

NEGLIGIBLE = 1e-6
"""Part of s |B| |A| that the rounding of a rule's first state may change of what a given adapter adds to a weight."""


def first_state(rule: Aggregator, base: Base, seed: int, start: Start | None = None) -> GlobalState:
    """The state that a run starts from: the rule's own, and what the base gives up for the method's sake.

    Args:
        rule: of the run.
        base: that the adapter is on.
        seed: of the run.
        start: the adapter to begin with; None: as the method draws one.

    Raises:
        RuleError: the rule cannot average what the method trains, or would throw its starting values away.
        ModelError: see `Base.initial_adapter`.
    """
    require_method(rule, base.method)
    if start is not None:
        state = rule.init(start.adapter, seed=derive(seed, "rule"))
        _require_kept(rule, base, state, start.adapter)
        return state
    adapter = base.initial_adapter(seed)
    state = rule.init(adapter, seed=derive(seed, "rule"))
    if base.method.start != "kaiming":
        planned = rule.plan(state, ClientSpec(0, base.layout())).adapter.tensors(("A", "B"))
        if any(not torch.equal(planned[name], value) for name, value in adapter.tensors(("A", "B")).items()):
            raise RuleError(
                f"{type(rule).__name__} draws its clients' A and B anew, and what method {base.method.name!r} starts "
                "from would be lost: set adapter.method = 'lora', or choose a rule whose clients go on from the global "
                "A and B, such as fedavg",
                code="rule-method-mismatch",
            )
    base_updates = base.initial_base_updates(adapter)
    return replace(state, base_updates=base_updates) if base_updates else state


def _require_kept(rule: Aggregator, base: Base, state: GlobalState, given: AdapterState) -> None:
    """Raise `RuleError` unless a client begins with a model that computes what a given adapter computes."""
    planned = plan_for(rule, state, ClientSpec(0, base.layout())).adapter
    lost = [name for name, value in given.dense.items() if not torch.equal(planned.dense[name], value)]
    for name, pair in given.pairs.items():
        in_base = [(1.0, one.change.pairs[name]) for one in state.base_updates if name in one.change.pairs]
        left = frobenius([(-1.0, pair), (1.0, planned.pairs[name]), *in_base])
        if left > NEGLIGIBLE * pair.scale * float(pair.B.double().norm() * pair.A.double().norm()):
            lost.append(name)
    if lost:
        raise RuleError(
            f"{type(rule).__name__} draws A and B of its own, and what adapter.start holds of {lost[0]!r} would be "
            "lost: remove adapter.start, or choose a rule whose clients go on from the global A and B, such as fedavg, "
            "or that takes it into the base, such as flora",
            code="start-lost",
        )


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
