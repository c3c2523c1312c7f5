"""For people who write rules: the laws that every aggregation rule must obey, as tests to inherit.

    from fedlora.testing import AggregatorContract

    class TestMine(AggregatorContract):
        aggregator = MyRule()

is the whole CI of a rule. A law that follows from a claim is skipped for rules that do not make the claim. One that
a rule breaks on purpose is named in `exempt`, with the test method of the subclass that states what holds in its place;
`self.states()`, `self.specs()` and `self.updates(state, specs)` are the contract's imaginary clients. Outside pytest,
`broken_laws(MyRule())` names the laws that a rule breaks.
"""

from __future__ import annotations

from fedlora.testing._contract import AggregatorContract, broken_laws

__all__ = ["AggregatorContract", "broken_laws"]
