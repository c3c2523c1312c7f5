"""docs/choosing-a-rule.md says what our simulations found; its table is written here, from their results.csv.

WRITE_DOCS=1 .venv/bin/python -m pytest tests/unit/aggregators/test_decision_table.py  # after a simulation
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

from fedlora.aggregators import Claim, rules

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "choosing-a-rule.md"
WRITE = "WRITE_DOCS"
MARKS = ("<!-- figures -->", "<!-- end of figures -->")
NAMES = {"fedavg": "FedAvg", "ffa": "FFA-LoRA", "flora": "FLoRA", "fair": "LoRA-FAIR"}
STUDIES = {"heterogeneity": "label skew", "privacy": "DP-SGD"}

Row = dict[str, str]
Cases = dict[tuple[str, str], dict[str, Row]]


def cases() -> Cases:
    """(simulation, case) -> rule -> its row of results.csv."""
    found: Cases = {}
    for study in STUDIES:
        with (ROOT / "simulations" / study / "results.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault((study, row["case"]), {})[row["strategy.name"]] = row
    return found


def points(row: Row, name: str) -> float:
    return 100 * float(row[name])


def mean_with_interval(row: Row) -> str:
    """Mean and 95% interval of the mean (Student's), from the seeds' standard deviation."""
    seeds = len(row["seeds"].split())
    half = float(t.ppf(0.975, seeds - 1)) * points(row, "accuracy sd") / math.sqrt(seeds)
    return f"{points(row, 'accuracy mean'):.1f} ± {half:.1f}"


def lead(row: Row | None) -> str:
    """By how much a rule is ahead of FedAvg; bold where the interval leaves 0 out."""
    if row is None:
        return "not run"
    numbers = [points(row, name) + 0.0 for name in ("difference", "difference low", "difference high")]
    mean, low, high = (f"{number:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0") for number in numbers)
    text = f"{mean} ({low} to {high})"
    return text if row["verdict"] == "undecided" else f"**{text}**"


# ------------------------------------------------------------------------------------- every rule at its own best rate


def rows_of_rules() -> list[Row]:
    """All rows of simulations/rules."""
    with (ROOT / "simulations" / "rules" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def every_rule() -> dict[str, dict[str, dict[int, Row]]]:
    """Of simulations/rules: setting -> rule -> seed -> its row; at the rate that is best on a seed that is left out."""
    rows = rows_of_rules()
    best: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: float(row["lr"])):
        key = row["setting"], row["rule"]
        if row["seed"] == "100" and (key not in best or float(row["accuracy"]) > float(best[key]["accuracy"])):
            best[key] = row
    found: dict[str, dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row["seed"] != "100" and row["lr"] == best[row["setting"], row["rule"]]["lr"]:
            found.setdefault(row["setting"], {}).setdefault(row["rule"], {})[int(row["seed"])] = row
    return found


def fedavg_at(setting: str, rate: str) -> Iterator[tuple[int, Row]]:
    """Its runs at a rate, by seed; without the one that chose."""
    for row in rows_of_rules():
        if (row["setting"], row["rule"], row["lr"]) == (setting, "FedAvg", rate) and row["seed"] != "100":
            yield int(row["seed"]), row


def paired(setting: str, rule: str, rate: str | None = None) -> tuple[float, float] | None:
    """By how many points a rule is ahead of FedAvg (at another rate, if one is named) on the same seeds, and half of
    the 95% interval; None: not run."""
    rows = every_rule()[setting]
    base = rows["FedAvg"] if rate is None else dict(fedavg_at(setting, rate))
    if rows.get(rule, {}).keys() != base.keys():
        return None
    leads = [points(rows[rule][seed], "accuracy") - points(base[seed], "accuracy") for seed in base]
    half = float(t.ppf(0.975, len(leads) - 1)) * stdev(leads) / math.sqrt(len(leads))
    return mean(leads), half


def ahead(setting: str, rule: str) -> str:
    """The lead with its interval; bold where that leaves 0 out."""
    found = paired(setting, rule)
    if found is None:
        return ""
    text = f"{found[0]:+.1f} ± {found[1]:.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")
    return f"**{text}**" if abs(found[0]) > found[1] else text


def ratio(setting: str, rule: str, way: str) -> float:
    """A rule's bytes over FedAvg's, a round and client."""
    rows = every_rule()[setting]
    return float(rows[rule][0][way]) / float(rows["FedAvg"][0][way])


def rules_table() -> str:
    """A row for each rule of the first setting, the best first."""
    settings = list(every_rule())
    names = [rule for rule in every_rule()[settings[0]] if paired(settings[0], rule)]
    names += [rule for one in settings[1:] for rule in every_rule()[one] if rule not in names and paired(one, rule)]
    leads = {rule: paired(settings[0], rule) or (-math.inf, 0.0) for rule in names}
    lines = [f"| ahead of FedAvg, points | {' | '.join(settings)} | sends | receives |"]
    lines.append("| --- |" + " ---: |" * (len(settings) + 2))
    for rule in sorted(names, key=lambda rule: -leads[rule][0]):
        if rule == "FedAvg":
            said = [
                f"{mean([points(row, 'accuracy') for row in every_rule()[one][rule].values()]):.1f}%"
                for one in settings
            ]
        else:
            said = [ahead(one, rule) for one in settings]
        first = next(one for one in settings if paired(one, rule))
        costs = [f"{ratio(first, rule, way):.2f}" for way in ("up", "down")]
        lines.append(f"| {rule} | {' | '.join([*said, *costs])} |")
    return "\n".join(lines)


def table() -> str:
    """The other studies."""
    lines = [
        "| clients | FedAvg, % | FFA-LoRA, points | FLoRA, points | LoRA-FAIR, points |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (study, case), rows in cases().items():
        name = case.replace("epsilon inf", "no privacy")
        leads = " | ".join(lead(rows.get(rule)) for rule in list(NAMES)[1:])
        lines.append(f"| {STUDIES[study]}: {name} | {mean_with_interval(rows['fedavg'])} | {leads} |")
    return "\n".join(lines)


def test_the_tables_are_those_of_the_simulations() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    found, after = rest.split(MARKS[1])
    wanted = f"\n\n{rules_table()}\n\n{table()}\n\n"
    if os.environ.get(WRITE):
        PAGE.write_text(f"{before}{MARKS[0]}{wanted}{MARKS[1]}{after}", encoding="utf-8")
        found = wanted
    assert found == wanted, f"the page is stale: run this test with {WRITE}=1"


def test_each_simulation_is_named_with_its_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for study in ("rules", *STUDIES):
        assert f"../simulations/{study}/README.md" in text
        assert f"python simulations/{study}/run.py" in text


def test_the_claims_are_those_of_the_rules() -> None:
    assert {name for name in NAMES if Claim.EXACT in rules.get(name).claims} == {"ffa", "flora"}
    assert {name for name in NAMES if Claim.MIXED_RANKS in rules.get(name).claims} == {"ffa", "flora"}
    assert {name for name in NAMES if Claim.LINEAR in rules.get(name).claims} == {"fedavg", "ffa"}
    assert Claim.ANY_TENSORS in rules.get("fedavg").claims


def verdicts(rule: str) -> dict[tuple[str, str], str]:
    return {case: rows[rule]["verdict"] for case, rows in cases().items() if rule in rows}


def decided(rule: str) -> dict[tuple[str, str], str]:
    return {case: verdict for case, verdict in verdicts(rule).items() if verdict != "undecided"}


def better_and_worse(setting: str) -> tuple[set[str], set[str]]:
    """The rules whose lead over FedAvg has an interval above 0, and below."""
    leads = {rule: found for rule in every_rule()[setting] if rule != "FedAvg" and (found := paired(setting, rule))}
    return (
        {rule for rule, (middle, half) in leads.items() if middle > half},
        {rule for rule, (middle, half) in leads.items() if middle < -half},
    )


def test_the_advice_follows_from_the_figures() -> None:
    """Each sentence under "What follows", in its order; a sentence that no longer holds must be written anew."""
    better, worse = better_and_worse("label shift")
    # SGD before another rule; SCAFFOLD is not told apart from FedAvg with it, and FedDyn is behind.
    rows = every_rule()["label shift"]
    sgd, scaffold = (
        [points(row, "accuracy") for row in rows[rule].values()] for rule in ("FedAvg, SGD", "SCAFFOLD, SGD")
    )
    assert stdev(sgd) < stdev(points(row, "accuracy") for row in rows["FedAvg"].values())
    gains = [one - other for one, other in zip(scaffold, sgd, strict=True)]
    assert abs(mean(gains)) < float(t.ppf(0.975, len(gains) - 1)) * stdev(gains) / math.sqrt(len(gains))
    assert worse == {"FedDyn"}
    assert round(paired("label shift", "FedDyn")[0]) == -14
    assert round(paired("label shift", "FedAvg, SGD")[0]) == 8
    # Those that are ahead with AdamW: at FedAvg's own rate, at the two beside it, and at fewer bytes.
    at_all = {"RAVAN, rank 64", "FLoRA", "FLoRIST", "FlexLoRA"}
    at_one = {"Fed-SB, rank 32", "FedAdagrad"}
    assert better == {"FedAvg, SGD", "SCAFFOLD, SGD"} | at_all | at_one
    for rule in at_all | at_one:
        leads = [paired("label shift", rule, rate) for rate in (None, "0.0056", "0.018")]
        assert all(middle > half for middle, half in leads) == (rule in at_all)
    assert {3, 7} <= {round(paired("label shift", rule)[0]) for rule in at_all} <= {3, 4, 5, 6, 7}
    assert max(ratio("label shift", "RAVAN, rank 64", way) for way in ("up", "down")) < 1
    # Mixed ranks: who is ahead of FedAvg with the smallest rank, and who behind.
    better, worse = better_and_worse("mixed ranks")
    assert better == {"FedAvg, rank 32"}
    assert worse == {"FFA-LoRA", "RoLoRA", "raFLoRA", "FSLoRA", "FSLoRA, one scale"}
    assert round(paired("mixed ranks", "FedAvg, rank 32")[0]) == 7
    assert round(paired("mixed ranks", "FFA-LoRA")[0]) == -6
    # FFA-LoRA: half of the bytes (the head, which is not halved, among them), level without noise.
    assert ratio("label shift", "FFA-LoRA", "up") < 0.57
    assert decided("ffa") == {("privacy", "epsilon 6"): "better", ("privacy", "epsilon 1"): "better"}
    assert decided("flora") == decided("fair") == {}
    skewed = [
        cases()["heterogeneity", f"alpha {alpha}"]["fedavg"]["accuracy mean"] for alpha in ("0.05", "0.1", "0.3", "1")
    ]
    assert skewed == sorted(skewed)
