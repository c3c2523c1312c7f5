"""Label skew by a fixed number of labels for each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedlora.errors import DataError
from fedlora.partition._base import Count, Partitioner, PartitionInput, divided_by, labels_of, partitioners
from fedlora.rng import derive


@partitioners.register("classes")
@dataclass(frozen=True, kw_only=True)
class Classes(Partitioner):
    """Each client has so many labels and no other; a label's examples are divided evenly among those who have it.

    Li et al. 2022 (NIID-Bench), arXiv 2102.02079, label skew "#C = k"; flwr-datasets' PathologicalPartitioner.

    Args:
        clients: how many.
        classes_per_client: labels of one client.
        assignment: "deterministic" (client i has the labels i, i + 1, ... modulo c) or "random" (a label that nobody
            draws is dropped).
    """

    cure: ClassVar[str] = "lower partition.clients or raise partition.classes_per_client"
    why_dropped: ClassVar[str] = "their label is on no client (raise partition.classes_per_client or partition.clients)"

    clients: Count
    classes_per_client: Count
    assignment: Literal["deterministic", "random"] = "deterministic"

    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray]:
        """See `Partitioner.assign`."""
        labels = labels_of(info, "classes")
        present = len(np.unique(labels))
        if self.classes_per_client > present:
            raise DataError(
                f"partition.classes_per_client = {self.classes_per_client} is more than {present} classes: lower it",
                code="too-few-classes",
            )

        from flwr_datasets.partitioner import PathologicalPartitioner

        partitioner = PathologicalPartitioner(
            num_partitions=self.clients,
            partition_by="value",
            num_classes_per_partition=self.classes_per_client,
            class_assignment_mode=self.assignment,
            seed=derive(seed, "classes"),
        )
        return divided_by(partitioner, labels, seed, self.cure)
