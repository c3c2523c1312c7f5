"""What the rules share: finding them, refusing what they cannot do, and the log of base changes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.errors import raises

from fedlora.adapter import AdapterState, LoraPair, PairShape, fresh_pairs
from fedlora.aggregators import (
    Aggregator,
    BaseUpdate,
    Claim,
    ClientPlan,
    ClientSpec,
    ClientUpdate,
    GlobalState,
    WeightedMean,
    accumulate,
    broadcast_change,
    catch_up,
    compact,
    equivalent_adapter,
    load_aggregator,
    names_claiming,
    rules,
)
from fedlora.aggregators.clipping import CentredClipping, NormBound
from fedlora.aggregators.coordinatewise import Median
from fedlora.aggregators.fair import Fair
from fedlora.aggregators.fedavg import FedAvg
from fedlora.aggregators.fedrot import FedRot
from fedlora.aggregators.ffa import FfaLora
from fedlora.aggregators.flora import Flora
from fedlora.aggregators.fltrust import FlTrust
from fedlora.aggregators.geometric_median import GeometricMedian
from fedlora.aggregators.krum import Krum
from fedlora.aggregators.server_optimisers import FedAdam, FedAvgM
from fedlora.cli.strategies import GROUPS, group_of
from fedlora.errors import ConfigError, PrivacyError, RuleError
from fedlora.testing._contract import follow


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(rank: int, seed: int, o: int = 40, i: int = 30, dtype: torch.dtype = torch.float32) -> LoraPair:
    return LoraPair(noise(rank, i, seed=2 * seed, dtype=dtype), noise(o, rank, seed=2 * seed + 1, dtype=dtype), 0.5)


def layout(rank: int, scale: float = 0.5) -> dict[str, PairShape]:
    return {"m": PairShape(40, 30, rank, scale)}


def initial(rank: int = 4) -> AdapterState:
    return AdapterState(fresh_pairs(layout(rank), 3), {"head": torch.ones(5)})


def log(count: int, rank: int = 2, dtype: torch.dtype = torch.float32) -> tuple[BaseUpdate, ...]:
    return tuple(BaseUpdate(v, v + 1, AdapterState({"m": pair(rank, v, dtype=dtype)})) for v in range(count))


# ------------------------------------------------------------------------------------------------ finding a rule


NAMES = """afl centred_clipping fair fedadagrad fedadam fedavg fedavgm feddyn fedex fedmomentum fedper fedrep
fedrot fedsa fedsb fedsvd fedyogi ffa flexlora flora florist fltrust frlora fslora geometric_median hetlora
keep krum median norm_bound qfedavg raflora ravan rolora scaffold trimmed_mean"""


def test_every_rule_is_found_by_name_and_says_where_it_comes_from() -> None:
    assert set(NAMES.split()) <= set(rules)
    assert all("arXiv" in cls.paper or "OpenReview" in cls.paper for cls in dict(rules.items()).values())
    assert {group_of(cls) for cls in dict(rules.items()).values()} == set(GROUPS)
    assert [
        group_of(rules.get(name)) for name in ("ffa", "hetlora", "krum", "fedadam", "feddyn", "afl", "fedsa", "fedavg")
    ] == list(GROUPS)


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [
        ("flora", Krum(inner=Flora())),
        ({"name": "fair", "regularisation": 0.5}, Krum(inner=Fair(0.5))),
        ({"name": "fedadam", "inner": {"name": "median"}}, Krum(inner=FedAdam(inner=Median()))),
    ],
)
def test_a_rule_takes_an_inner_rule(inner: object, wanted: Krum) -> None:
    built = load_aggregator("krum", {"inner": inner})
    assert built == wanted
    assert built.claims == wanted.claims


@pytest.mark.parametrize(
    ("name", "fields", "code", "named"),
    [
        ("krum", {"inner": "flroa"}, "unknown-name", "'flora'"),
        ("krum", {"inner": {"name": "flora", "rank": 3}}, "unknown-key", "'rank'"),
        ("krum", {"inner": 3}, "bad-inner", "inner"),
        ("krum", {"inner": {"regularisation": 1.0}}, "bad-inner", "inner"),
        ("median", {"inner": "flora"}, "rule-not-linear", "Flora"),
        ("fedadam", {"inner": "flora"}, "no-step", "changes the base"),
        ("fedadam", {"inner": "fedsvd"}, "no-step", "new basis"),
        ("fedavgm", {"inner": {"name": "krum", "inner": "flexlora"}}, "no-step", "new basis"),
        ("krum", {"liars": 0.5}, "out-of-range", "liars"),
        ("krum", {"liars": 0.3, "keep": 0.8}, "out-of-range", "keep"),
        ("trimmed_mean", {"trim": -0.1}, "out-of-range", "trim"),
        ("norm_bound", {"bound": 0.0}, "out-of-range", "bound"),
        ("centred_clipping", {"radius": math.inf}, "out-of-range", "radius"),
        ("centred_clipping", {"iterations": 0}, "out-of-range", "iterations"),
        ("fedadam", {"lr": 0.0}, "out-of-range", "lr"),
        ("fedadam", {"beta2": 1.0}, "out-of-range", "beta2"),
        ("fedyogi", {"tau": -1.0}, "out-of-range", "tau"),
        ("fedavgm", {"momentum": 1.0}, "out-of-range", "momentum"),
        ("fedrot", {"strength": 1.5}, "out-of-range", "strength"),
        ("flexlora", {"energy": 0.0}, "out-of-range", "energy"),
        ("flexlora", {"energy": 0.9, "svd": "randomised"}, "keys-exclude-each-other", "energy"),
        ("fedex", {"rank_cap": 0}, "out-of-range", "rank_cap"),
    ],
)
def test_what_a_rule_cannot_be_is_refused(name: str, fields: dict[str, object], code: str, named: str) -> None:
    with raises(ConfigError, code, named):
        load_aggregator(name, fields)


def test_fedrot_refuses_a_rule_that_freezes_a_factor() -> None:
    with raises(RuleError, "rule-method-mismatch", "FfaLora"):
        FedRot(inner=FfaLora()).init(initial())


def test_updates_that_are_not_finite_are_dropped_by_screens() -> None:
    update = ClientUpdate(0, initial(), 1.0)
    broken = ClientUpdate(1, initial().with_tensors({"head": torch.full((5,), math.nan)}), 1.0)
    for rule in (Krum(), GeometricMedian(), NormBound(), CentredClipping(), FlTrust(root=2)):
        state = rule.init(initial())
        with raises(RuleError, "not-finite"):
            rule.aggregate(state, [broken])
        after = rule.aggregate(state, [broken, update, replace(update, client_id=2)])
        assert all(bool(torch.isfinite(value).all()) for value in after.adapter.tensors().values())


@pytest.mark.parametrize("rule", [Krum(), Median(), NormBound(), FedAdam(), FedAvgM(inner=Median())], ids=repr)
def test_integers_are_averaged_by_no_rule(rule: Aggregator) -> None:
    counted = AdapterState(dense={"bn.num_batches_tracked": torch.tensor([3])})
    with raises(RuleError, "not-averageable", "bn.num_batches_tracked"):
        rule.aggregate(rule.init(counted), [ClientUpdate(0, counted, 1.0)])


def test_private_sums_take_linear_rules_alone() -> None:
    from fedlora.privacy.server_dp import ServerDP

    for name in names_claiming(Claim.LINEAR):
        ServerDP(load_aggregator(name), noise_multiplier=1.0, clip_norm=1.0)
    for name in sorted(set(rules) - set(names_claiming(Claim.LINEAR))):
        with raises(PrivacyError, "rule-not-linear"):
            ServerDP(load_aggregator(name), noise_multiplier=1.0, clip_norm=1.0)
    with raises(PrivacyError, "rule-not-linear"):  # the sum that is private would be of something else
        ServerDP(FedAdam(inner=Median()), noise_multiplier=1.0, clip_norm=1.0)


def test_fields_are_the_config() -> None:
    assert load_aggregator("fair", {"regularisation": 0.5, "solver": "cosine"}) == Fair(0.5, "cosine")


@pytest.mark.parametrize(
    ("name", "fields", "code", "named"),
    [
        ("fedavgg", {}, "unknown-name", "'fedavg'"),
        ("fair", {"regularization": 1}, "unknown-key", "'regularisation'"),
        ("fair", {"solver": "svd"}, "bad-value", "'cosine'"),
        ("fair", {"steps": "many"}, "bad-value", "steps"),
        ("no_such_module:Rule", {}, "class-not-found", "'no_such_module'"),
        ("math:Rule", {}, "class-not-found", "'Rule'"),
        ("math:pi", {}, "wrong-base-class", "'math:pi'"),
        ("math:", {}, "bad-class-path", "'math:'"),
    ],
)
def test_a_wrong_name_or_field_is_refused_with_the_cure(
    name: str, fields: dict[str, object], code: str, named: str
) -> None:
    with raises(ConfigError, code, named):
        load_aggregator(name, fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [("regularisation", -1.0), ("regularisation", math.nan), ("steps", -1), ("lr", 0.0), ("lr", math.inf)],
)
def test_fair_refuses_fields_out_of_range(field: str, value: float) -> None:
    with raises(ConfigError, "out-of-range", field):
        load_aggregator("fair", {field: value})


def test_a_rule_in_a_file_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rule_of_this_folder.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlora.aggregators import Aggregator\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Aggregator):\n"
        "    strength: float = 1.0\n"
        "    def aggregate(self, state, updates): return state\n"
        "class NotFrozen(Aggregator):\n"
        "    def aggregate(self, state, updates): return state\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_aggregator("rule_of_this_folder:Mine", {"strength": 2}).strength == 2.0  # type: ignore[attr-defined]
    with raises(ConfigError, "not-a-dataclass", "NotFrozen"):
        load_aggregator("rule_of_this_folder:NotFrozen")


@pytest.mark.slow
def test_a_rule_in_a_package_that_is_installed_beside_fedlora(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds a package without the network")
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "someones_rules").mkdir(parents=True)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "someones-rules"\nversion = "1.0"\n'
        '[project.entry-points."fedlora.aggregators"]\nmedianish = "someones_rules:Medianish"\n'
    )
    (source / "someones_rules" / "__init__.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlora.aggregators import Aggregator, Claim\n"
        "@dataclass(frozen=True)\n"
        "class Medianish(Aggregator):\n"
        "    claims = Claim.MIXED_RANKS\n"
        "    trim: float = 0.1\n"
        "    def aggregate(self, state, updates): return state\n"
    )
    install = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([sys.executable, "-m", "pip", *install, str(source)], check=True, env=quiet, timeout=300)
    use = (
        "from fedlora.aggregators import load_aggregator, rules, names_claiming, Claim\n"
        "rule = load_aggregator('medianish', {'trim': 0.2})\n"
        "known = 'medianish' in rules and 'medianish' in names_claiming(Claim.MIXED_RANKS)\n"
        "print(type(rule).__module__, rule.trim, known)\n"
    )
    here = str(Path(__file__).parents[3])
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), here])}
    done = subprocess.run(
        [sys.executable, "-c", use], check=True, env=path, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.stdout.strip() == "someones_rules 0.2 True"


# ------------------------------------------------------------------------------------------------ mixed ranks


@pytest.mark.parametrize("rule", [FedAvg(), Fair()])
def test_a_rule_that_cannot_take_mixed_ranks_names_those_that_can(rule: FedAvg | Fair) -> None:
    state = rule.init(initial())
    with raises(RuleError, "mixed-ranks", "client 6", ", ".join(names_claiming(Claim.MIXED_RANKS))):
        rule.plan(state, ClientSpec(6, layout(2)))
    assert {"ffa", "flora"} <= set(names_claiming(Claim.MIXED_RANKS))


def test_ffa_refuses_a_rank_above_the_global_one_and_a_scale_of_zero() -> None:
    state = FfaLora().init(initial())
    with raises(RuleError, "rank-above-global", "client 6", "rank 8", "rank 4"):
        FfaLora().plan(state, ClientSpec(6, layout(8)))
    with raises(RuleError, "scale-is-zero", "client 6", "'m'"):
        FfaLora().plan(state, ClientSpec(6, layout(4, scale=0.0)))


def test_ffa_refuses_an_a_of_zero_and_an_update_on_another_a() -> None:
    with raises(RuleError, "frozen-a-is-zero", "'m'"):
        FfaLora().init(AdapterState({"m": LoraPair(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)}))
    state = FfaLora().init(initial())
    moved = state.adapter.with_tensors({"m:A": state.adapter.pairs["m"].A + 1e-3})
    with raises(RuleError, "frozen-a-changed", "client 2", "'m'"):
        FfaLora().aggregate(state, [ClientUpdate(2, moved, 1.0)])


def test_ffa_sends_the_truncation_of_the_global_b_in_the_receivers_scale() -> None:
    start = replace(initial(), pairs={"m": replace(initial().pairs["m"], B=noise(40, 4, seed=1))})
    plan = FfaLora().plan(FfaLora().init(start), ClientSpec(0, layout(2, scale=2.0)))
    whole, mine = start.pairs["m"], plan.adapter.pairs["m"]
    assert torch.equal(mine.A, whole.A[:2])
    torch.testing.assert_close(mine.delta(), 0.5 * whole.B[:, :2].double() @ whole.A[:2].double())
    assert plan.trains == plan.sends == {"B", "dense"}


def test_clients_of_another_base_model_are_refused() -> None:
    for rule in (FedAvg(), FfaLora(), Flora(), Fair()):
        state = rule.init(initial())
        with raises(RuleError, "modules-differ", "client 1"):
            rule.plan(state, ClientSpec(1, {"other": PairShape(40, 30, 4, 0.5)}))
        with raises(RuleError, "shape-mismatch", "client 1", "[41, 30]", "[40, 30]"):
            rule.plan(state, ClientSpec(1, {"m": PairShape(41, 30, 4, 0.5)}))


def test_dora_is_averaged_or_refused_by_name() -> None:
    name = "m.lora_magnitude_vector"
    dora = AdapterState(initial().pairs, {name: torch.ones(40)})
    with raises(RuleError, "dora-unsupported", name):
        Flora().init(dora)
    for rule in (FedAvg(), FfaLora(), Fair()):
        state = rule.init(dora)
        updates = [
            ClientUpdate(k, AdapterState(dora.pairs, {name: torch.full((40,), float(k))}), 1.0 + k) for k in range(3)
        ]
        assert torch.allclose(rule.aggregate(state, updates).adapter.dense[name], torch.tensor((0 + 2 + 6) / 6))


# ------------------------------------------------------------------------------------------------ means


def test_the_mean_has_the_dtype_of_the_global_adapter_whoever_answers_first() -> None:
    for order in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        mean = WeightedMean()
        for dtype in order:
            mean.add({"x": torch.ones(3, dtype=dtype)}, 1.0)
        assert mean.result(like={"x": torch.zeros(3)})["x"].dtype == torch.float32


def test_weights_from_tiny_to_huge_are_only_ratios() -> None:
    for unit in (1e-30, 1e18, 1e300):
        mean = WeightedMean()
        mean.add({"x": torch.tensor([1.0, 2.0])}, unit)
        mean.add({"x": torch.tensor([4.0, 5.0])}, 2 * unit)
        assert torch.equal(mean.result()["x"], torch.tensor([3.0, 4.0]))


def test_integers_have_no_mean() -> None:
    with raises(RuleError, "not-averageable", "bn.num_batches_tracked"):
        WeightedMean().add({"bn.num_batches_tracked": torch.tensor(3)}, 1.0)


# ------------------------------------------------------------------------------------------------ FLoRA's log


def test_every_way_to_the_same_version_ends_with_the_same_bits() -> None:
    base_updates = log(30)
    there: dict[str, torch.Tensor] = {}
    states = [there]
    for base_update in base_updates:
        there = accumulate(there, base_update)
        states.append(there)
    for compacted in (base_updates, compact(base_updates)):
        for since, acc in enumerate(states):
            plan = ClientPlan(AdapterState(), base_version=30, base_updates=catch_up(compacted, since))
            assert torch.equal(follow(acc, since, plan)["m"], there["m"])


def test_a_late_client_is_sent_what_is_smaller() -> None:
    base_updates = log(30)
    size, dense = base_updates[0].change.nbytes(), 40 * 30 * 4
    fits = dense // size
    assert 1 < fits < 29
    assert [base_update.since for base_update in catch_up(base_updates, 30 - fits)] == list(range(30 - fits, 30))
    (only,) = catch_up(base_updates, 30 - fits - 1)
    assert (only.since, only.version, only.change.nbytes()) == (0, 30, dense)
    assert catch_up(base_updates, 30) == ()


def test_the_log_stays_bounded_and_keeps_the_last_round() -> None:
    base_updates: tuple[BaseUpdate, ...] = ()
    dense = 40 * 30 * 4
    for base_update in log(60):
        base_updates = compact((*base_updates, base_update))
        assert sum(m.change.nbytes() for m in base_updates) <= 2 * dense
        assert base_updates[-1] is base_update
        assert base_updates[0].since == 0
        assert all(one.version == two.since for one, two in pairwise(base_updates))
    wide = (*log(1, rank=400), replace(log(2, rank=400)[1]))
    assert [(m.since, m.version, bool(m.change.dense)) for m in compact(wide)] == [(0, 1, True), (1, 2, False)]


def test_a_short_log_is_left_alone() -> None:
    base_updates = log(3)
    assert compact(base_updates) == base_updates
    assert compact(()) == catch_up((), 0) == ()


def test_a_version_that_the_log_does_not_know_starts_from_the_pristine_base() -> None:
    base_updates = compact(log(40))
    inside = base_updates[0].version - 1
    assert inside > 0
    plan = ClientPlan(AdapterState(), base_version=40, base_updates=catch_up(base_updates, inside))
    assert plan.base_updates[0].since == 0
    nonsense = {"m": torch.full((40, 30), 7.0)}
    assert torch.equal(follow(nonsense, inside, plan)["m"], follow({}, 0, plan)["m"])
    # A client that is ahead of the server (which went back to an older checkpoint) starts again too.
    assert follow(nonsense, 3, ClientPlan(AdapterState(), base_version=0)) == {}
    assert [base_update.since for base_update in catch_up(log(4), 9)] == [0, 1, 2, 3]


def test_a_base_update_leads_to_a_later_version() -> None:
    with raises(RuleError, "base-update-backwards", 2):
        BaseUpdate(2, 2, AdapterState())


def test_changes_are_summed_in_float32_from_the_pristine_base() -> None:
    """200 merges of 1e-4 into a bfloat16 weight of 1: added one by one they vanish, summed first they are all there."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    step = AdapterState({"m": LoraPair(one, one, 1e-4)})
    acc: dict[str, torch.Tensor] = {}
    in_place = torch.ones(1, 1, dtype=torch.bfloat16)
    for version in range(200):
        acc = accumulate(acc, BaseUpdate(version, version + 1, step))
        in_place += 1e-4
    assert acc["m"].dtype == torch.float32
    assert float(acc["m"]) == pytest.approx(0.02, rel=1e-5)
    assert float(in_place) == 1.0


def test_accumulate_changes_neither_of_its_inputs() -> None:
    base_update = log(1)[0]
    acc = {"m": torch.ones(40, 30)}
    accumulate(acc, replace(base_update, since=1, version=2))
    assert torch.equal(acc["m"], torch.ones(40, 30))


def test_clients_that_come_and_go_end_with_one_base() -> None:
    """Ten rounds of random sampling, dropped replies, a restart from nothing and a client that joins in round 7."""
    generator = torch.Generator().manual_seed(0)
    rule, ranks = Flora(), (4, 2, 8, 1, 3)
    state = rule.init(initial(), seed=5)
    held: dict[int, tuple[dict[str, torch.Tensor], int]] = {k: ({}, 0) for k in range(5)}
    served: dict[str, torch.Tensor] = {}
    for turn in range(10):
        if turn == 5:
            held[2] = ({}, 0)
        replies = []
        for k in range(5):
            sampled = torch.rand((), generator=generator) < 0.6 or k == 0
            if not sampled or (k == 4 and turn < 7):
                continue
            acc, version = held[k]
            plan = rule.plan(state, ClientSpec(k, layout(ranks[k], 8 / ranks[k]), version))
            held[k] = (follow(acc, version, plan), plan.base_version)
            pair = plan.adapter.pairs["m"]
            trained = replace(pair, B=0.01 * noise(40, pair.rank, seed=100 * turn + k))
            if torch.rand((), generator=generator) < 0.8 or k == 0:
                adapter = AdapterState({"m": trained}, plan.adapter.dense)
                replies.append(ClientUpdate(k, adapter, 1.0 + k, plan.base_version))
        state = rule.aggregate(state, replies)
        served = accumulate(served, state.base_updates[-1])
    assert state.base_version == 10
    for k, (acc, version) in held.items():
        plan = rule.plan(state, ClientSpec(k, layout(ranks[k], 8 / ranks[k]), version))
        assert torch.equal(follow(acc, version, plan)["m"], served["m"])


def test_a_stale_update_is_refused_by_name_and_versions() -> None:
    rule = Flora()
    state = rule.init(initial())
    plan = rule.plan(state, ClientSpec(0, layout(4)))
    state = rule.aggregate(state, [ClientUpdate(0, plan.adapter, 1.0)])
    with raises(RuleError, "stale-base", "client 3", 0, 1):
        rule.aggregate(state, [ClientUpdate(3, plan.adapter, 1.0, base_version=0)])


def test_flora_stacks_the_same_bits_in_whatever_order_replies_come_and_keeps_its_log_bounded() -> None:
    rule = Flora()
    states = [rule.init(initial()), rule.init(initial())]
    for turn in range(20):
        replies = [
            ClientUpdate(k, AdapterState({"m": pair(2, 10 * turn + k)}, {"head": torch.ones(5)}), 1.0 + k, turn)
            for k in range(3)
        ]
        states = [rule.aggregate(states[0], replies), rule.aggregate(states[1], [replies[k] for k in (2, 0, 1)])]
        last = [state.base_updates[-1].change.pairs["m"] for state in states]
        assert torch.equal(last[0].A, last[1].A)
        assert torch.equal(last[0].B, last[1].B)
        assert sum(base_update.change.nbytes() for base_update in states[0].base_updates) <= 2 * 40 * 30 * 4


def test_flora_gives_each_client_its_own_fresh_start_in_each_round() -> None:
    rule = Flora()
    state = rule.init(initial(), seed=1)
    seeds = {
        rule.plan(replace(state, round=turn, seed=seed), ClientSpec(k, layout(2))).fresh_seed
        for turn in range(3)
        for k in range(3)
        for seed in range(2)
    }
    assert len(seeds) == 18
    plan = rule.plan(state, ClientSpec(0, layout(2)))
    assert plan.adapter.layout == layout(2)
    assert not plan.adapter.pairs["m"].B.any()


def test_flora_puts_a_trained_start_into_the_base_and_keeps_the_head_in_the_adapter() -> None:
    start = AdapterState({"m": pair(4, 1)}, {"head": torch.ones(5)})
    state = Flora().init(start)
    assert state.base_version == 1
    assert not state.adapter.pairs["m"].B.any()
    torch.testing.assert_close(accumulate({}, state.base_updates[0])["m"], start.pairs["m"].delta().float())
    after = Flora().aggregate(state, [ClientUpdate(0, replace(start, dense={"head": torch.zeros(5)}), 1.0, 1)])
    assert not after.adapter.dense["head"].any()
    assert not after.adapter.pairs["m"].B.any()


def test_the_change_of_a_round_cannot_be_read_off_a_log_that_lost_it() -> None:
    before = GlobalState(initial(), base_updates=log(3))
    after = GlobalState(initial(), base_updates=(BaseUpdate(0, 5, AdapterState(dense={"m": torch.ones(40, 30)})),))
    with raises(RuleError, "log-compacted", 3):
        broadcast_change(before, after)


# ------------------------------------------------------------------------------------------------ the final artefact


@pytest.mark.parametrize("max_rank", [8, 64])
def test_the_equivalent_adapter_does_what_base_and_adapter_do(max_rank: int) -> None:
    base_updates = (*compact(log(30)), BaseUpdate(30, 31, AdapterState({"n": pair(3, 99)})))
    state = GlobalState(
        AdapterState({"m": pair(2, 50), "n": pair(2, 51)}, {"head": torch.ones(2)}), base_updates=base_updates
    )
    adapter, error = equivalent_adapter(state, max_rank)
    acc: dict[str, torch.Tensor] = {}
    for base_update in base_updates:
        acc = accumulate(acc, base_update)
    gap = size = 0.0
    for name, change in acc.items():
        whole = change.double() + state.adapter.pairs[name].delta()
        gap += float((adapter.pairs[name].delta() - whole).square().sum())
        size += float(whole.square().sum())
        assert adapter.pairs[name].rank <= max_rank
    measured = math.sqrt(gap / size)
    if max_rank == 64:
        assert measured < 1e-6
        assert error < 1e-6
    else:
        assert measured > 0.1
        assert error == pytest.approx(measured, rel=1e-4)
    assert adapter.dense.keys() == {"head"}


def test_without_a_change_of_the_base_the_adapter_is_the_artefact() -> None:
    state = GlobalState(initial())
    assert equivalent_adapter(state, 2) == (state.adapter, 0.0)
