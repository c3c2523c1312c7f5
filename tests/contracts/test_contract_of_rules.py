"""Every rule that a config can name obeys the contract; a file dropped into `aggregators/` needs no line here."""

from __future__ import annotations

from fedlora.aggregators import rules
from fedlora.aggregators.fair import Fair
from fedlora.testing import AggregatorContract

for _name, _rule in rules.items():
    globals()[f"Test_{_name}"] = type(f"Test_{_name}", (AggregatorContract,), {"aggregator": _rule()})


class TestFairByCosine(AggregatorContract):
    aggregator = Fair(solver="cosine", steps=30, lr=0.5)


class TestFairWithoutRegularisation(AggregatorContract):
    aggregator = Fair(regularisation=0.0)
