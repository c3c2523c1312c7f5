"""Aggregation rules, one file each."""

from fedlora.aggregators._base import (
    Aggregator,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    Merge,
    WeightedMean,
    require_modules,
    require_no_magnitudes,
    require_same_ranks,
    require_weight,
)
from fedlora.aggregators._changes import (
    accumulate,
    broadcast_change,
    catch_up,
    compact,
    equivalent_adapter,
    follow,
    merge_chain,
)
from fedlora.aggregators._registry import load_aggregator, names_claiming, register, rule_class, rules

__all__ = [
    "Aggregator",
    "Claim",
    "ClientPlan",
    "ClientSpec",
    "ClientUpdate",
    "GlobalState",
    "Merge",
    "WeightedMean",
    "accumulate",
    "broadcast_change",
    "catch_up",
    "compact",
    "equivalent_adapter",
    "follow",
    "load_aggregator",
    "merge_chain",
    "names_claiming",
    "register",
    "require_modules",
    "require_no_magnitudes",
    "require_same_ranks",
    "require_weight",
    "rule_class",
    "rules",
]
