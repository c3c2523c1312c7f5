from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import raises

from fedlora.errors import DataError
from fedlora.fairness import fairness, gini

positive = st.lists(st.floats(0.001, 1e3), min_size=1, max_size=30)


def test_by_hand() -> None:
    # 20 clients: the worst two are 0.1 and 0.2, the best two 0.9 and 1.0, the others 0.5.
    found = fairness([0.5] * 8 + [1.0, 0.1, 0.2, 0.9] + [0.5] * 8)
    assert found.mean == pytest.approx((0.1 + 0.2 + 0.9 + 1.0 + 16 * 0.5) / 20)
    assert (found.worst, found.worst_decile, found.best_decile) == pytest.approx((0.1, 0.15, 0.95))
    around = [0.41, 0.31, 0.39, 0.49]  # distances from the mean of 0.51, and 16 of 0.01
    assert found.variance == pytest.approx((sum(x * x for x in around) + 16 * 0.0001) / 20)
    down = fairness([3.0, 9.0, 5.0], higher_is_better=False)
    assert (down.worst, down.worst_decile, down.best_decile) == (9.0, 9.0, 3.0)


def test_gini_by_hand() -> None:
    # Pairs (i, j), both ways: |1-3| + |1-8| + |3-8| = 14, twice; over 2 * 9 * 4.
    assert gini([3, 1, 8]) == pytest.approx(28 / 72)
    assert gini([7.0]) == 0
    assert gini([0, 0, 5]) == pytest.approx(1 - 1 / 3)


@settings(deadline=None)
@given(positive, st.floats(0.01, 100))
def test_gini_is_its_definition_and_knows_no_unit(values: list[float], unit: float) -> None:
    x = np.array(values)
    pairs = np.abs(x[:, None] - x[None, :]).sum() / (2 * len(x) ** 2 * x.mean())
    assert gini(values) == pytest.approx(pairs, abs=1e-9)
    assert gini(unit * x) == pytest.approx(gini(values), abs=1e-9)


@settings(deadline=None)
@given(positive)
def test_giving_from_the_richest_to_the_poorest_is_fairer(values: list[float]) -> None:
    x = np.sort(values)
    after = x.copy()
    gift = (x[-1] - x[0]) / 4
    after[0], after[-1] = x[0] + gift, x[-1] - gift
    assert gini(after) <= gini(x) + 1e-12
    assert fairness(after).variance <= fairness(x).variance * (1 + 1e-9) + 1e-12


@settings(deadline=None)
@given(positive, st.randoms())
def test_the_order_of_the_clients_does_not_matter(values: list[float], draw) -> None:
    other = list(values)
    draw.shuffle(other)
    one, two = fairness(values), fairness(other)
    assert one.worst_decile == pytest.approx(two.worst_decile)
    assert one.gini == pytest.approx(two.gini, abs=1e-12)
    assert one.worst <= one.worst_decile <= one.mean * (1 + 1e-12)


def test_what_has_no_distribution_is_refused() -> None:
    for values in ([], [0.5, math.nan], [math.inf]):
        with raises(DataError, "no-distribution"):
            fairness(values)
    with raises(DataError, "gini-undefined"):
        gini([-1, 2])
    assert math.isnan(fairness([-1.0, 2.0]).gini)
    assert math.isnan(fairness([0.0, 0.0]).gini)
