"""Pictures of a run as PNG files; the report shows the same charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fedlora.errors import FedloraError
from fedlora.report._client_charts import holdings
from fedlora.report._facts import metric_of, reported_metric
from fedlora.report.figures import save_png
from fedlora.report.line_charts import accuracy_curve


def plot_accuracy(records: Sequence[Mapping[str, Any]], path: str | Path, *, before: str = "base model") -> Path:
    """The main figure after each round, on the whole test set (thick) and on each domain.

    Args:
        records: lines of metrics.jsonl; rounds without an evaluation are passed over.
        path: of the PNG.
        before: what round 0 measured; see `fedlora.progress.before_training`.

    Raises:
        FedloraError: no round was evaluated.
    """
    metric = reported_metric(records)
    if all(metric_of(record, metric) is None for record in records):
        raise FedloraError(f"there is no {metric} to draw: run at least one evaluated round", code="nothing-to-draw")
    return save_png(accuracy_curve(records, metric, before).draw, path)


def plot_labels(
    counts: Int[np.ndarray, "clients labels"],
    label_names: Sequence[str],
    path: str | Path,
    *,
    domains: Sequence[str] | None = None,
) -> Path:
    """How many examples of each label every client has.

    Args:
        counts: examples by client and label.
        label_names: one for each column.
        path: of the PNG.
        domains: of each client, where clients have one: stands before the client's number.

    Raises:
        FedloraError: there are no clients, or the names do not fit the counts.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or not counts.size or counts.shape[1] != len(label_names):
        message = f"label counts {counts.shape} do not fit {len(label_names)} label names"
        raise FedloraError(message, code="names-do-not-fit")
    if domains is not None and len(domains) != len(counts):
        raise FedloraError(f"{len(domains)} domains do not fit {len(counts)} clients", code="names-do-not-fit")
    clients = [f"{domains[k]} {k}" if domains is not None else str(k) for k in range(len(counts))]
    return save_png(holdings(counts, label_names, clients), path)
