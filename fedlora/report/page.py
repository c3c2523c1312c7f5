"""The report of a run: one HTML file that needs nothing else, to read on a screen, on a phone, on paper or aloud.

It has no scripts, and its content security policy forbids it to fetch anything. Everything that comes from data is
escaped when the page is built (see `_markup`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora import __version__
from fedlora.config import RunConfig, flatten
from fedlora.files import write_atomically
from fedlora.progress import format_bytes, format_metric, format_seconds
from fedlora.report import _people, _sections
from fedlora.report._facts import Facts, interval, number
from fedlora.report._markup import Html, details, el, table
from fedlora.report._style import style_sheet
from fedlora.report._warnings import warnings
from fedlora.runs.rundir import RunDir

SECTIONS: Mapping[str, tuple[str, Callable[[Facts], Html | None]]] = {
    "learning": ("What was learned", _sections.learning),
    "samples": ("What the model says", _people.samples),
    "clients": ("How far apart the clients are", _sections.spread_of_clients),
    "error": ("Aggregation error", _sections.aggregation_error),
    "traffic": ("Bytes and time", _sections.traffic),
    "privacy": ("Privacy", _people.privacy),
    "participation": ("Who took part", _people.participation),
    "partition": ("Who holds what", _people.partition),
}

LARGE_CLASS = 0.6
"""Share of the test set above which its largest class is named beside the accuracy."""


def write_report(run: RunDir) -> Path:
    """Write the report of a run, finished or not, into its folder.

    Raises:
        RunDirError: a file of the run is damaged; the message says which.
    """
    write_atomically(run.report, render_report(Facts.read(run)).encode())
    return run.report


def render_report(facts: Facts) -> str:
    """The page as text."""
    sections = {
        key: (title, content) for key, (title, make) in SECTIONS.items() if (content := make(facts)) is not None
    }
    sections["config"] = ("Configuration", _configuration(facts.config))
    sections["versions"] = ("Versions and machine", _versions(facts.environment))
    links = (el("li", el("a", title, href=f"#{key}")) for key, (title, _) in sections.items())
    body = [
        el("header", el("h1", facts.config.name), el("p", _summary(facts)), _tiles(facts), _warnings(facts)),
        el(
            "main",
            el("nav", el("ul", *links), aria_label="Sections"),
            *(
                el("section", el("h2", title, id=key), content, aria_labelledby=key)
                for key, (title, content) in sections.items()
            ),
        ),
        el(
            "footer",
            el(
                "p",
                f"Written by fedlora {__version__}; nothing in this page is fetched from elsewhere.",
            ),
        ),
    ]
    head = [
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        el("title", f"{facts.config.name}: fedlora report"),
        el("style", Html(style_sheet())),
    ]
    return f"<!DOCTYPE html>\n{el('html', el('head', *head), el('body', *body), lang='en')}\n"


def _summary(facts: Facts) -> str:
    config, metric, evaluated = facts.config, facts.metric, facts.evaluated
    done = facts.records[-1]["round"] if facts.records else 0
    who = f"{facts.clients} clients" if facts.clients else "Clients"
    model, data = (
        Path(name).name if Path(name).is_absolute() else name for name in (config.model.name, config.data.source)
    )
    line = f"{who} trained {model} on {data} for {done} round{'s' * (done != 1)} "
    line += f"with the rule {config.strategy.name}."
    if len(evaluated) > 1:
        first, last = (format_metric(metric, evaluated[k][metric]) for k in (0, -1))
        line += f" On the test set, {metric.replace('_', ' ')} went from {first} to {last}"
        largest = number(evaluated[-1].get("majority_share"))
        if largest is not None and largest > LARGE_CLASS:
            was, now = (
                format_metric("balanced_accuracy", number(evaluated[k].get("balanced_accuracy"))) for k in (0, -1)
            )
            line += f"; {format_metric('majority_share', largest)} of it are one class, and balanced over the classes "
            line += f"it went from {was} to {now}"
        line += "."
    return line


def _tiles(facts: Facts) -> Html:
    return el(
        "dl",
        *(el("div", el("dt", name), el("dd", value, el("small", small))) for name, value, small in _figures(facts)),
        class_="tiles",
    )


def _figures(facts: Facts) -> Iterator[tuple[str, str, str]]:
    metric, evaluated = facts.metric, facts.evaluated
    if evaluated:
        last = float(evaluated[-1][metric])
        known = interval(facts, last)
        small = f"after round {evaluated[-1]['round']}"
        if known is not None:
            low, high = (100 * end for end in known)
            small += f", {low:.1f} to {high:.1f}% (95%, {facts.partition['test_size']} test examples)"
        if (largest := number(evaluated[-1].get("majority_share"))) is not None:
            balanced = format_metric("balanced_accuracy", number(evaluated[-1].get("balanced_accuracy")))
            small += f"; balanced {balanced}, largest class {format_metric('majority_share', largest)}"
        yield metric.replace("_", " "), format_metric(metric, last), small
    done = facts.records[-1]["round"] if facts.records else 0
    state = "finished" if facts.finished else "not finished"
    took = "" if facts.config.privacy is not None else f", {format_seconds(facts.total('seconds'))}"
    yield "rounds", f"{done} of {facts.config.rounds}", state + took
    traffic = facts.total("bytes_up") + facts.total("bytes_down")
    yield "traffic", format_bytes(traffic), _people.traffic_of_a_client(facts)
    errors = [e for r in facts.rounds if (e := number(r.get("aggregation_error"))) is not None]
    if errors:
        yield "aggregation error", "exact" if max(errors) < 1e-6 else f"{errors[-1]:.2g}", "0 is exact"
    claim = facts.result.get("privacy") or {}
    spent = [r["epsilon"] for r in facts.rounds if "epsilon" in r]
    if facts.config.privacy is None:
        yield "privacy", "none", "no [privacy] in the config"
    elif claim or spent:
        value = number(claim.get("epsilon") if claim else spent[-1])  # none: infinite, or it cannot be known
        yield (
            "privacy spent",
            "no ε can be stated" if value is None else f"ε = {value:.3g}",
            f"at δ = {facts.config.privacy.delta:g}, for one {facts.config.privacy.unit}",
        )


def _warnings(facts: Facts) -> Html | None:
    found = warnings(facts)
    if not found:
        return None
    inner = [el("h2", "Worth knowing", id="warnings"), el("ul", *(el("li", line) for line in found))]
    return el("section", *inner, class_="warnings", aria_labelledby="warnings")


def _configuration(config: RunConfig) -> Html:
    given, usual = (flatten(one.model_dump(mode="json"), lists=True) for one in (config, RunConfig()))
    changed = [key for key in given if given[key] != usual.get(key)]
    rows = [
        (el("code", key), el("code", _say(given[key])), _say(usual[key]) if key in usual else "-") for key in changed
    ]
    others = [(el("code", key), el("code", _say(value))) for key, value in given.items() if key not in changed]
    parts = [table(("key", "value", "default"), rows, "What this run sets otherwise than the defaults")]
    parts.append(details("All other keys", table(("key", "value"), others, "As by default")))
    parts.append(
        details("The config as a file", el("pre", el("code", config.to_toml()), class_="scroll", tabindex="0"))
    )
    return el("div", *parts, class_="words")


def _versions(environment: Mapping[str, Any]) -> Html:
    flat = flatten({key: value for key, value in environment.items() if key != "resumed"}, lists=True)
    rows = [(key.removeprefix("packages."), _say(value)) for key, value in flat.items()]
    parts = [table(("what", "version or value"), rows, "What the run was computed with")]
    for again in environment.get("resumed") or ():
        rows = [
            (key.removeprefix("packages."), _say(value))
            for key, value in flatten(again, lists=True).items()
            if key != "round"
        ]
        parts.append(
            details(f"Resumed after round {again.get('round')}", table(("what", "version or value"), rows, "Then"))
        )
    return el("div", *parts, class_="words")


def _say(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(_say(inner) for inner in value) or "empty" if isinstance(value, list) else str(value)
