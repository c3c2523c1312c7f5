"""`fedlora evaluate`: any adapter on any data, and how evenly it serves the clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import Adapter, Overrides, app
from fedlora.cli.compare import Form
from fedlora.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    import pandas as pd

    from fedlora.evaluation.pretrained_adapter import Source

Show = Callable[[str, float | None], str]
"""A figure's name and value as a cell."""
MOST_CLIENTS = 20
"""With more, the worst are shown."""


@app.command()
def evaluate(
    adapter: Adapter,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help=".csv, .tsv, .jsonl, .json or .parquet; else the run's test set."),
    ] = None,
    clients: Annotated[
        bool, typer.Option("--clients", help="On each client's own training examples: who is served badly?")
    ] = False,
    examples: Annotated[
        int | None, typer.Option("--examples", min=1, metavar="N", help="At most N of each client, or of each task.")
    ] = None,
    federation: Annotated[
        Path | None,
        typer.Option(
            "--federation",
            metavar="DIR",
            help="Its clients measure, on what they keep apart: a deployment's folder, a run's, or a config.",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Tasks of lm-evaluation-harness, or files of your own, with commas between: base and adapter beside "
            "each other.",
        ),
    ] = None,
    local_only: Annotated[
        Path | None,
        typer.Option(
            "--local-only", metavar="ADAPTER", help="With --lm-eval: one that a client trained alone, beside it."
        ),
    ] = None,
    overrides: Overrides = None,
    form: Form = "text",
) -> None:
    """Measure an adapter: overall and by domain, client by client, where the clients' data are, or on other tasks."""
    from fedlora.compare import render_table, require_format
    from fedlora.evaluation.pretrained_adapter import find_adapter
    from fedlora.progress import format_metric

    require_format(form)
    if examples is not None and not (clients or lm_eval):
        raise ConfigError(
            "--examples applies to --clients and --lm-eval: give one of them, or --set data.limit=...",
            code="option-without-effect",
        )
    if lm_eval is not None and (clients or data is not None or federation is not None):
        raise ConfigError(
            "--lm-eval measures on tasks of its own: leave out --data, --clients and --federation",
            code="option-without-effect",
        )
    if local_only is not None and lm_eval is None:
        raise ConfigError("--local-only applies to --lm-eval: give both", code="option-without-effect")
    if federation is not None and (clients or data is not None):
        raise ConfigError(
            "--federation measures on what the clients keep apart: leave out --data and --clients",
            code="option-without-effect",
        )
    show = _digits if form == "csv" else format_metric
    if lm_eval is not None:
        source = find_adapter(adapter, overrides or [])
        tables = {"": _outside(source, lm_eval, examples, local_only, show)}
    elif federation is not None:
        tables = _by_federation(adapter, federation, overrides or [], show)
    else:
        source = find_adapter(adapter, overrides or [], data)
        tables = _by_client(source, data, examples, show) if clients else _by_domain(source, data, show)
    typer.echo("\n".join(render_table(table, form, title) for title, table in tables.items()), nl=False)


def _by_federation(adapter: Path, place: Path, overrides: list[str], show: Show) -> dict[str, pd.DataFrame]:
    """Title -> table: the figures over all clients' examples, those of each client, and who reports nothing."""
    import pandas as pd

    from fedlora.config import changed_keys, load_config
    from fedlora.deploy.evaluation import evaluate_in_deployment, is_deployment
    from fedlora.federation.given_adapter import adapter_folder
    from fedlora.runs.rundir import RunDir
    from fedlora.simulation.run import evaluate_in_simulation

    folder = adapter_folder(adapter)
    if is_deployment(place):
        found = evaluate_in_deployment(place, folder, overrides, lambda line: typer.echo(line, err=True))
    else:
        config = load_config(place / "config.toml" if place.is_dir() else place, overrides)
        same_data = place.is_dir() and "data" not in {keys[0] for keys in changed_keys(overrides)}
        found = evaluate_in_simulation(config, folder, run=RunDir.open(place) if same_data else None)
    clients, figures = found["clients"], found["figures"]
    whole = {"clients": str(len(clients)), "examples": f"{sum(row['examples'] for row in clients.values()):g}"}
    tables = {
        "all clients' examples": pd.DataFrame([whole | {name: show(name, value) for name, value in figures.items()}]),
        "each client's own": _each("client", clients, show),
    }
    if found["left_out"]:
        tables["report nothing"] = pd.DataFrame(list(found["left_out"].items()), columns=["client", "why"])
    return tables


def _each(what: str, found: Mapping[str, Mapping[str, float]], show: Show) -> pd.DataFrame:
    """A row for each client or class: its name, its number of examples, its figures."""
    import pandas as pd

    rows = [
        {what: name, "examples": f"{row['examples']:g}"}
        | {key: show(key, value) for key, value in row.items() if key != "examples"}
        for name, row in found.items()
    ]
    return pd.DataFrame(rows)


def _outside(source: Source, tasks: str, most: int | None, local_only: Path | None, show: Show) -> pd.DataFrame:
    """A row for each figure of each task, a column for each model."""
    import pandas as pd

    from fedlora.evaluation.harness import evaluate_outside

    named = [name.strip() for name in tasks.split(",") if name.strip()]
    others = {} if local_only is None else {"local-only": local_only}
    found = evaluate_outside(source, named, most, others)
    rows = [
        {"task": name.partition("/")[0], "figure": name.partition("/")[2]}
        | {whose: show(name.partition("/")[2], figures[name]) for whose, figures in found.items()}
        for name in next(iter(found.values()))
    ]
    return pd.DataFrame(rows)


def _digits(_name: str, value: float | None) -> str:
    return "" if value is None else repr(value)


def _by_domain(source: Source, data: Path | None, show: Show) -> dict[str, pd.DataFrame]:
    """Title -> table: a row for all examples and one for each domain, and a row for each class."""
    import pandas as pd

    from fedlora.api import figures_of
    from fedlora.data import column_roles

    found, classes = figures_of(source, data)
    names = [name for name in found["all"] if name != "examples"]
    rows = [[label, str(row["examples"]), *(show(name, row[name]) for name in names)] for label, row in found.items()]
    domain = column_roles(source.config.data).get("domain") if len(found) > 1 else None
    tables = {"": pd.DataFrame(rows, columns=[domain or "", "examples", *names], dtype=object)}
    if classes:
        tables["each class"] = _each("class", classes, show)
    return tables


def _by_client(source: Source, data: Path | None, most: int | None, show: Show) -> dict[str, pd.DataFrame]:
    """Title -> table: a row for each client, and their distribution."""
    import numpy as np
    import pandas as pd

    from fedlora.data.describe import main_domains
    from fedlora.evaluation.pretrained_adapter import data_for, load_for
    from fedlora.fairness import fairness
    from fedlora.rng import derive
    from fedlora.training import evaluate as measure

    config = source.config
    if source.run is None or data is not None:
        raise ConfigError(
            "--clients needs a run, whose clients are known: name the run's folder, and no --data",
            code="clients-without-run",
        )
    if config.privacy is not None:
        raise PrivacyError(
            "how a private run's model does on each client's own examples is not disclosed: leave out --clients",
            code="figures-not-private",
        )
    federated = data_for(source, "train_data")
    shares = list(federated.clients)
    if most is not None:
        draws = [np.random.default_rng(derive(config.seed, "evaluate", k)) for k in range(len(shares))]
        shares = [np.sort(draw.permutation(rows)[:most]) for draw, rows in zip(draws, shares, strict=True)]
    held = [k for k, rows in enumerate(shares) if len(rows)]
    model, task = load_for(source, federated.train)
    found = measure(model, task, federated.train, indices=np.concatenate([shares[k] for k in held]))
    ends = np.cumsum([len(shares[k]) for k in held])
    values = {
        k: task.summarise({name: rows[end - len(shares[k]) : end] for name, rows in found.measures.items()})[
            task.metric
        ]
        for k, end in zip(held, ends, strict=True)
    }
    spread = fairness(list(values.values()), higher_is_better=task.higher_is_better)
    domains = main_domains(federated)
    if domains == list(federated.client_names):  # the names say it
        domains = None
    names = federated.client_names or [str(k) for k in range(len(shares))]
    worst = sorted(values, key=lambda k: values[k], reverse=not task.higher_is_better)[:MOST_CLIENTS]
    rows = [
        [
            names[k] if names else str(k),
            *([domains[k]] if domains else []),
            str(len(shares[k])),
            show(task.metric, values[k]),
        ]
        for k in (sorted(values) if len(values) <= MOST_CLIENTS else worst)
    ]
    few = "" if len(values) <= MOST_CLIENTS else f"the {MOST_CLIENTS} worst of {len(values)} clients, "
    header = ["client", *(["domain"] if domains else []), "examples", task.metric]
    figures = {
        "mean": show(task.metric, spread.mean),
        "standard deviation": show(task.metric, math.sqrt(spread.variance)),
        "worst client": show(task.metric, spread.worst),
        "worst 10%": show(task.metric, spread.worst_decile),
        "best 10%": show(task.metric, spread.best_decile),
        "Gini": "-" if math.isnan(spread.gini) else show("gini", spread.gini),
    }
    return {
        f"{few}on their own training examples": pd.DataFrame(rows, columns=header, dtype=object),
        f"over {len(values)} clients, each counting alike": pd.DataFrame([figures]),
    }
