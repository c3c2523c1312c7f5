"""Who holds which examples: seeded partitions of one data set into clients that differ in labels, sizes or domains.

Each partitioner is a frozen dataclass and its fields are the keys of the config's `[partition]` table. Where
flwr-datasets has the method it does the work, on a table of two columns in a seeded order; iid and natural partitions
are a permutation and a grouping, which numpy does at once. Whatever did the work, `Partitioner.split` checks the
result: clients are disjoint and not empty, and what is on no client is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.partition._base import Partition, Partitioner, PartitionInput, partitioners
from fedlora.partition.statistics import count_values, entropy, js_divergence, mean_js_divergence

__all__ = [
    "Partition",
    "PartitionInput",
    "Partitioner",
    "count_values",
    "entropy",
    "js_divergence",
    "load_partitioner",
    "mean_js_divergence",
    "partitioners",
]


def load_partitioner(name: str, fields: Mapping[str, Any]) -> Partitioner:
    """The partitioner of that name with these fields.

    Raises:
        ConfigError: the name or a field is unknown, or a value is not valid.
    """
    return partitioners.build(name, fields)
