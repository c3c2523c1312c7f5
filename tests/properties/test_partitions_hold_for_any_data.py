from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import DataError
from fedlora.partition import (
    PartitionInput,
    count_values,
    entropy,
    js_divergence,
    load_partitioner,
)

clients = st.integers(1, 12)
positive = st.floats(0.05, 50)
INNER = st.one_of(
    st.fixed_dictionaries({"name": st.just("iid")}),
    st.fixed_dictionaries({"name": st.just("dirichlet"), "alpha": positive, "sizes": st.just("equal")}),
    st.fixed_dictionaries({"name": st.just("quantity"), "alpha": positive}),
)
TABLES = st.one_of(
    st.fixed_dictionaries({"name": st.just("iid"), "clients": clients}),
    st.fixed_dictionaries(
        {
            "name": st.just("dirichlet"),
            "clients": clients,
            "alpha": positive,
            "min_size": st.integers(1, 5),
            "sizes": st.sampled_from(["drawn", "equal"]),
        }
    ),
    st.fixed_dictionaries(
        {
            "name": st.just("classes"),
            "clients": clients,
            "classes_per_client": st.integers(1, 4),
            "assignment": st.sampled_from(["deterministic", "random"]),
        }
    ),
    st.fixed_dictionaries({"name": st.just("shards"), "clients": clients, "shards_per_client": st.integers(1, 4)}),
    st.fixed_dictionaries({"name": st.just("quantity"), "clients": clients, "exponent": st.floats(0, 4)}),
    st.fixed_dictionaries({"name": st.just("natural"), "column": st.just("d"), "min_size": st.integers(1, 5)}),
    st.fixed_dictionaries({"name": st.just("domain"), "clients": clients, "within": INNER}),
    st.fixed_dictionaries({"name": st.just("domain"), "clients": clients, "mixing": positive}),
)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    table=TABLES,
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    domains=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_partition_is_disjoint_complete_and_seeded_or_an_error(
    table: dict[str, Any], labels: list[int], domains: int, seed: int
) -> None:
    size = len(labels)
    info = PartitionInput(size, np.array(labels), {"d": np.arange(size) % domains}, "d")
    fields = {key: value for key, value in table.items() if key != "name"}
    partitioner = load_partitioner(table["name"], fields)
    try:
        partition = partitioner.split(info, seed)
    except DataError:
        return
    everything = np.concatenate([*partition.clients, partition.dropped])
    assert sorted(everything.tolist()) == list(range(size))
    assert min(map(len, partition.clients)) >= fields.get("min_size", 1)
    assert "clients" not in fields or len(partition.clients) == fields["clients"]
    assert bool(partition.note) == (len(partition.dropped) > 0)
    again = load_partitioner(table["name"], fields).split(info, seed)
    assert all(map(np.array_equal, partition.clients, again.clients))


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=6))
def test_statistics_are_within_their_bounds(counts: list[list[int]]) -> None:
    table = np.array([row for row in counts if sum(row)] or [[1, 0, 0]])
    assert (entropy(table) <= np.log2(3) + 1e-12).all()
    assert (entropy(table) >= 0).all()
    divergences = js_divergence(table)
    assert (divergences >= 0).all()
    assert (divergences <= 1).all()
    np.testing.assert_allclose(js_divergence(np.vstack([table[:1], 2 * table[:1]])), 0.0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=5, max_size=60), cuts=st.integers(1, 5))
def test_counts_add_up(labels: list[int], cuts: int) -> None:
    values = np.array(labels)
    parts = np.array_split(np.arange(len(values)), cuts)
    counts = count_values(parts, values, 5)
    assert (counts.sum(axis=1) == [len(part) for part in parts]).all()
    assert (counts.sum(axis=0) == np.bincount(values, minlength=5)).all()
