from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.errors import raises

from fedlora.errors import ConfigError, DataError, FedloraError
from fedlora.partition import (
    Partition,
    PartitionInput,
    count_values,
    entropy,
    js_divergence,
    load_partitioner,
    mean_js_divergence,
    partitioners,
)

N = 1200
GENERATOR = np.random.default_rng(0)
INFO = PartitionInput(
    size=N,
    labels=GENERATOR.choice(4, size=N, p=[0.4, 0.3, 0.2, 0.1]),
    columns={"site": GENERATOR.choice(["a", "b", "c"], size=N, p=[0.6, 0.3, 0.1]), "user": np.arange(N) % 37},
    domain="site",
)
TABLES: dict[str, dict[str, Any]] = {
    "iid": {"name": "iid", "clients": 7},
    "dirichlet": {"name": "dirichlet", "clients": 7, "alpha": 0.5},
    "dirichlet equal": {"name": "dirichlet", "clients": 7, "alpha": 0.5, "sizes": "equal"},
    "classes": {"name": "classes", "clients": 7, "classes_per_client": 2},
    "classes random": {"name": "classes", "clients": 3, "classes_per_client": 1, "assignment": "random"},
    "shards": {"name": "shards", "clients": 7, "shards_per_client": 3},
    "quantity power": {"name": "quantity", "clients": 7, "exponent": 1.5},
    "quantity dirichlet": {"name": "quantity", "clients": 7, "alpha": 0.5, "min_size": 5},
    "natural": {"name": "natural", "column": "user"},
    "natural large": {"name": "natural", "column": "user", "min_size": 33},
    "natural pooled": {"name": "natural", "column": "user", "min_size": 33, "rest": "pool"},
    "domain": {"name": "domain", "clients": 7},
    "domain proportional": {"name": "domain", "clients": 7, "allocation": "proportional"},
    "domain within": {"name": "domain", "clients": 7, "within": {"name": "dirichlet", "alpha": 0.3}},
    "domain mixing": {"name": "domain", "clients": 7, "mixing": 0.5},
}
MAY_DROP = {"classes random", "shards", "natural large"}


def split(name: str, info: PartitionInput = INFO, seed: int = 3, **fields: Any) -> Partition:
    return load_partitioner(name, fields).split(info, seed)


def split_table(key: str, info: PartitionInput = INFO, seed: int = 3) -> Partition:
    return split(info=info, seed=seed, **TABLES[key])


def labels_of(info: PartitionInput = INFO) -> np.ndarray:
    assert info.labels is not None
    return info.labels


def test_every_partitioner_is_tested_here() -> None:
    assert {table["name"] for table in TABLES.values()} == set(partitioners)


@pytest.mark.parametrize("key", TABLES)
def test_clients_are_disjoint_and_with_the_dropped_complete(key: str) -> None:
    partition = split_table(key)
    everything = np.concatenate([*partition.clients, partition.dropped])
    assert np.sort(everything).tolist() == list(range(N))
    assert all((np.diff(rows) > 0).all() for rows in partition.clients)
    assert all(len(rows) for rows in partition.clients)
    assert len(partition.clients) == TABLES[key].get("clients", len(partition.clients))
    assert bool(partition.note) == bool(len(partition.dropped))
    assert key in MAY_DROP or not partition.note


@pytest.mark.parametrize("key", TABLES)
def test_the_seed_decides(key: str) -> None:
    def same(a: Partition, b: Partition) -> bool:
        return len(a.clients) == len(b.clients) and all(map(np.array_equal, a.clients, b.clients))

    assert same(split_table(key), split_table(key))
    assert same(split_table(key), split_table(key, seed=4)) == (TABLES[key]["name"] == "natural")


@pytest.mark.parametrize("key", [key for key in TABLES if "natural" not in key])
def test_no_partition_follows_the_order_of_the_data(key: str) -> None:
    """Neighbours in a file (of one document, say) must not end up on one client because they are neighbours."""
    size = 1200
    info = PartitionInput(size, np.arange(size) % 4, {"site": np.array(["x", "y", "z"])[np.arange(size) % 3]}, "site")
    for rows in split_table(key, info).clients:
        if 30 <= len(rows) <= size // 2:
            # Cut as blocks of the file, a client's indices would span little more than its share.
            assert rows[-1] - rows[0] > size // 2


def test_iid_clients_have_equal_sizes_and_the_labels_of_the_whole() -> None:
    partition = split("iid", clients=7)
    sizes = [len(rows) for rows in partition.clients]
    assert max(sizes) - min(sizes) <= 1
    counts = count_values(partition.clients, labels_of(), 4)
    expected = counts.sum(axis=0) / N * np.array(sizes)[:, None]
    # Hypergeometric spread of each count: below the binomial's.
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("sizes", ["drawn", "equal"])
def test_dirichlet_with_a_large_alpha_is_iid(sizes: str) -> None:
    partition = split("dirichlet", clients=7, alpha=1e8, sizes=sizes)
    counts = count_values(partition.clients, labels_of(), 4)
    expected = np.bincount(labels_of()) / 7
    spread = np.full(4, 1.0) if sizes == "drawn" else 5 * np.sqrt(expected)
    assert (np.abs(counts - expected) <= spread).all()


def test_dirichlet_with_a_small_alpha_gives_each_label_to_one_client() -> None:
    info = PartitionInput(300, np.arange(300) % 3)
    for seed in range(200):  # most draws give two labels to one client and none to another
        try:
            partition = split("dirichlet", info, seed, clients=3, alpha=1e-4)
        except DataError:
            continue
        counts = count_values(partition.clients, labels_of(info), 3)
        assert (counts.max(axis=1) >= 99).all()
        assert (entropy(counts) < 0.1).all()
        return
    pytest.fail("no seed gave three clients")


def test_dirichlet_of_equal_sizes_with_a_small_alpha_gives_each_client_one_label() -> None:
    info = PartitionInput(3000, np.arange(3000) % 3)
    counts = count_values(split("dirichlet", info, clients=30, alpha=1e-3, sizes="equal").clients, labels_of(info), 3)
    assert (counts.sum(axis=1) == 100).all()
    # All but the few clients that find their label used up.
    assert np.sum(entropy(counts) > 0) <= 4


@pytest.mark.slow
def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    divergences = [
        np.mean(
            [
                mean_js_divergence(count_values(split("dirichlet", seed=seed, **fields).clients, labels_of(), 4))
                for seed in range(5)
            ]
        )
        for fields in ({"clients": 10, "alpha": alpha} for alpha in (0.3, 3.0, 30.0, 300.0))
    ]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[0] > 10 * divergences[-1]


@pytest.mark.slow
def test_dirichlet_keeps_its_smallest_size() -> None:
    for seed in range(10):
        partition = split("dirichlet", seed=seed, clients=6, alpha=0.3, min_size=25)
        assert min(map(len, partition.clients)) >= 25


def test_dirichlet_of_equal_sizes_has_equal_sizes_even_for_many_clients() -> None:
    sizes = [len(rows) for rows in split("dirichlet", clients=500, alpha=0.1, sizes="equal").clients]
    assert max(sizes) - min(sizes) <= 1


def test_classes_gives_each_client_its_number_of_labels() -> None:
    partition = split("classes", clients=9, classes_per_client=2)
    counts = count_values(partition.clients, labels_of(), 4)
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert (counts.sum(axis=0) == np.bincount(labels_of())).all()
    for label in range(4):
        held = counts[:, label][counts[:, label] > 0]
        assert held.max() - held.min() <= 1


def test_classes_says_when_a_label_is_left_out() -> None:
    partition = split("classes", clients=1, classes_per_client=2)
    assert set(labels_of()[partition.dropped]) == {2, 3}
    assert f"{len(partition.dropped)} of {N} examples" in partition.note


def test_shards_give_each_client_few_labels_and_equal_sizes() -> None:
    partition = split("shards", clients=10, shards_per_client=2)
    counts = count_values(partition.clients, labels_of(), 4)
    assert (counts.sum(axis=1) == N // 20 * 2).all()
    # A shard holds two labels where it lies on a border.
    assert ((counts > 0).sum(axis=1) <= 4).all()
    assert mean_js_divergence(counts) > 5 * mean_js_divergence(
        count_values(split("iid", clients=10).clients, labels_of(), 4)
    )


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_quantity_sizes_follow_the_power_law(exponent: float) -> None:
    sizes = np.array([len(rows) for rows in split("quantity", clients=8, exponent=exponent, min_size=1).clients])
    shares = np.arange(1, 9) ** -exponent
    np.testing.assert_array_less(np.abs(sizes - (1 + (N - 8) * shares / shares.sum())), 1.0)


def test_quantity_by_dirichlet_is_equal_for_a_large_alpha_and_keeps_its_smallest_size() -> None:
    sizes = np.array([len(rows) for rows in split("quantity", clients=8, alpha=1e9).clients])
    assert np.ptp(sizes) <= 1
    sizes = np.array([len(rows) for rows in split("quantity", clients=8, alpha=0.05, min_size=10).clients])
    assert sizes.min() >= 10
    assert sizes.max() > 500


def test_natural_clients_are_the_values_of_the_column() -> None:
    partition = split("natural", column="site")
    assert [set(INFO.columns["site"][rows]) for rows in partition.clients] == [{"a"}, {"b"}, {"c"}]
    large = split("natural", column="user", min_size=33)
    users, sizes = np.unique(INFO.columns["user"], return_counts=True)
    assert len(large.clients) == (sizes >= 33).sum()
    assert set(INFO.columns["user"][large.dropped]) == set(users[sizes < 33])


def test_small_natural_groups_are_pooled_on_request_and_clients_have_names() -> None:
    large = split("natural", column="user", min_size=33)
    pooled = split("natural", column="user", min_size=33, rest="pool")
    assert not len(pooled.dropped)
    *same, rest = pooled.clients
    assert all((one == other).all() for one, other in zip(same, large.clients, strict=True))
    assert (rest == large.dropped).all()
    users, sizes = np.unique(INFO.columns["user"], return_counts=True)
    assert pooled.names == (*(str(user) for user in users[sizes >= 33]), f"the other {(sizes < 33).sum()}")
    assert split("natural", column="user", rest="pool").names == tuple(str(user) for user in users)
    assert split("iid", clients=3).names == ()


def test_domain_clients_see_one_domain_each() -> None:
    sites = INFO.columns["site"]
    seen = [set(sites[rows]) for rows in split("domain", clients=7).clients]
    assert seen == [{"a"}] * 3 + [{"b"}] * 2 + [{"c"}] * 2
    seen = [set(sites[rows]) for rows in split("domain", clients=10, allocation="proportional").clients]
    assert seen == [{"a"}] * 6 + [{"b"}] * 3 + [{"c"}]


def test_domain_within_has_the_skew_of_the_inner_rule_inside_each_domain() -> None:
    one_label = split("domain", clients=12, within={"name": "classes", "classes_per_client": 1})
    counts = count_values(one_label.clients, labels_of(), 4)
    assert ((counts > 0).sum(axis=1) == 1).all()
    assert all(len(set(INFO.columns["site"][rows])) == 1 for rows in one_label.clients)


def test_domain_mixing_goes_from_one_domain_each_to_all_alike() -> None:
    numbers = np.unique(INFO.columns["site"], return_inverse=True)[1]
    counts = count_values(split("domain", clients=7, mixing=1e8).clients, numbers, 3)
    assert (np.abs(counts - np.bincount(numbers) / 7) <= 1).all()
    strong = mean_js_divergence(count_values(split("domain", clients=7, mixing=0.3).clients, numbers, 3))
    assert strong > 100 * mean_js_divergence(counts)


def test_noise_rates_are_dealt_to_the_clients_in_turn() -> None:
    partition = split("iid", clients=5, label_noise=(0.0, 0.4), feature_noise=0.1)
    assert partition.label_noise == (0.0, 0.4, 0.0, 0.4, 0.0)
    assert partition.feature_noise == (0.1,) * 5


NO_LABELS = PartitionInput(N, None, INFO.columns, "site")


@pytest.mark.parametrize(
    ("build", "error", "code", "named"),
    [
        (lambda: split("dirichlett"), ConfigError, "unknown-name", "'dirichlet'"),
        (lambda: split("iid", client=3), ConfigError, "unknown-key", "'clients'"),
        (lambda: split("iid"), ConfigError, "bad-value", "clients"),
        (lambda: split("iid", clients=0), ConfigError, "bad-value", "clients"),
        (lambda: split("iid", clients=N + 1), DataError, "client-without-examples", f"client {N} of {N + 1}"),
        (lambda: split("dirichlet", clients=3, alpha=0.0), ConfigError, "bad-value", "alpha"),
        (lambda: split("dirichlet", clients=200, alpha=0.1), DataError, "min-size-not-reached", "sizes = 'equal'"),
        (lambda: split("dirichlet", clients=3, min_size=N), DataError, "too-few-examples", "partition.min_size"),
        (
            lambda: split("dirichlet", clients=3, min_size=N, sizes="equal"),
            DataError,
            "too-few-examples",
            "partition.min_size",
        ),
        (lambda: split("dirichlet", NO_LABELS, clients=3), DataError, "no-labels", "'dirichlet'"),
        (lambda: split("classes", clients=3, classes_per_client=5), DataError, "too-few-classes", "4 classes"),
        (lambda: split("classes", clients=N, classes_per_client=4), DataError, "not-divisible", "partition.clients"),
        (lambda: split("shards", clients=N, shards_per_client=2), DataError, "too-few-examples", "partition.clients"),
        (lambda: split("quantity", clients=3), ConfigError, "not-exactly-one", "exponent"),
        (lambda: split("quantity", clients=3, alpha=1.0, exponent=1.0), ConfigError, "not-exactly-one", "alpha"),
        (lambda: split("quantity", clients=3, alpha=1.0, min_size=N), DataError, "too-few-examples", "min_size"),
        (lambda: split("natural", column="sites"), DataError, "no-such-column", "'site'"),
        (lambda: split("natural", column="user", min_size=N), DataError, "too-few-examples", "'user'"),
        (lambda: split("domain", clients=2), DataError, "fewer-clients-than-domains", "(a, b, c)"),
        (lambda: split("domain", PartitionInput(N), clients=3), DataError, "no-domain-column", "data.domain"),
        (
            lambda: split("domain", clients=7, mixing=1.0, within={"name": "iid"}),
            ConfigError,
            "key-without-effect",
            "within",
        ),
        (lambda: split("domain", clients=7, within={"alpha": 1.0}), ConfigError, "missing-key", "partition.within"),
        (lambda: split("domain", clients=7, within={"name": "natural"}), ConfigError, "not-allowed-within", "natural"),
        (
            lambda: split("domain", clients=7, within={"name": "iid", "clients": 2}),
            ConfigError,
            "key-in-wrong-table",
            "'clients'",
        ),
        (
            lambda: split("domain", clients=7, within={"name": "dirichlet", "alhpa": 2}),
            ConfigError,
            "unknown-key",
            "'alpha'",
        ),
        (lambda: split("domain", clients=1200, allocation="equal"), DataError, "too-few-examples", "domain 'b'"),
        (
            lambda: split("domain", clients=3, within={"name": "classes", "classes_per_client": 5}),
            DataError,
            "too-few-classes",
            "domain 'a'",
        ),
        (
            lambda: split("iid", clients=2, label_noise=(0.1, 0.2, 0.3)),
            ConfigError,
            "wrong-number-of-rates",
            "3 rates for 2 clients",
        ),
        (lambda: split("iid", clients=2, label_noise=1.5), ConfigError, "bad-value", "label_noise"),
    ],
)
def test_a_wrong_combination_says_what_to_change(
    build: Callable[[], Partition], error: type[FedloraError], code: str, named: str
) -> None:
    with raises(error, code, named):
        build()


def test_statistics_at_their_limits() -> None:
    clients = (np.array([0, 1]), np.array([2, 3]), np.array([4, 5, 6, 7]))
    values = np.array([0, 0, 1, 1, 0, 1, 0, 1])
    counts = count_values(clients, values, 3)
    assert counts.tolist() == [[2, 0, 0], [0, 2, 0], [2, 2, 0]]
    np.testing.assert_allclose(entropy(counts), [0.0, 0.0, 1.0], atol=1e-12)
    # JSD((1, 0), (1/2, 1/2)) = H(3/4, 1/4) - 1/2 in bits.
    one = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    np.testing.assert_allclose(js_divergence(counts), [one, one, 0.0], atol=1e-12)
    assert mean_js_divergence(counts) == pytest.approx(one / 2)
