"""The contract catches each deliberately wrong rule, by these laws and no others."""

from __future__ import annotations

import unittest
from typing import ClassVar

import pytest
import wrong_rules as wrong

from fedlora.aggregators import Aggregator
from fedlora.testing import AggregatorContract, broken_laws

EXACT, ALONE = "test_exact", "test_one_client_alone_gives_back_that_client"
DENSE, ORDER = "test_dense_parts_are_averaged_as_themselves", "test_order_of_replies_does_not_matter"
TWINS, WEIGHTS = "test_one_client_counts_as_its_duplicates", "test_scaling_all_weights_changes_nothing"
SUMS, ONE_AT_A_TIME = "test_linear_sees_sums_only", "test_linear_holds_one_update_at_a_time"
STREAM, RESUME = "test_streaming_equals_all_at_once", "test_resume_equals_uninterrupted"
HALF, INPUTS = "test_half_precision_is_accumulated_wide", "test_inputs_are_not_changed"
LIAR, LIARS = "test_robust_bounds_one_liar", "test_robust_bounds_a_share_of_liars"
HIDDEN = "test_robust_bounds_a_liar_in_another_gauge"
SAME = "test_identical_updates_come_back_unchanged"
UNREAD, ALIKE = "test_personal_kept_parts_are_not_read", "test_personal_all_clients_begin_alike"
PLAN = "test_plan_is_data_that_fits_the_client"
BASE, MIXED = "test_base_is_changed_by_those_that_say_so", "test_mixed_ranks_are_taken_or_refused"

CAUGHT: list[tuple[Aggregator, set[str]]] = [
    (wrong.WrongStack(mistake="p on both sides"), {EXACT, TWINS, SAME}),
    (wrong.WrongStack(mistake="no scale"), {EXACT, "test_exact_trades_scale_for_factor", ALONE, SAME}),
    (wrong.KeepsOldAdapter(), {EXACT, ALONE, DENSE, ORDER, SAME}),
    (wrong.NoVersions(), {BASE}),
    (wrong.UnseededFresh(), {PLAN, RESUME, INPUTS}),
    (wrong.InPlace(), {INPUTS, STREAM, ORDER, DENSE, TWINS, WEIGHTS, SUMS, ONE_AT_A_TIME, HALF}),
    (wrong.LastOnly(), {ORDER, DENSE, ONE_AT_A_TIME}),
    (wrong.Unweighted(), {TWINS, DENSE, SUMS, ONE_AT_A_TIME}),
    (wrong.ReadsTwice(), {STREAM, "test_no_update_is_refused"}),
    (wrong.KeepsAll(), {ONE_AT_A_TIME}),
    (wrong.ClaimsExact(), {EXACT}),
    (wrong.ClaimsLinear(), {SUMS, ONE_AT_A_TIME}),
    (wrong.ClaimsRobust(), {LIAR, LIARS, HIDDEN}),
    (wrong.ClaimsGaugeFree(), {"test_gauge_is_not_seen"}),
    (wrong.DropsOne(), {LIARS, DENSE}),
    (wrong.AveragesWhatKrumChose(), {HIDDEN, TWINS, DENSE}),
    (wrong.MomentumOfPairs(), {"test_any_tensors_are_treated_alike", ALONE, SAME}),
    (wrong.KeepsEveryA(), {ONE_AT_A_TIME}),
    (wrong.HeadFrozenWithA(), {DENSE, ALONE, SAME}),
    (wrong.PadsWithoutScale(), {EXACT, SAME}),
    (wrong.TakesAnyRank(), {MIXED}),
    (wrong.HiddenMemory(), {RESUME, STREAM, ORDER, DENSE, TWINS, WEIGHTS, ALONE, SAME, HALF}),
    (wrong.NarrowSum(), {HALF}),
    (wrong.FirstWins(), {ORDER}),
    (wrong.SilentBaseChange(), {BASE}),
    (wrong.WrongForSeveral(), {SAME}),
    (wrong.AveragesKept(), {UNREAD, ALIKE}),
    (wrong.MovesTheStart(), {ALIKE, ALONE, SAME, DENSE}),
    (wrong.KeepsUnsaid(), {PLAN}),
    (wrong.TiltsUnsaid(), {PLAN}),
    (wrong.PersonalByName(), {PLAN}),
    (wrong.ExactAndPersonal(), {UNREAD, EXACT}),
]


def _name(value: object) -> str | None:
    return getattr(value, "mistake", "") or type(value).__name__ if isinstance(value, Aggregator) else None


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "laws"), CAUGHT, ids=_name)
def test_each_mistake_is_caught_by_its_law(rule: Aggregator, laws: set[str]) -> None:
    assert set(broken_laws(rule)) == laws


def test_the_laws_in_this_table_are_laws() -> None:
    assert set().union(*(laws for _, laws in CAUGHT)) <= set(dir(AggregatorContract))


class Excused(AggregatorContract):
    aggregator = wrong.FirstWins()
    exempt: ClassVar[dict[str, str]] = {ORDER: "test_the_first_reply_decides"}

    def test_the_first_reply_decides(self) -> None:
        """What holds in the place of the law."""


def test_an_exempted_law_is_skipped() -> None:
    with pytest.raises(unittest.SkipTest, match="test_the_first_reply_decides"):
        Excused().test_order_of_replies_does_not_matter()
    Excused().test_every_exemption_is_paid_with_a_law()


@pytest.mark.parametrize(
    "exempt", [{ORDER: "it is meant to look at the first reply"}, {ORDER: STREAM}, {"test_no_such_law": "test_own"}]
)
def test_an_exemption_without_a_law_of_its_own_is_no_exemption(exempt: dict[str, str]) -> None:
    unpaid = type("Unpaid", (Excused,), {"exempt": exempt, "test_own": lambda self: None})
    with pytest.raises(AssertionError):
        unpaid().test_every_exemption_is_paid_with_a_law()
