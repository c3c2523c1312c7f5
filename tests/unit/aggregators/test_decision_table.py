"""docs/choosing-a-rule.md says what our simulations found; its table is written here, from their results.csv.

WRITE_DOCS=1 .venv/bin/python -m pytest tests/unit/aggregators/test_decision_table.py  # after a simulation
"""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

from scipy.stats import t

from fedlora.aggregators import Claim, rules

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "choosing-a-rule.md"
WRITE = "WRITE_DOCS"
MARKS = ("<!-- figures -->", "<!-- end of figures -->")
NAMES = {"fedavg": "FedAvg", "ffa": "FFA-LoRA", "flora": "FLoRA", "fair": "LoRA-FAIR"}
STUDIES = {"rules": "reviews and tweets", "heterogeneity": "digits, label skew", "privacy": "digits, DP-SGD"}

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


def ratio(row: Row, other: Row, way: str) -> str:
    return f"{points(row, f'{way} (bytes) mean') / points(other, f'{way} (bytes) mean'):.2f}"


def table() -> str:
    lines = [
        "| clients | FedAvg, % | FFA-LoRA, points | FLoRA, points | LoRA-FAIR, points |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (study, case), rows in cases().items():
        name = case.replace("epsilon inf", "no privacy")
        leads = " | ".join(lead(rows.get(rule)) for rule in list(NAMES)[1:])
        lines.append(f"| {STUDIES[study]}: {name} | {mean_with_interval(rows['fedavg'])} | {leads} |")
    rows = cases()["rules", "domain shift"]
    costs = ["| bytes, times FedAvg's (domain shift) | FedAvg | FFA-LoRA | FLoRA | LoRA-FAIR |", lines[1]]
    for way, said in (("sent", "a client sends"), ("received", "a client receives")):
        costs.append(f"| {said} | " + " | ".join(ratio(rows[rule], rows["fedavg"], way) for rule in NAMES) + " |")
    return "\n".join([*lines, "", *costs])


def test_the_tables_are_those_of_the_simulations() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    found, after = rest.split(MARKS[1])
    wanted = f"\n\n{table()}\n\n"
    if os.environ.get(WRITE):
        PAGE.write_text(f"{before}{MARKS[0]}{wanted}{MARKS[1]}{after}", encoding="utf-8")
        found = wanted
    assert found == wanted, f"the page is stale: run this test with {WRITE}=1"


def test_each_simulation_is_named_with_its_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for study in STUDIES:
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


def test_the_advice_follows_from_the_figures() -> None:
    """Each sentence under "What follows", in its order; a sentence that no longer holds must be written anew."""
    assert decided("flora") == {}
    assert decided("fair") == {}
    assert decided("ffa") == {
        ("rules", "domain shift"): "worse",
        ("rules", "domain and label shift"): "worse",
        ("rules", "mixed ranks"): "worse",
        ("privacy", "epsilon 6"): "better",
        ("privacy", "epsilon 1"): "better",
    }
    found = cases()
    rows = found["rules", "domain shift"]
    assert 0.5 <= float(ratio(rows["ffa"], rows["fedavg"], "sent")) < 0.55
    assert float(ratio(rows["flora"], rows["fedavg"], "received")) > 3
    # FLoRA's seeds are further apart than FedAvg's, in each case of the first study.
    for case in ("domain shift", "domain and label shift", "mixed ranks"):
        rows = found["rules", case]
        assert points(rows["flora"], "accuracy sd") > 2 * points(rows["fedavg"], "accuracy sd")
    # Mixed ranks: FedAvg and LoRA-FAIR at the smallest rank on all clients, the others at the clients' own.
    assert {rule: row["adapter.rank"] for rule, row in found["rules", "mixed ranks"].items()} == {
        "fedavg": "2",
        "ffa": "32",
        "flora": "32",
        "fair": "2",
    }
    # LoRA-FAIR and FedAvg: within half a point where all clients' labels are alike.
    for case in ("domain shift", "mixed ranks"):
        row = found["rules", case]["fair"]
        assert max(abs(points(row, "difference low")), abs(points(row, "difference high"))) < 0.5
    skewed = [
        found["heterogeneity", f"alpha {alpha}"]["fedavg"]["accuracy mean"] for alpha in ("0.05", "0.1", "0.3", "1")
    ]
    assert skewed == sorted(skewed)
