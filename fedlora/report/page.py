"""The report of a run: one HTML file that needs nothing else, to read on a screen, on a phone, on paper or aloud.

It has no scripts, and its content security policy forbids it to fetch anything. The template escapes everything that
comes from data, and takes out characters that cannot be seen or that change how others are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora import __version__
from fedlora.files import write_atomically
from fedlora.passed_in import adapter_name, last_part, shown
from fedlora.progress import format_bytes, format_metric, format_seconds
from fedlora.report import _clients, _learning, _setup
from fedlora.report._blocks import Block
from fedlora.report._facts import Facts, interval, number
from fedlora.report._warnings import warnings
from fedlora.report.figures import DARK, LIGHT, NARROW, WIDE
from fedlora.runs.rundir import RunDir
from fedlora.sanitize import clean_lines

if TYPE_CHECKING:
    from jinja2 import Template

SECTIONS: Mapping[str, tuple[str, Callable[[Facts], list[Block]]]] = {
    "learning": ("What was learned", _learning.learning),
    "evaluation": ("On the clients' own examples", _clients.evaluation),
    "samples": ("What the model says", _learning.samples),
    "clients": ("How far apart the clients are", _learning.client_losses),
    "error": ("Aggregation error", _learning.aggregation_error),
    "traffic": ("Traffic and time", _clients.traffic),
    "privacy": ("Privacy", _clients.privacy),
    "participation": ("Who took part", _clients.participation),
    "partition": ("What each client holds", _clients.partition),
    "config": ("Configuration", _setup.configuration),
    "versions": ("Versions and machine", _setup.versions),
}
MOST_TEXT = 1_000_000
"""Characters of one text; what is longer nobody reads in a report."""


def write_report(run: RunDir) -> Path:
    """Write the report of a run, finished or not, into its folder.

    Raises:
        RunDirError: a file of the run is damaged; the message says which.
    """
    write_atomically(run.report, render_report(Facts.read(run)).encode())
    return run.report


def render_report(facts: Facts) -> str:
    """The page as text."""
    sections = {key: (title, blocks) for key, (title, make) in SECTIONS.items() if (blocks := make(facts))}
    return _template().render(
        facts=facts,
        config=facts.config,
        model=last_part(shown(facts.config.model.name)),
        data=last_part(shown(facts.config.data.source)),
        start=adapter_name(facts.config.adapter.start) if facts.config.adapter.start else "",
        tiles=list(_tiles(facts)),
        warnings=warnings(facts),
        sections=sections,
        widths={"wide": WIDE, "narrow": NARROW},
        light=LIGHT,
        dark=DARK,
        version=__version__,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def visible(value: object) -> object:
    """A value of the template as it may be shown: markup as it is, all else as text that reads as it is written."""
    return value if hasattr(value, "__html__") else clean_lines(value, MOST_TEXT)


def _tiles(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """A name, a figure and a remark."""
    config = facts.config
    if facts.evaluated:
        last = facts.last
        small = f"after round {last['round']}"
        known = interval(facts, last)
        if known is not None:
            low, high = (100 * end for end in known)
            small += f", {low:.1f} to {high:.1f}% (95%, {facts.test_size} test examples)"
        if facts.value(last, "majority_share") is not None:
            balanced, largest = (facts.show(last, key) for key in ("balanced_accuracy", "majority_share"))
            small += f"; balanced {balanced}, largest class {largest}"
        yield facts.metric.replace("_", " "), facts.show(last), small
    if facts.result.get("best"):
        best = facts.result["best"]
        small = f"round {best['round']}, on validation examples"
        small += f"; the run ended early: {facts.result['stopped']}" if facts.result.get("stopped") else ""
        yield f"best {best['metric'].replace('_', ' ')}", format_metric(best["metric"], best["value"]), small
    took = "" if config.privacy is not None else f", {format_seconds(facts.total('seconds'))}"
    yield "rounds", f"{facts.done} of {config.rounds}", ("finished" if facts.finished else "not finished") + took
    used = [record for record in facts.rounds if record.get("answered") and number(record.get("bytes_up"))]
    each = sum(record["bytes_up"] for record in used) / max(1, sum(len(record["answered"]) for record in used))
    small = f"{format_bytes(each)} sent by a client in a round" if used else ""
    yield "traffic", format_bytes(facts.total("bytes_up") + facts.total("bytes_down")), small
    errors = [error for _, error in facts.points("aggregation_error")]
    if errors:
        yield "aggregation error", "exact" if max(errors) < 1e-6 else f"{errors[-1]:.2g}", "0 is exact"
    claim = facts.result.get("privacy") or {}
    spent = [record["epsilon"] for record in facts.rounds if "epsilon" in record]
    if config.privacy is None:
        yield "privacy", "none", "no [privacy] in the config"
    elif claim or spent:
        epsilon = number(claim.get("epsilon") if claim else spent[-1])  # none: infinite, or it cannot be known
        said = "no ε can be stated" if epsilon is None else f"ε = {epsilon:.3g}"
        yield "privacy spent", said, f"at δ = {config.privacy.delta:g}, for one {config.privacy.unit}"
