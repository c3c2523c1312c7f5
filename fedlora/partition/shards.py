"""Label skew by shards of the sorted data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlora.errors import DataError
from fedlora.partition._base import Count, Partitioner, PartitionInput, divided_by, labels_of, partitioners
from fedlora.rng import derive


@partitioners.register("shards")
@dataclass(frozen=True, kw_only=True)
class Shards(Partitioner):
    """Sort by label, cut into equal shards, deal each client some of them.

    McMahan et al. 2017, arXiv 1602.05629, section 3; flwr-datasets' ShardPartitioner. The remainder that does not fill
    a shard is dropped.

    Args:
        clients: how many.
        shards_per_client: shards of one client.
    """

    cure: ClassVar[str] = "lower partition.clients or partition.shards_per_client"
    why_dropped: ClassVar[str] = "they do not fill a shard"

    clients: Count
    shards_per_client: Count = 2

    def assign(self, info: PartitionInput, seed: int) -> Sequence[np.ndarray]:
        """See `Partitioner.assign`."""
        labels = labels_of(info, "shards")
        if self.clients * self.shards_per_client > info.size:
            raise DataError(
                f"{info.size} examples are fewer than {self.clients} clients with {self.shards_per_client} shards; "
                f"{self.cure}",
                code="too-few-examples",
            )

        from flwr_datasets.partitioner import ShardPartitioner

        partitioner = ShardPartitioner(
            num_partitions=self.clients,
            partition_by="value",
            num_shards_per_partition=self.shards_per_client,
            seed=derive(seed, "shards"),
        )
        return divided_by(partitioner, labels, seed, self.cure)
