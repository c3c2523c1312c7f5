"""The report of a run, as text: what it says, that data stays data, and that a screen reader gets along."""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from support.report_runs import HOSTILE, make_run, records

from fedlora.config import parse_config
from fedlora.report._client_charts import KINDS, participation_grid
from fedlora.report._clients import participation
from fedlora.report._facts import Facts, interval, statuses
from fedlora.report._warnings import warnings
from fedlora.report.figures import DARK, LIGHT, Chart
from fedlora.report.line_charts import Line, line_chart
from fedlora.report.page import render_report, visible, write_report
from fedlora.runs.rundir import RunDir
from fedlora.sanitize import clean_lines

pytestmark = pytest.mark.charts

PRIVACY = """
server.weighting = "uniform"
privacy = { epsilon = 8, delta = 1e-5, max_grad_norm = 1.0, public_examples = 100 }
"""


class Page(HTMLParser):
    """A strict reader: raises where a tag is not closed by its own end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(write_report(make_run(tmp_path)).read_text())


# ---------------------------------------------------------------------------------------------- what it says


@pytest.mark.slow
def test_the_report_is_one_file_that_names_nothing_outside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = write_report(run)
    text = path.read_text()
    page = Page(text)
    assert path == run.report
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "link", "base", "form")]
    assert all(href.startswith("#") for attributes in page.all("a") if (href := attributes["href"] or ""))
    assert len(page.all("style")) == 1  # charts bring none of their own
    assert not re.search(r"url\(|@import|src=|https?://", text)
    assert all(str(a["href"]).startswith("#") for _, a in page.tags if "href" in a)
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy)


@pytest.mark.slow
def test_it_says_the_last_figures_and_the_first(page: Page) -> None:
    assert "accuracy went from 50.0% to 90.0%" in page.text
    assert "4 of 4" in page.text
    assert "48.0 kB" in page.text  # 4 rounds of 3 clients that send 1 kB, and of 9 kB received
    for words in ("films 80.0%", "all 90.0%", "Example 1", "yes films"):
        assert words in page.text


@pytest.mark.slow
@pytest.mark.parametrize("start", ["", "adapter.start = '/of/another'"])
def test_round_0_has_the_name_of_what_it_measured(start: str, tmp_path: Path) -> None:
    text = " ".join(Page(render_report(Facts.read(make_run(tmp_path, toml=start)))).words)
    own, other = ("starting adapter", "base model") if start else ("base model", "starting adapter")
    assert text.count(own) >= 5, "the chart, its caption, two tables and the samples"
    assert other not in text


@pytest.mark.slow
def test_each_class_and_every_figure_have_a_row(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    classes = {HOSTILE: {"examples": 7.0, "precision": 0.25, "recall": 0.5, "f1": 1 / 3, "auroc": math.nan}}
    lines = [record | {"ece": 0.125, "classes": classes} for record in run.read_metrics()]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(" ".join(Page(render_report(Facts.read(RunDir.open(run.path)))).words).split())
    assert "Each class after round 4 class examples precision recall f1 auroc" in text
    assert " ".join(clean_lines(HOSTILE, 1000).split()) + " 7 25.0% 50.0% 33.3% -" in text
    assert "All figures on the test set base model round 4 accuracy 50.0% 90.0% loss 0.7 0.6 ece 0.125 0.125" in text
    assert "seconds evaluate" not in text


@pytest.mark.slow
def test_the_grid_counts_every_client_of_every_round(page: Page) -> None:
    counted = Counter(kind for record in records()[1:] for kind in statuses(record).values())
    assert counted == {"answered": 12, "late": 4, "refused": 4, "offline": 4}
    for kind, number in counted.items():
        assert f"{KINDS[kind][2]}: {number}" in page.text


def test_of_two_kinds_the_outcome_wins_over_the_question() -> None:
    record = {"asked": [0, 1, 2, 3], "answered": [0], "late": [1], "missing": [2], "offline": [4]}
    record["refused"] = {"3": "its privacy budget is spent: its ledger stands at epsilon 8"}
    assert statuses(record) == {0: "answered", 1: "late", 2: "missing", 3: "spent", 4: "offline"}


@pytest.mark.slow
def test_a_private_run_shows_its_claim_and_no_secret(tmp_path: Path) -> None:
    run = make_run(tmp_path, toml=PRIVACY)
    lines = [{**r, "epsilon": 2.0 * r["round"], "clients": {}} if r["round"] else r for r in records()]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write_json(
        "result.json", {"rounds": 4, "privacy": {"epsilon": 7.9, "statement": "THE CLAIM", "unit": "example"}}
    )
    text = Page(write_report(run).read_text()).text
    assert "THE CLAIM" in text
    assert "ε = 7.9" in text
    assert "epsilon 8" in text  # the last of the curve
    assert text.count("secret under [privacy]") == 2  # losses, and who holds what


@pytest.mark.slow
@pytest.mark.parametrize("claim", [{"epsilon": None, "statement": "THE CLAIM"}, {}], ids=["finished", "not finished"])
def test_an_epsilon_that_is_infinite_or_unknown_is_not_that_of_an_earlier_round(
    tmp_path: Path, claim: dict[str, Any]
) -> None:
    run = make_run(tmp_path, toml=PRIVACY)
    lines = [{**r, "epsilon": 2.0 if r["round"] < 4 else None, "clients": {}} if r["round"] else r for r in records()]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.write_json("result.json", {"rounds": 4, "privacy": claim})
    text = Page(write_report(run).read_text()).text
    assert "no ε can be stated" in text
    assert "ε = 2" not in text


@pytest.mark.slow
def test_a_run_that_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.path / "result.json").unlink()
    assert f"fedlora run --resume {run.path}" in Page(write_report(run).read_text()).text


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["partition.json", "samples.json", "environment.json", "result.json", "metrics.jsonl"])
def test_whatever_is_missing_leaves_its_section_out(tmp_path: Path, gone: str) -> None:
    run = make_run(tmp_path)
    (run.path / gone).unlink()
    page = Page(write_report(run).read_text())
    links = {a["href"] for a in page.all("a")}
    assert ("#samples" in links) == (gone != "samples.json")
    assert ("#partition" in links) == (gone != "partition.json")
    assert ("#learning" in links) == (gone != "metrics.jsonl")


@pytest.mark.slow
def test_many_clients_and_rounds_stay_readable_and_small(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path, rounds=250, clients=240)).read_text()
    assert "A cell is 4 clients in 3 rounds" in text
    assert len(text) < 1_500_000


@pytest.mark.slow
def test_writing_it_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


# ---------------------------------------------------------------------------------------------- data stays data


@pytest.mark.slow
def test_data_never_becomes_markup(tmp_path: Path) -> None:
    run, tame = make_run(tmp_path / "a", HOSTILE), make_run(tmp_path / "b", "word")
    hostile, usual = (Page(write_report(made).read_text()) for made in (run, tame))
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in usual.tags}
    names = [{name for _, attributes in made.tags for name in attributes} for made in (hostile, usual)]
    assert names[0] == names[1]
    assert HOSTILE.replace("\x00", "\ufffd").replace("\u202e", "") in hostile.text


@settings(max_examples=50)
@given(st.text())
@pytest.mark.slow
def test_a_text_is_shown_as_it_is_but_for_what_cannot_be_seen(text: str) -> None:
    assert Page(f"<p>{html.escape(str(visible(text)))}</p>").text == clean_lines(text)


# ---------------------------------------------------------------------------------------------- for everybody


@pytest.mark.slow
def test_pictures_tables_and_headings_speak(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)
    assert all(a["aria-labelledby"] in ids for _, a in page.tags if "aria-labelledby" in a)
    pictures = page.all("svg")
    assert len(pictures) >= 10  # each of five charts for desks and for phones
    assert len({a["aria-label"] for a in pictures}) == len(pictures) / 2
    assert all(a["role"] == "img" and len(str(a["aria-label"])) > 30 for a in pictures)
    tables = page.all("table")
    assert len(page.all("caption")) == len(tables)
    assert all(a["scope"] in ("row", "col") for a in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.all("html")[0]["lang"] == "en"
    assert any(a.get("name") == "viewport" for a in page.all("meta"))


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, "contrast ratio" and "relative luminance"."""

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out(colours: dict[str, str]) -> None:
    for name, behind in (("ink", "page"), ("soft", "page"), ("link", "page"), ("ink", "panel"), ("soft", "panel")):
        assert contrast(colours[name], colours[behind]) >= 4.5, name
    for name in ("ink", "warn"):
        assert contrast(colours[name], colours["warnbg"]) >= 4.5
    for name in (f"c{k}" for k in range(7)):
        assert contrast(colours[name], colours["page"]) >= 3.0, name
    for kind, (colour, mark, _) in KINDS.items():
        if mark and kind != "idle":  # a mark is written in the page's colour on the kind's
            assert contrast(colours[colour], colours["page"]) >= 3.0, kind


# ---------------------------------------------------------------------------------------------- warnings


def facts(toml: str = "", **more: Any) -> Facts:
    config = parse_config(f"rounds = 4\n{toml}")
    return Facts(**{"path": Path("runs/x"), "config": config, "records": records(), "finished": True, **more})


def test_a_run_without_trouble_has_no_warnings() -> None:
    good = [{**r, "refused": {}, "late": [], "offline": [], "answered": list(range(6))} for r in records()]
    assert warnings(facts(records=good, partition={"test_size": 5000, "sizes": [9] * 6})) == []


LAST = {"accuracy": 0.9, "domains": {"films": {"accuracy": 0.8}}}


@pytest.mark.parametrize(("right", "size"), [(50, 50), (0, 50), (96, 100), (1, 3), (700, 1000)])
def test_the_interval_of_an_accuracy_is_wilsons(right: int, size: int) -> None:
    low, high = interval(facts(partition={"test_size": size}), {"accuracy": right / size}) or (0.0, 0.0)
    assert interval(facts(partition={"test_size": 9999}), {"accuracy": right / size, "sample": size}) == (low, high)
    expected = binomtest(right, size).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=2e-4)


@pytest.mark.parametrize(
    ("sentence", "last", "more"),
    [
        ("stopped after round 4 of 4", {}, {"finished": False}),
        ("Round 4 changed nothing", {"lost": True}, {}),
        ("Round 4 changed nothing: fewer clients", {"rule": {"dropped": 1.0}}, {}),
        ("After round 4 the accuracy was no finite number", {"accuracy": None}, {}),
        ("Training did not help: accuracy 50.0% at the end, 50.0% before", {"accuracy": 0.5}, {}),
        ("Round 3 was better (80.0%) than the last one (70.0%)", {"accuracy": 0.7}, {}),
        ("Worse than before the training: films", {"domains": {"films": {"accuracy": 0.4}}}, {}),
        (
            "only 60 examples: the last accuracy lies between 80 and 95% (95% interval)",
            {"accuracy": 0.9},
            {"partition": {"test_size": 60}},
        ),
        (
            "Always answering with the largest class would reach 96.0%",
            {"accuracy": 0.96, "majority_share": 0.96, "balanced_accuracy": 0.5},
            {"partition": {"test_size": 1000}},
        ),
        (
            "The test set is 20 of 1,000 examples",
            {},
            {"partition": {"test_note": "the test set is 20 of 1,000 examples"}},
        ),
        ("4 of 20 replies were refused; most often because: its norm", {}, {}),
        ("2 replies were not there at the deadline", {"missing": [0, 1]}, {}),
        ("no reply of theirs was used: 6, 7", {}, {"partition": {"sizes": [9] * 8}}),
        ("3 examples are on no client: too few", {}, {"partition": {"dropped": 3, "note": "too few"}}),
        ("by up to 90% of that mean's size", {"aggregation_error": 0.9}, {}),
        ("a robust rule departs from the mean on purpose", {"aggregation_error": 0.9}, {}),
        ("adapter/ is an approximation of the trained model, off by 5.0%", {}, {"result": {"relative_error": 0.05}}),
        ("Epsilon 50 is a weak promise", {}, {"result": {"privacy": {"epsilon": 50.0}}}),
        ("these clients is spent, and they are not asked any more: 2", {"spent": [2]}, {}),
        ("changes that no commit holds", {}, {"environment": {"commit": "abc+changes"}}),
        (
            "went on after round 2 with other versions",
            {},
            {"environment": {"python": "3.11.1", "resumed": [{"round": 2, "python": "3.12.0"}]}},
        ),
    ],
)
def test_what_a_reader_should_know_is_said(sentence: str, last: dict[str, Any], more: dict[str, Any]) -> None:
    lines = records()
    lines[-1] = {**lines[-1], **last}
    assert any(sentence in line for line in warnings(facts(records=lines, **more))), warnings(
        facts(records=lines, **more)
    )


def test_for_perplexity_less_is_better() -> None:
    lines = [{"round": k, "perplexity": value, "loss": 1.0} for k, value in enumerate((30.0, 20.0, 10.0))]
    found = warnings(facts(records=lines, metric="perplexity"))
    assert not any("Training did not help" in line or "was better" in line for line in found)
    found = warnings(facts(records=lines[::-1], metric="perplexity"))
    assert found == warnings(facts(records=lines[::-1], metric="perplexity"))
    lines = [{**line, "round": 2 - line["round"]} for line in lines][::-1]
    assert any("Training did not help" in line for line in warnings(facts(records=lines, metric="perplexity")))


def test_a_figure_without_an_interval_is_not_better_for_being_of_other_examples() -> None:
    lines = [{"round": k, "perplexity": value, "loss": 1.0} for k, value in enumerate((30.0, 10.0, 20.0))]
    assert any("Round 1 was better" in line for line in warnings(facts(records=lines, metric="perplexity")))
    lines[1]["sample"] = 320
    assert not any("was better" in line for line in warnings(facts(records=lines, metric="perplexity")))


# ---------------------------------------------------------------------------------------------- charts


def drawn(lines: list[Line]) -> list[tuple[list[list[float]], str]]:
    """The lines of a chart as an SVG has them: the points of each, and the letters of its path."""
    svg = ElementTree.fromstring(line_chart(lines, "loss").svg(400))
    paths = [p.get("d", "") for p in svg.iter("path") if "stroke-width: 1.8" in p.get("style", "")]
    return [([list(map(float, p.split())) for p in re.split("[ML]", d)[1:]], re.sub("[^ML]", "", d)) for d in paths]


def test_a_line_is_interrupted_where_it_has_no_value() -> None:
    ((_, letters),) = drawn([Line("x", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, 2.0)])])
    assert letters == "MLML"


def test_a_higher_value_is_drawn_higher() -> None:
    ((((x0, y0), (x1, y1), (x2, y2)), _),) = drawn([Line("x", [(0, 1.0), (1, 3.0), (2, 2.0)])])
    assert x0 < x1 < x2
    assert y0 > y2 > y1  # SVG counts from the top


@pytest.mark.slow
def test_a_chart_has_the_colours_of_its_page_alone(page: Page) -> None:
    styles = [str(a["style"]) for tag, a in page.tags if "style" in a]
    assert {name for style in styles for name in re.findall(r"var\(--(\w+)\)", style)} <= set(LIGHT) == set(DARK)
    assert any("var(--c0)" in style for style in styles)
    assert not [style for style in styles if re.search(r"#|rgb|(?:fill|stroke): (?!none|var)", style)]


def test_a_line_is_described_by_its_first_and_last_value() -> None:
    chart = line_chart([Line("mean", [(0, 1.0), (1, 2.0), (3, 4.0)], bands=[((0, 1, 3), (2, 3, 5))])], "loss")
    for words in ("loss", "mean 1 in round 0", "4 in round 3", "from 3 to 5"):
        assert words in chart.label


def test_neighbours_of_one_kind_are_one_shape_in_its_colour() -> None:
    grid = np.array([[1, 1, 7], [7, 4, 1]])
    svg = ElementTree.fromstring(Chart(participation_grid(grid, ["a", "b"], [1, 2, 3]), "label", "").svg(400))
    wide = {}
    for place in (1, 4, 7):
        fill = f"fill: var(--{list(KINDS.values())[place][0]})"
        path = next(p.get("d", "") for p in svg.iter("path") if fill in p.get("style", ""))
        xs = [[float(x) for x in re.findall(r"[ML] (\S+)", shape)] for shape in path.split("z")[:-1]]
        wide[place] = [max(x) - min(x) for x in xs]
    cell = wide[4][0]
    assert wide == {1: pytest.approx([2 * cell, cell], abs=0.1), 4: [cell], 7: pytest.approx([cell, cell], abs=0.1)}


@pytest.mark.slow
@pytest.mark.parametrize(("client", "round_"), [(0, 2), (1, 1), (129, 241)])
def test_one_refusal_is_seen_among_many_clients_and_rounds(client: int, round_: int) -> None:
    lines: list[dict[str, Any]] = [{"round": k, "answered": list(range(130)), "refused": {}} for k in range(1, 242)]
    lines[round_ - 1] |= {"answered": [k for k in range(130) if k != client], "refused": {str(client): "no"}}
    (chart,) = [block for block in participation(facts(records=lines)) if isinstance(block, Chart)]
    shown = ElementTree.fromstring(chart.svg(760))
    assert [text.text for text in shown.iter("text")].count("refused") == 1
    assert "refused: 1." in chart.caption


@pytest.mark.slow
def test_the_page_of_a_run_is_what_its_facts_give(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert write_report(run).read_text() == render_report(Facts.read(RunDir.open(run.path)))
