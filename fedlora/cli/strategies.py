"""`fedlora strategies`: what rules there are, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlora.cli._common import MaybeConfig, Overrides, app, open_console
from fedlora.errors import FedloraError

if TYPE_CHECKING:
    from rich.console import Console

    from fedlora.aggregators import Aggregator
    from fedlora.config import RunConfig

GROUPS = ("exact", "mixed ranks", "robust", "server optimiser", "drift", "fairness", "personal", "baseline")
"""Headings under which rules are listed; others come last."""


@app.command()
def strategies(config_path: MaybeConfig = None, overrides: Overrides = None) -> None:
    """List the aggregation rules: paper, claims, config fields, and what a client sends and receives in a round."""
    import dataclasses

    from rich.padding import Padding
    from rich.text import Text

    from fedlora.aggregators import rules
    from fedlora.config import RunConfig, load_config

    console = open_console()
    config = load_config(config_path, overrides or []) if config_path else RunConfig()
    sizes = _traffic(config, console)
    groups = dict.fromkeys(group_of(cls) for _, cls in rules.items())
    for group in sorted(groups, key=lambda group: GROUPS.index(group) if group in GROUPS else len(GROUPS)):
        console.print(Text(group.upper(), style="bold dim"))
        console.print()
        for name, cls in rules.items():
            if group_of(cls) != group:
                continue
            console.print(Text(name, style="bold"))
            lines = [(cls.__doc__ or "").strip().splitlines()[0], cls.paper]
            claims = [claim.name.lower().replace("_", " ") for claim in cls.claims if claim.name]
            lines.append("claims: " + (", ".join(claims) or "none"))
            fields = [_field(field) for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
            lines.append("fields: " + (", ".join(fields) or "none"))
            lines.append(sizes.get(name, ""))
            text = Text("\n".join(line for line in lines if line))
            console.print(Padding(text, (0, 0, 1, 4), expand=False))


def group_of(rule: type[Aggregator]) -> str:
    """The heading of a rule: its own `group`, or what its claims say."""
    from fedlora.aggregators import Claim

    if rule.group or Claim.ROBUST in rule.claims:
        return rule.group or "robust"
    if Claim.EXACT in rule.claims:
        return "exact"
    return "mixed ranks" if Claim.MIXED_RANKS in rule.claims else "baseline"


def _field(field: Any) -> str:
    import dataclasses

    from fedlora.aggregators import Aggregator, rules

    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, Aggregator):
        name = next(name for name, cls in rules.items() if cls is type(default))
        return f'{field.name} = {{name = "{name}"}}'
    return field.name if default is dataclasses.MISSING else f"{field.name} = {default!r}"


def _traffic(config: RunConfig, console: Console) -> dict[str, str]:
    """For each rule one line on its bytes with the model, ranks and clients of a config."""
    from fedlora.aggregators import load_aggregator, rules
    from fedlora.errors import AssetError
    from fedlora.evaluation.traffic import measure_traffic
    from fedlora.federation.initial_state import require_method
    from fedlora.federation.load_rule import require_base_unchanged
    from fedlora.progress import format_bytes
    from fedlora.training import open_workspace

    try:
        with console.status(f"loading {config.model.name}"):
            workspace = open_workspace(config)
    except AssetError as error:
        console.print(f"(no sizes: {error})\n", style="dim", markup=False)
        return {}
    initial = workspace.base.initial_adapter(config.seed)
    number = len(workspace.data.clients)
    asked = config.server.clients_per_round or max(1, round(config.server.fraction * number))
    ranks = config.clients.ranks or (config.adapter.rank,)
    layouts = [workspace.base.layout(ranks[k % len(ranks)]) for k in range(asked)]
    about = f"{config.model.name}, rank {'/'.join(map(str, ranks))}, {asked} clients a round"
    if config.wire.up != "float32":
        about += f", {config.wire.up} on the way up"
    if config.wire.up == "topk":
        about += f" ({config.wire.fraction:g} of the entries)"
    if config.wire.down != "float32":
        about += f", {config.wire.down} on the way down"
    console.out(f"bytes for one client in one round, with {about}\n", style="dim")
    lines = {}
    for name in rules:
        fields = config.strategy.fields if name == config.strategy.name else {}
        try:
            rule = load_aggregator(name, fields)
            require_method(rule, workspace.base.method)
            require_base_unchanged(config.wire, name, rule)
            found = measure_traffic(rule, initial, layouts, config.wire)
        except FedloraError as error:
            lines[name] = f"not with this config: {error}"
            continue
        lines[name] = f"bytes: sends {format_bytes(found.up)}, receives {format_bytes(found.down)}"
        if round(found.first_down) != round(found.down):
            lines[name] += f" ({format_bytes(found.first_down)} in the first round)"
    return lines
