from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.command_line import invoke
from support.errors import raises
from support.made_runs import make_run

from fedlora.compare import (
    Group,
    compare,
    compare_cases,
    difference,
    differing_keys,
    group_runs,
    plot_curves,
    read_run,
    read_runs,
    render_table,
    student_interval,
)
from fedlora.errors import ConfigError, RunDirError
from fedlora.provenance import WORDS

PERPLEXITY = ("task.name=causal-lm", "model.name=x")
Family = Callable[..., list[Path]]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Runs of one setting, one for each final figure, with seeds from 0."""

    def make(name: str, finals: Sequence[float], *overrides: str, **more: object) -> list[Path]:
        return [
            make_run(tmp_path / f"{name}-{seed}", [0.5, final], f"seed={seed}", *overrides, **more)  # type: ignore[arg-type]
            for seed, final in enumerate(finals)
        ]

    return make


# ---------------------------------------------------------------------------------------------- groups


def test_seeds_names_and_machines_make_no_group(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "a", [0.5, 0.6], "seed=3", "runtime.threads=1", "output=here"),
        make_run(tmp_path / "b", [0.5, 0.7], "seed=1", "runtime.cohort=2", "tracking.name=wandb"),
        make_run(tmp_path / "c", [0.5, 0.8], "seed=1", "train.lr=0.5"),
    ]
    runs, _ = read_runs(paths)
    groups = group_runs(runs)
    assert [[run.path.name for run in group.runs] for group in groups] == [["b", "a"], ["c"]]
    assert [group.label for group in groups] == ["lr=0.001", "lr=0.5"]


def test_a_label_says_no_more_than_it_must(tmp_path: Path) -> None:
    settings = [
        ("strategy.name=fedavg", "train.lr=0.1"),
        ("strategy.name=fair", "strategy.regularisation=0.5", "train.lr=0.1"),
        ("strategy.name=fair", "strategy.regularisation=0.7", "train.lr=0.2"),
    ]
    paths = [make_run(tmp_path / f"run{k}", [0.5, 0.6], *overrides) for k, overrides in enumerate(settings)]
    found = compare(paths)
    assert [group.label for group in found.groups] == ["fedavg, lr=0.1", "fair, lr=0.1", "fair, lr=0.2"]
    # One of two equal learning rates is no setting: the rule alone tells these apart.
    assert [group.label for group in compare(paths[::2]).groups] == ["fedavg", "fair"]
    assert differing_keys(found.groups).T.to_dict("list") == {
        "train.lr": ["0.1", "0.1", "0.2"],
        "strategy.name": ["fedavg", "fair", "fair"],
        "strategy.regularisation": ["-", "0.5", "0.7"],
    }
    assert list(differing_keys(found.groups[::-1]).loc["strategy.regularisation"]) == ["0.7", "0.5", "-"]


def test_the_same_seed_twice_is_two_groups(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, [0.5, 0.6]) for name in ("before", "after")]
    assert [group.label for group in compare(paths).groups] == ["(before)", "(after)"]


def test_a_folder_stands_for_the_runs_in_it_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "grid" / f"s{seed}", [0.5, 0.6], f"seed={seed}") for seed in range(3)]
    make_run(tmp_path / "grid" / "select" / "s9", [0.5, 0.6], "seed=9")
    (group,) = compare([tmp_path / "grid", *paths, tmp_path / "grid" / ".." / "grid" / "s0"]).groups
    assert [run.seed for run in group.runs] == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_the_metrics(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "a", [0.5, 0.9, math.nan, 0.7], domains={"x": 0.9, "y": 0.4}, aggregation_error=0.25, epsilon=3.0
    )
    run = read_run(path)
    assert run.curve.to_dict() == {0: 0.5, 1: 0.9, 3: 0.7}
    assert (run.final, run.best, run.worst_domain) == (0.7, 0.9, 0.4)
    assert [run.by_round(name).sum() for name in ("bytes_up", "bytes_down", "seconds")] == [300, 150, 6.0]
    assert run.by_round("aggregation_error").to_dict() == {1: 0.25, 2: 0.25, 3: 0.25}
    assert run.epsilon is None  # a claim is what result.json says, not what a round counts


def test_reaching_costs_all_rounds_until_it_is_reached(tmp_path: Path) -> None:
    up = read_run(make_run(tmp_path / "a", [0.5, 0.6, math.nan, 0.8, 0.7]))
    assert [up.reach(value) for value in (0.5, 0.6, 0.7, 0.8, 0.81)] == [(0, 0.0), (1, 150), (3, 450), (3, 450), None]
    down = read_run(make_run(tmp_path / "b", [9.0, 5.0, 3.0], *PERPLEXITY, metric="perplexity"))
    assert [down.reach(value) for value in (9.0, 5.0, 4.0, 2.9)] == [(0, 0.0), (1, 150), (2, 300), None]
    assert (down.best, down.higher_is_better) == (3.0, False)


def test_a_mean_and_the_sample_standard_deviation(family: Family) -> None:
    finals = [0.61, 0.64, 0.72]
    figures = compare(family("a", finals)).figures()
    assert figures.loc[0, "accuracy"] == f"{100 * np.mean(finals):.1f} ± {100 * np.std(finals, ddof=1):.1f}%"


def test_a_mean_over_the_lucky_seeds_is_not_shown(family: Family) -> None:
    found = compare(family("a", [0.61, 0.7]), reach=0.65)
    assert found.figures().loc[0, "bytes to 65.0%"] == "1 of 2 got there"
    assert math.isnan(found.raw().loc[0, "bytes to 65.0% (bytes) mean"])
    both = compare(family("b", [0.7, 0.7]), reach=0.65)
    assert both.figures().loc[0, "bytes to 65.0%"] == "150 B"
    assert both.raw().loc[0, "bytes to 65.0% (bytes) mean"] == 150


def test_a_run_that_diverged_is_not_averaged_away(family: Family) -> None:
    paths = family("a", [0.6, 0.8])
    lines = (paths[1] / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), "accuracy": None})
    (paths[1] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = compare(paths)
    assert found.figures().loc[0, "accuracy"] == "nan ± nan%"
    assert found.raw()[["accuracy mean", "accuracy sd"]].isna().all(axis=None)


# ---------------------------------------------------------------------------------------------- is it better


def groups_of(mine: list[Path], other: list[Path]):
    runs, _ = read_runs([*mine, *other])
    one, two = group_runs(runs)
    return one, two


def test_over_seeds_alone_it_is_students_paired_interval(family: Family) -> None:
    from scipy.stats import ttest_rel

    mine, other = [0.71, 0.74, 0.69, 0.78, 0.73], [0.70, 0.70, 0.70, 0.73, 0.71]
    found = difference(*groups_of(family("a", mine), family("b", other, "train.lr=0.1")), draws=40_000)
    interval = ttest_rel(mine, other).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(mine) - np.mean(other))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.02 * (found.high - found.low))
    assert not found.by_example


@pytest.mark.slow
def test_a_difference_turned_round_is_its_negative(family: Family) -> None:
    draw = np.random.default_rng(0)
    mine = family("a", [0.7, 0.8], correct=draw.integers(0, 2, 50))
    other = family("b", [0.6, 0.5], "train.lr=0.1", correct=draw.integers(0, 2, 50))
    one, two = groups_of(mine, other)
    forth, back = difference(one, two), difference(two, one)
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low))
    assert forth.by_example


def test_the_same_answers_are_no_better(family: Family) -> None:
    answers = np.random.default_rng(0).integers(0, 2, 60)
    one = family("a", [0.7], correct=answers, train_loss=0.5)
    found = difference(*groups_of(one, family("b", [0.7], "train.lr=0.1", correct=answers, train_loss=0.4)))
    assert (found.mean, found.verdict) == (0, "undecided")
    assert math.isnan(found.low), "an interval of no width would promise that no other test tells them apart"
    assert math.isnan(found.high)


@pytest.mark.parametrize("correct", [None, [0, 1, 1]], ids=["without outcomes", "with outcomes"])
@pytest.mark.parametrize("finals", [[0.7], [0.7, 0.8]], ids=["one seed", "two seeds"])
def test_runs_that_did_the_same_are_said_to_be_the_same(
    family: Family, finals: list[float], correct: list[float] | None
) -> None:
    mine = family("a", finals, correct=correct, train_loss=0.5)
    rounding = family("b", finals, "train.lr=0.1", correct=correct, train_loss=0.5000001)
    found = compare([*mine, *rounding])
    (said,) = found.differences.values()
    assert (said.mean, said.verdict) == (0, "the same")
    assert "run more" not in found.render()
    longer = [make_run(path.with_name(f"c{path.name}"), [0.5, 0.6, 0.7], f"seed={k}") for k, path in enumerate(mine)]
    assert difference(*groups_of(mine, longer)).verdict != "the same"


def test_seeds_that_agree_to_the_digit_decide_nothing(family: Family) -> None:
    found = difference(*groups_of(family("a", [0.72, 0.82]), family("b", [0.7, 0.8], "train.lr=0.1")))
    assert (found.mean, found.verdict) == (pytest.approx(0.02), "undecided")
    assert math.isnan(found.low)


@pytest.mark.slow
def test_one_seed_is_judged_by_its_examples(family: Family) -> None:
    size = 400
    mine = np.arange(size) < 320
    other = np.arange(size) < 280  # right only where the other is: 40 pairs differ
    one, two = groups_of(family("a", [0.8], correct=mine), family("b", [0.7], "train.lr=0.1", correct=other))
    found = difference(one, two, draws=4000)
    error = math.sqrt(0.1 * 0.9 / size)  # of a mean of 0s and 1s, 10% of which are 1
    assert (found.low, found.high) == pytest.approx((0.1 - 1.96 * error, 0.1 + 1.96 * error), abs=0.004)
    assert found.verdict == "better"
    assert "another seed may turn it round" in found.why
    apart = groups_of(
        family("c", [0.8], "train.lr=0.2", correct=mine),
        family("d", [0.7], "train.lr=0.3", correct=other, test="others"),
    )
    assert difference(*apart).verdict == "undecided"


@pytest.mark.slow
def test_examples_that_all_seeds_share_make_the_interval_wider_and_others_do_not(family: Family) -> None:
    draw = np.random.default_rng(0)
    finals = [[0.7, 0.72, 0.69], [0.7, 0.68, 0.7]]
    outcomes = [draw.integers(0, 2, 40), draw.integers(0, 2, 40)]
    alone = difference(*groups_of(family("a", finals[0]), family("b", finals[1], "train.lr=0.1")))
    shared = difference(
        *groups_of(
            family("c", finals[0], "train.lr=0.2", correct=outcomes[0]),
            family("d", finals[1], "train.lr=0.3", correct=outcomes[1]),
        )
    )
    assert shared.by_example
    assert shared.high - shared.low > 2 * (alone.high - alone.low)
    one, two = groups_of(
        family("e", finals[0], "train.lr=0.4", correct=outcomes[0]),
        family("f", finals[1], "train.lr=0.5", correct=outcomes[1]),
    )
    own = [Group("x", [replace(run, test=str(run.seed)) for run in group.runs]) for group in (one, two)]
    found = difference(*own)
    assert (found.low, found.high, found.by_example) == (alone.low, alone.high, False)


def test_lower_is_better_for_a_perplexity(family: Family) -> None:
    mine = family("a", [3.0, 3.1, 3.2], *PERPLEXITY, metric="perplexity")
    other = family("b", [9.0, 9.1, 9.3], *PERPLEXITY, "train.lr=0.1", metric="perplexity")
    one, two = groups_of(mine, other)
    assert difference(one, two).verdict == "better"
    assert difference(two, one).verdict == "worse"


def test_without_a_common_seed_there_is_no_pair(family: Family, tmp_path: Path) -> None:
    mine = family("a", [0.7, 0.8])
    other = [make_run(tmp_path / "b", [0.5, 0.6], "seed=7", "train.lr=0.1")]
    found = difference(*groups_of(mine, other))
    assert (found.verdict, found.why) == ("undecided", "they have no seed in common")
    assert "no seed in common" in compare([*mine, *other]).render()


@pytest.mark.slow
def test_chance_is_called_better_or_worse_as_rarely_as_it_says(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    runs = [read_run(make_run(tmp_path / f"run{seed}", [0.5, 0.5], f"seed={seed}")) for seed in range(5)]

    def family(finals: np.ndarray) -> Group:
        records = [[{"round": 1, "accuracy": value}] for value in finals]
        return Group("x", [replace(run, records=record) for run, record in zip(runs, records, strict=True)])

    trials = 300
    called = sum(
        difference(family(draw.normal(size=5)), family(draw.normal(size=5)), draws=400).verdict != "undecided"
        for _ in range(trials)
    )
    # Binomial(300, 0.05) is in this range with a probability of 99.9%.
    assert 4 <= called <= 29


# ---------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", [0.5, 0.6])
    half = make_run(tmp_path / "half", [0.5, 0.6], "seed=1", finished=False)
    found = compare([good, half])
    assert found.notes == [
        f"left out: {str(half)!r} is unfinished (round 0 of 1): continue it with fedlora run --resume {half}"
    ]
    assert found.notes[0] in found.render("text")
    with raises(RunDirError, "no-finished-run", half):
        compare([half])
    with raises(RunDirError, "no-such-run", "god'", good):
        compare([tmp_path / "god"])
    other = make_run(tmp_path / "other", [3.0, 2.0], *PERPLEXITY, metric="perplexity")
    with raises(ConfigError, "tasks-differ", good, "accuracy", "perplexity"):
        compare([good, other])
    for wrong in (80, 0, -0.1):
        with raises(ConfigError, "out-of-range", "accuracy"):
            compare([good], reach=wrong)
    with raises(ConfigError, "unknown-name", "'goood'"):
        compare([good], against="goood")


def test_other_test_examples_are_said(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", [0.5, 0.6], correct=[1, 0], test="these")
    two = make_run(tmp_path / "b", [0.5, 0.6], "data.limit=9", correct=[1, 0], test="those")
    (note,) = compare([one, two]).notes
    assert note.startswith("limit=none and limit=9 were not tested on the same examples")


# ---------------------------------------------------------------------------------------------- what is shown


def test_csv_has_all_digits(family: Family) -> None:
    finals = [0.6123456789012345, 0.7]
    paths = [*family("a", finals), *family("b", [0.6, 0.5], "strategy.name=ffa")]
    rows = list(csv.DictReader(io.StringIO(compare(paths, reach=0.55).render("csv"))))
    assert [row["setting"] for row in rows] == ["fedavg", "ffa"]
    assert float(rows[0]["accuracy mean"]) == sum(finals) / 2
    assert [row["verdict"] for row in rows] == ["reference", "undecided"]
    assert [row["strategy.name"] for row in rows] == ["fedavg", "ffa"]


def test_models_of_the_clients_own_stand_beside_the_shared_one_and_those_trained_alone(tmp_path: Path) -> None:
    """Of ten clients the worst tenth is one; Gini's coefficient of (0, 1, ..., 1) is 1 - 9/10."""

    def federated(*models: Sequence[float]) -> dict[str, object]:
        named = [{str(k): {"accuracy": value} for k, value in enumerate(values)} for values in models]
        return {"clients": named[0], **({"shared": {"clients": named[1]}} if len(named) > 1 else {})}

    own, even, uneven = [0.8] * 10, [0.5] * 10, [0.0, *[1.0] * 9]
    plain = make_run(tmp_path / "plain", [0.5, 0.5], "seed=0", federated=federated(even))
    assert not len(compare([plain]).at_clients())
    personal = make_run(
        tmp_path / "own", [0.5, 0.8], "seed=0", "strategy.name=fedper", federated=federated(own, uneven)
    )
    clients = [{"client": k, "own": {"accuracy": 0.25}} for k in range(10)]
    (personal / "baselines.json").write_text(json.dumps({"local_only": {"clients": clients}}))
    compared = compare([plain, personal])
    assert compared.at_clients().to_numpy().tolist() == [
        ["fedavg", "shared", "50.0%", "50.0%", "0.000"],
        ["fedper", "each client's own", "80.0%", "80.0%", "0.000"],
        ["fedper", "shared", "90.0%", "0.0%", "0.100"],
        ["fedper", "trained alone", "25.0%", "25.0%", "0.000"],
    ]
    text = compared.render()
    assert "on each client's own examples" in text
    assert "trained alone" in text


def test_text_stays_inside_its_width_and_loses_nothing() -> None:
    header = ["setting", *(f"figure {k}" for k in range(9))]
    table = pd.DataFrame([["a" * 12, *("1" * k for k in range(9))]], columns=header)
    for width in (40, 60, 1000):
        text = render_table(table, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert [text.count(f"figure {k}") for k in range(9)] == [1] * 9
    assert render_table(table, width=1000).count("\n") == 2


def test_marks_that_mean_something_are_escaped() -> None:
    table = pd.DataFrame([["x|y", "1 ± 2"]], columns=["a_b", "50%"])
    assert r"a\_b & 50\% \\" in render_table(table, "latex")
    assert r"x|y & 1 $\pm$ 2 \\" in render_table(table, "latex")
    assert r"| x\|y | 1 ± 2 |" in render_table(table, "markdown")


@pytest.mark.slow
def test_the_same_runs_give_the_same_picture(family: Family, tmp_path: Path) -> None:
    paths = [*family("a", [0.7, 0.8]), *family("b", [0.6, 0.5], "train.lr=0.1")]
    groups = compare(paths).groups
    one, two = (plot_curves(groups, tmp_path / name).read_bytes() for name in ("1.png", "2.png"))
    assert one == two
    assert one[:4] == b"\x89PNG"
    assert plot_curves(groups[:1], tmp_path / "3.png").read_bytes() != one


def test_the_command_prints_and_draws(family: Family, tmp_path: Path) -> None:
    paths = [*family("a", [0.7, 0.8]), *family("b", [0.6, 0.5], "strategy.name=ffa")]
    result = invoke("compare", *paths, "-o", tmp_path / "a.png", env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert "2 seeds cannot decide" in result.stdout
    assert (tmp_path / "a.png").is_file()
    wrong = invoke("compare", paths[0], "--format", "html")
    assert (wrong.exit_code, wrong.stderr) == (
        1,
        "error: there is no format 'html'; valid names: csv, latex, markdown, text\n",
    )


# ---------------------------------------------------------------------------------------------- several cases


def test_cases_are_compared_each_within_itself(family: Family) -> None:
    cases = {
        "easy": [*family("a", (0.80, 0.82)), *family("b", (0.90, 0.93), "strategy.name=ffa")],
        "hard": [
            *family("c", (0.40, 0.42), "train.lr=0.1"),
            *family("d", (0.30, 0.33), "strategy.name=ffa", "train.lr=0.2"),
        ],
    }
    rows = list(csv.DictReader(io.StringIO(render_table(compare_cases(cases), "csv"))))
    assert [(row["case"], row["strategy.name"]) for row in rows] == [
        ("easy", "fedavg"),
        ("easy", "ffa"),
        ("hard", "fedavg"),
        ("hard", "ffa"),
    ]
    assert [row["verdict"] for row in rows] == ["reference", "better", "reference", "worse"]
    assert [float(row["difference"]) for row in rows[1::2]] == pytest.approx([0.105, -0.095])
    assert [row["train.lr"] for row in rows] == ["", "", "0.1", "0.2"]  # the first case has one rate for all
    for case, paths in cases.items():
        alone = list(csv.DictReader(io.StringIO(compare(paths).render("csv"))))
        assert [{key: row[key] for key in alone[0]} for row in rows if row["case"] == case] == alone


def test_rules_at_one_learning_rate_are_named(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, [0.5, 0.6], f"strategy.name={name}") for name in ("fedavg", "ffa"))
    assert any("one learning rate" in note for note in compare([one, two]).notes)
    three = make_run(tmp_path / "other", [0.5, 0.6], "strategy.name=ffa", "train.lr=0.02")
    assert not any("one learning rate" in note for note in compare([one, three]).notes)


def test_a_setting_that_still_climbs_is_named(tmp_path: Path) -> None:
    """Of 0 to 0.8 in 8 rounds, the last two may bring less than 0.04 more than the two before."""

    def notes(name: str, *curves: list[float], metric: str = "accuracy") -> str:
        task = ["task.name=causal-lm"] if metric == "perplexity" else []
        flat = [curves[0][0], *[curves[0][-1]] * 8]
        paths = [make_run(tmp_path / name / "flat", flat, *task, "strategy.name=ffa", metric=metric)]
        for seed, curve in enumerate(curves):
            paths.append(make_run(tmp_path / name / str(seed), curve, *task, f"seed={seed}", metric=metric))
        return "\n".join(note for note in compare(paths).notes if "climbing" in note)

    rising = [0.0, 0.2, 0.4, 0.5, 0.6, 0.68, 0.72, 0.79, 0.8]
    level = [0.0, 0.2, 0.6, 0.7, 0.8, 0.79, 0.81, 0.78, 0.8]
    assert notes("climbs", rising).startswith("still climbing: fedavg. ")
    assert notes("level", level) == ""
    assert notes("of two seeds", rising, level).startswith("still climbing: fedavg. ")  # 6% on average
    assert notes("of three seeds", rising, level, level) == ""  # 3%
    assert notes("down", [100.0 - 99 * value for value in rising], metric="perplexity").startswith("still climbing")
    assert notes("up", [1.0 + value for value in rising], metric="perplexity") == ""
    seldom = [0.0, *[float("nan")] * 7, 0.8]  # nothing is known of the way
    assert notes("seldom", seldom) == ""


# ---------------------------------------------------------------------------------------------- what runs stand on


def pinned(folder: Path, value: float, *overrides: str, **parts: str) -> Path:
    path = make_run(folder, [0.5, value], *overrides)
    (path / "provenance.json").write_text(json.dumps({"base": "b", "test_data": "the same", **parts}))
    return path


def test_seeds_on_another_base_of_the_same_name_are_not_pooled(tmp_path: Path) -> None:
    paths = [pinned(tmp_path / f"s{seed}", 0.8, f"seed={seed}", base="ab"[seed == 2]) for seed in range(3)]
    found = compare(paths)
    assert [len(group.runs) for group in found.groups] == [2, 1]
    assert "base model" in differing_keys(found.groups).index


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "overrides", "told"),
    [
        ("base", (), True),  # swapped between two points of a sweep
        ("base", ("model.name=another",), False),
        ("tokenizer", (), True),
        ("test_data", (), True),
        ("test_data", ("data.test=/data/another.csv",), False),
        ("train_data", (), True),
        ("train_data", ("data.source=/data/another.csv",), False),
        ("class_names", ("task.labels=['b', 'a']",), False),
        ("start", (), True),
        ("start", ("adapter.start=/data/another",), False),
    ],
)
def test_between_runs_on_things_that_changed_under_one_name_there_is_no_verdict(
    tmp_path: Path, part: str, overrides: tuple[str, ...], told: bool
) -> None:
    one = [pinned(tmp_path / f"a{seed}", 0.5 + seed / 100, f"seed={seed}", **{part: "one"}) for seed in range(3)]
    other = [
        pinned(tmp_path / f"b{seed}", 0.9 + seed / 50, f"seed={seed}", "train.lr=0.5", *overrides, **{part: "two"})
        for seed in range(3)
    ]
    found = compare([*one, *other])
    (verdict,) = found.differences.values()
    said = [note for note in found.notes if "changed between" in note]
    assert (verdict.verdict == "undecided", bool(said)) == (told, told)
    assert not told or WORDS[part] in said[0]


def test_a_test_set_that_the_seed_cuts_from_the_source_may_be_another_for_each_seed(tmp_path: Path) -> None:
    paths = [pinned(tmp_path / f"s{seed}", 0.8, f"seed={seed}", test_data=f"{seed}") for seed in range(3)]
    assert [len(group.runs) for group in compare(paths).groups] == [3]


def test_perplexities_over_other_tokens_are_told_apart(tmp_path: Path) -> None:
    task = ("task.name=causal-lm", "task.format=text")
    paths = []
    for name in ("one", "two"):
        path = make_run(tmp_path / name, [9.0, 8.0], *task, f"model.name={name}", metric="perplexity")
        (path / "provenance.json").write_text(json.dumps({"tokenizer": name}))
        paths.append(path)
    assert any("different tokenizers" in note for note in compare(paths).notes)


def test_students_interval_is_that_of_the_table() -> None:
    """t(0.975) with four degrees of freedom is 2.776; one value has no interval."""
    mean, half = student_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert student_interval([7.0]) == (7.0, math.inf)
