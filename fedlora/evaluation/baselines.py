"""What a federation is measured against: every client alone, and all data in one place.

Both train plain LoRA (A, B and head) from the federation's own initial adapter, with its optimiser and learning rate,
in one stretch: the optimiser's moments and the warm-up are not started again at each round, as they are on clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedlora.adapter import ALL_PARTS
from fedlora.config import TrainConfig
from fedlora.data.describe import main_domains
from fedlora.errors import ConfigError
from fedlora.federation.given_adapter import read_start
from fedlora.rng import derive
from fedlora.simulation.capacity import cohort_size
from fedlora.training.cohort import train_cohort
from fedlora.training.evaluate import evaluate
from fedlora.training.job import TrainJob, examples_of, number_of_steps
from fedlora.training.workspace import Workspace

Report = Callable[[str], None]


def local_only(
    workspace: Workspace, clients: Sequence[int] | None = None, *, report: Report = lambda _line: None
) -> dict[str, Any]:
    """Train each client alone for as many optimiser steps as it would take in all rounds, and test on everything.

    Args:
        workspace: the run's model, task and data.
        clients: which; None for all.
        report: is told each client's figure.

    Returns:
        "clients": a row each with "client", "domain", "num_examples", "steps", the figures and "domains", and where
        clients evaluate "own", the figures on what the client keeps apart; "of": how many clients there are; "best",
        "mean", "worst": the figures of the best client, of the worst, and the mean over clients of each figure.
    """
    config, data = workspace.config, workspace.data
    chosen = list(range(len(data.clients))) if clients is None else list(clients)
    if not chosen:
        raise ConfigError("no client is chosen for the local-only baseline: choose at least one", code="no-clients")
    domains = main_domains(data)
    rows: list[dict[str, Any]] = []
    size = cohort_size(workspace, len(chosen)).clients
    for first in range(0, len(chosen), size):
        some = chosen[first : first + size]
        work = [(data.clients[k], as_one_round(config.train_of(k), config.rounds), f"local-only {k}", k) for k in some]
        for k, figures in zip(some, _train_and_test(workspace, work), strict=True):
            row = {"client": k, "domain": domains[k] if domains else None, "num_examples": len(data.clients[k])}
            rows.append(row | figures | _own(workspace, k))
            report(f"local-only: client {k} alone: {workspace.task.metric} {figures[workspace.task.metric]:.4f}")
    ranked = sorted(rows, key=lambda row: row[workspace.task.metric], reverse=workspace.task.higher_is_better)
    best, worst = (_figures(row) for row in (ranked[0], ranked[-1]))
    mean = _mean([_figures(row) for row in rows])
    return {"clients": rows, "of": len(data.clients), "best": best, "mean": mean, "worst": worst}


def centralised(
    workspace: Workspace, examples_seen: int | None = None, *, report: Report = lambda _line: None
) -> dict[str, Any]:
    """Train on all clients' examples in one place, and test on everything.

    As many optimiser steps are taken as by one client in all rounds (the busiest, if they differ), and as many examples
    are seen as by all of them together: for n clients with s steps of batch b in each of R rounds, R s steps of batch
    n b. Smaller batches and more steps would be another comparison, with another best learning rate.

    Args:
        workspace: the run's model, task and data.
        examples_seen: by the federation; None: what its config asks for.
        report: is told the figure.

    Returns:
        "steps", "examples_seen", the figures, and "domains".
    """
    pooled = np.sort(np.concatenate(workspace.data.clients))
    seen = expected_examples(workspace) if examples_seen is None else examples_seen
    config = workspace.config
    steps = max(
        number_of_steps(len(rows), as_one_round(config.train_of(k), config.rounds))
        for k, rows in enumerate(workspace.data.clients)
    )
    batch = min(math.ceil(seen / steps), len(pooled))
    whole = as_one_round(config.train, config.rounds)
    once = whole.model_copy(update={"steps": steps, "epochs": None, "batch_size": batch})
    (row,) = _train_and_test(workspace, [(pooled, once, "centralised", 0)])
    figure = f"{workspace.task.metric} {row[workspace.task.metric]:.4f}"
    report(f"centralised: {steps} steps of batch {batch} on {len(pooled)} examples: {figure}")
    return row


def expected_examples(workspace: Workspace) -> int:
    """Examples that all clients together see in all rounds, by the config, if every client answers."""
    config, clients = workspace.config, workspace.data.clients
    share = config.server.fraction
    if config.server.clients_per_round is not None:
        share = config.server.clients_per_round / len(clients)
    a_round = sum(examples_of(len(rows), config.train_of(k)) for k, rows in enumerate(clients))
    return max(1, round(config.rounds * share * a_round))


def as_one_round(once: TrainConfig, rounds: int) -> TrainConfig:
    """The same training for `rounds` rounds at once, as one round with the schedule of all."""
    return once.longer(rounds).model_copy(update={"warmup_rounds": once.warmup_rounds / rounds})


def spread_over_domains(domains: Sequence[str] | None, clients: int, number: int) -> list[int]:
    """`number` clients, taken from the domains in turn (evenly over all clients without domains), in ascending order.

    Args:
        domains: of each client, or None.
        clients: how many there are.
        number: how many to take; all if there are no more.
    """
    if number >= clients:
        return list(range(clients))
    if domains is None:
        return sorted({round(k) for k in np.linspace(0, clients - 1, number)})
    queues = {name: [k for k in range(clients) if domains[k] == name] for name in sorted(set(domains))}
    taken: list[int] = []
    while len(taken) < number:
        for queue in queues.values():
            if queue and len(taken) < number:
                taken.append(queue.pop(0))
    return sorted(taken)


def _train_and_test(
    workspace: Workspace, work: Sequence[tuple[np.ndarray, TrainConfig, str, int]]
) -> Iterator[dict[str, Any]]:
    """Figures of some adapters, each on its own examples, from the run's own start; they are trained together.

    Args:
        workspace: the run's.
        work: for each adapter its examples, its config, a key of its random draws, and the number of its client.
    """
    workspace.base.rebase(0, ())
    seed = workspace.config.seed
    given = read_start(workspace)
    start = workspace.base.initial_adapter(seed) if given is None else given.adapter
    base_updates = workspace.base.initial_base_updates(start) if given is None else ()
    workspace.base.rebase(len(base_updates), base_updates)
    jobs = [
        TrainJob(start, ALL_PARTS, indices, derive(seed, "baseline", key), client_id=client_id)
        for indices, _, key, client_id in work
    ]
    # FedProx pulls a client towards the server's model; here there is none.
    configs = [config.model_copy(update={"proximal_mu": 0.0}) for _, config, _, _ in work]
    for result in train_cohort(workspace.base, workspace.task, workspace.data.train, jobs, configs):
        if isinstance(result, Exception):
            raise result
        workspace.base.write(result.adapter, frozenset())
        found = evaluate(
            workspace.base, workspace.task, workspace.data.require_test(), domain_column=workspace.data.domain_column
        )
        facts = {"steps": result.steps, "examples_seen": result.examples_seen, "train_loss": result.loss}
        yield {**facts, **found.overall, "domains": found.domains}


def _own(workspace: Workspace, client_id: int) -> dict[str, Any]:
    """Figures of the adapter that was tested last on what a client keeps apart, if it keeps enough to report on."""
    apart, least = workspace.data.apart.get("test"), workspace.config.evaluation.min_examples
    if apart is None or len(rows := np.asarray(apart.clients[client_id])) < least:
        return {}
    return {"own": evaluate(workspace.base, workspace.task, apart.examples, indices=rows).overall}


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    dropped = ("client", "domain", "num_examples", "steps", "examples_seen", "train_loss", "own")
    return {name: value for name, value in row.items() if name not in dropped}


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: _mean([row[name] for row in rows])
        if isinstance(rows[0][name], Mapping)
        else float(np.mean([row[name] for row in rows]))
        for name in rows[0]
    }
