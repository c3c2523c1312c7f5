"""What a partition looks like in numbers: what `partition.json` holds and `fedlora partition` prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.data import FederatedData
from fedlora.partition import count_values, entropy, mean_js_divergence

if TYPE_CHECKING:
    import pandas


def describe_partition(data: FederatedData) -> dict[str, Any]:
    """Sizes, counts and divergences of the clients.

    Returns:
        Numbers and names only: "client_names" where the data name the clients, "sizes" [clients], "label_names" and
        "label_counts" [clients, labels] with "label_entropy" (bits, [clients]) and "label_js_divergence" (bits, mean
        weighted by size); the same for "domains"; "test_size" of the server, "test_sizes" and "validation_sizes"
        [clients] of what the clients keep apart, "dropped" (how many), "note" (why) and "test_note" (what is unusual
        about the test set). What the data has not (classes, domains) is left out.
    """
    out: dict[str, Any] = {
        **({"client_names": list(data.client_names)} if data.client_names else {}),
        "sizes": [len(rows) for rows in data.clients],
        "test_size": 0 if data.test is None else len(data.test),
        **{f"{part}_sizes": [len(rows) for rows in apart.clients] for part, apart in data.apart.items()},
        "dropped": len(data.dropped),
        "note": data.note,
        "test_note": data.test_note,
    }
    if data.train.labels is not None:
        counts = count_values(data.clients, data.train.labels, len(data.label_names))
        out |= {"label_names": list(data.label_names), "label_counts": counts.tolist()}
        out |= {"label_entropy": entropy(counts).tolist(), "label_js_divergence": mean_js_divergence(counts)}
    if data.domain_column is not None:
        number = {name: k for k, name in enumerate(data.domains)}
        values = np.array([number[str(value)] for value in data.train.columns[data.domain_column]])
        counts = count_values(data.clients, values, len(data.domains))
        out |= {"domains": list(data.domains), "domain_counts": counts.tolist()}
        out |= {"domain_js_divergence": mean_js_divergence(counts)}
    return out


def clients_table(data: FederatedData) -> pandas.DataFrame:
    """A row for each client.

    Returns:
        "name" where the data name the clients, "domain" (of most of its examples) where there are domains and these are
        not the names, "examples", and where there are classes "labels.NAME" for each, with "label_entropy" in bits.
    """
    import pandas

    facts, domains = describe_partition(data), main_domains(data)
    columns: dict[str, Any] = {"name": facts["client_names"]} if data.client_names else {}
    if domains is not None and domains != list(data.client_names):
        columns["domain"] = domains
    columns["examples"] = facts["sizes"]
    for k, label in enumerate(facts.get("label_names", ())):
        columns[f"labels.{label}"] = [counts[k] for counts in facts["label_counts"]]
    if "label_entropy" in facts:
        columns["label_entropy"] = facts["label_entropy"]
    return pandas.DataFrame(columns).rename_axis("client")


def main_domains(data: FederatedData) -> list[str] | None:
    """The domain of most of each client's examples, or None where the data have no domains."""
    if data.domain_column is None:
        return None
    values = np.asarray(data.train.columns[data.domain_column])
    return [str(Counter(values[rows].tolist()).most_common(1)[0][0]) for rows in data.clients]


def draw_labels(data: FederatedData, path: Path) -> bool:
    """Draw who holds which labels, and say whether there are any."""
    from fedlora.report import plot_labels

    if data.train.labels is None:
        return False
    counts = count_values(data.clients, data.train.labels, len(data.label_names))
    plot_labels(counts, data.label_names, path, domains=data.client_names or main_domains(data))
    return True
