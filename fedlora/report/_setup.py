"""The sections about how a run was set up: its config, and the versions and the machine that it ran on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.config import RunConfig, flatten
from fedlora.report._blocks import Block, Listing, Table
from fedlora.report._facts import Facts


def configuration(facts: Facts) -> list[Block]:
    """The resolved config, what differs from the defaults first."""
    given, usual = (flatten(one.model_dump(mode="json"), lists=True) for one in (facts.config, RunConfig()))
    changed = [key for key in given if given[key] != usual.get(key)]
    rows = [(key, _say(given[key]), _say(usual[key]) if key in usual else "-") for key in changed]
    others = [(key, _say(value)) for key, value in given.items() if key not in changed]
    return [
        Table("What this run sets differently from the defaults", ("key", "value", "default"), rows, words=True),
        Table("Keys with their default values", ("key", "value"), others, "All other keys", words=True),
        Listing("The config as a file", facts.config.to_toml()),
    ]


def versions(facts: Facts) -> list[Block]:
    """What the run was computed with, and with what it was resumed."""

    def table(values: Mapping[str, Any], caption: str, folded: str = "") -> Table:
        flat = flatten({key: value for key, value in values.items() if key not in ("resumed", "round")}, lists=True)
        rows = [(key.removeprefix("packages."), _say(value)) for key, value in flat.items()]
        return Table(caption, ("name", "version or value"), rows, folded, words=True)

    tables: list[Block] = [table(facts.environment, "What the run was computed with")]
    for again in facts.environment.get("resumed") or ():
        words = f"Resumed after round {again.get('round')}"
        tables.append(table(again, "What the run was resumed with", words))
    return tables


def _say(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_say, value)) or "empty" if isinstance(value, list) else str(value)
