from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.errors import raises

from fedlora.assets import ASSETS
from fedlora.config import DataConfig, RunConfig, parse_config
from fedlora.data import FederatedData, column_roles, load_data, load_local, read_file, split_test
from fedlora.data._split import describe_split
from fedlora.errors import AssetError, ConfigError, DataError, FedloraError
from fedlora.tasks import Examples
from fedlora.tasks._text import load_tokenizer


def configure(
    model: Path | str, source: Path | str, *overrides: str, partition: str = "{name='iid', clients=4}"
) -> RunConfig:
    return parse_config(
        "",
        [
            f"model.name='{model}'",
            f"data.source='{source}'",
            f"partition={partition}",
            "data.domain='domain'",
            "data.group='document'",
            *overrides,
        ],
    )


@pytest.fixture
def config(tiny_bert: Path, tiny_csv: Path) -> RunConfig:
    return configure(tiny_bert, tiny_csv)


def texts(examples: Examples, model: Path) -> list[str]:
    tokenizer = load_tokenizer(str(model))
    return [tokenizer.decode(row, skip_special_tokens=True) for row in examples.inputs["input_ids"]]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_in_training_or_test_with_its_own_label_and_domain(
    config: RunConfig, tiny_bert: Path, tiny_csv: Path
) -> None:
    data = load_data(config)
    assert data.label_names == ("negative", "positive")
    assert data.domains == ("films", "phones")
    assert data.domain_column == "domain"
    expected = Counter((row["text"], row["label"], row["domain"], row["document"]) for row in rows_of(tiny_csv))
    found: Counter[tuple[str, str, str, str]] = Counter()
    for part in (data.train, data.test):
        assert part.labels is not None
        names = [data.label_names[label] for label in part.labels]
        columns = (part.columns["domain"].tolist(), part.columns["document"].tolist())
        found.update(zip(texts(part, tiny_bert), names, *columns, strict=True))
    assert found == expected


def test_documents_are_whole_and_domains_have_their_share(config: RunConfig) -> None:
    data = load_data(config)
    assert not set(data.train.columns["document"]) & set(data.test.columns["document"])
    assert Counter(data.test.columns["domain"].tolist()) == {"films": 12, "phones": 12}


def test_clients_hold_all_training_examples(config: RunConfig) -> None:
    data = load_data(config)
    assert sorted(np.concatenate(data.clients).tolist()) == list(range(len(data.train)))
    assert len(data.dropped) == 0


def same(a: FederatedData, b: FederatedData) -> bool:
    return (
        a.test.columns["document"].tolist() == b.test.columns["document"].tolist()
        and len(a.clients) == len(b.clients)
        and all(map(np.array_equal, a.clients, b.clients))
    )


def test_data_are_remembered_until_the_file_or_the_config_changes(
    tiny_bert: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(tiny_csv.read_bytes())
    config = configure(tiny_bert, path)
    first = load_data(config)
    assert load_data(config) is first
    # What does not touch the data does not read them again.
    assert load_data(configure(tiny_bert, path, "train.lr=0.5", "strategy.name='ffa'", "rounds=3")) is first
    assert load_data(configure(tiny_bert, path, "seed=1")) is not first
    assert not same(load_data(configure(tiny_bert, path, "seed=1")), first)
    with path.open("a", encoding="utf-8") as file:
        file.write("superb film,positive,films,films-new\n")
    assert len(load_data(config).train) + len(load_data(config).test) == 241


def test_the_same_seed_gives_the_same_data_in_a_fresh_start(config: RunConfig) -> None:
    from fedlora import data as module

    first = load_data(config)
    module._federate.cache_clear()
    module._prepared.cache_clear()
    second = load_data(config)
    assert second is not first
    assert same(first, second)


def test_a_limit_draws_with_the_seed(tiny_bert: Path, tiny_csv: Path) -> None:
    def limited(seed: int) -> list[str]:
        data = load_data(configure(tiny_bert, tiny_csv, "data.limit=60", f"seed={seed}"))
        return sorted(texts(data.train, tiny_bert) + texts(data.test, tiny_bert))

    assert len(limited(0)) == 60
    assert limited(0) != limited(1)


def test_a_test_file_takes_the_place_of_the_cut(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    path.write_text("text,label,domain\nsuperb film,positive,films\ndull phone,negative,phones\n", encoding="utf-8")
    data = load_data(configure(tiny_bert, tiny_csv, "data.group=", f"data.test='{path}'"))
    assert len(data.train) == 240
    assert texts(data.test, tiny_bert) == ["superb film", "dull phone"]
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "partition",
    [
        "{name='domain', clients=4}",
        "{name='domain', clients=4, column='label'}",
        "{name='natural', column='document'}",
        "{name='domain', clients=4, within={name='dirichlet', alpha=0.5, sizes='equal'}}",
    ],
)
def test_partitions_by_columns_find_their_column(partition: str, tiny_bert: Path, tiny_csv: Path) -> None:
    data = load_data(configure(tiny_bert, tiny_csv, partition=partition))
    column = "document" if "natural" in partition else "label" if "label" in partition else "domain"
    assert all(len(set(data.train.columns[column][rows])) == 1 for rows in data.clients)


def test_wrong_labels_are_as_many_as_asked_on_the_asked_clients(
    config: RunConfig, tiny_bert: Path, tiny_csv: Path
) -> None:
    noisy = load_data(configure(tiny_bert, tiny_csv, partition="{name='iid', clients=4, label_noise=[0.0, 0.25]}"))
    clean = load_data(config)
    assert noisy.train.labels is not None
    assert clean.train.labels is not None
    for rows, rate in zip(noisy.clients, (0.0, 0.25, 0.0, 0.25), strict=True):
        assert (noisy.train.labels[rows] != clean.train.labels[rows]).sum() == round(rate * len(rows))
    assert noisy.test.labels is not None
    assert clean.test.labels is not None
    assert (noisy.test.labels == clean.test.labels).all()


def test_noise_in_the_texts_spares_the_clean_clients_and_the_test(
    config: RunConfig, tiny_bert: Path, tiny_csv: Path
) -> None:
    noisy = load_data(configure(tiny_bert, tiny_csv, partition="{name='iid', clients=4, feature_noise=[0.0, 0.5]}"))
    before, after = texts(load_data(config).train, tiny_bert), texts(noisy.train, tiny_bert)
    changed = np.array([a != b for a, b in zip(before, after, strict=True)])
    assert [bool(changed[rows].any()) for rows in noisy.clients] == [False, True, False, True]
    assert texts(load_data(config).test, tiny_bert) == texts(noisy.test, tiny_bert)


ROWS: Sequence[Mapping[str, Any]] = (
    {"text": 'a "quoted", text', "label": "x"},
    {"text": "two\nlines", "label": "y"},
    {"text": "häßlich\ttab", "label": "x"},
)


def write(path: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> Path:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerows([list(columns), *(list(row.values()) for row in rows)])
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        lines = "\n".join(json.dumps(row) for row in rows) + "\n"
        tree = json.dumps(columns if path.stem == "columns" else list(rows))
        path.write_text(lines if path.suffix == ".jsonl" else tree, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "columns.json", "a.parquet", "A.CSV"])
def test_every_kind_of_file_gives_the_same_columns(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    table = read_file(path)
    assert {column: list(values) for column, values in table.columns.items()} == {
        column: [row[column] for row in ROWS] for column in ROWS[0]
    }


@pytest.mark.parametrize(
    ("name", "content", "code", "named"),
    [
        ("a.csv", "", "empty-file", ""),
        ("a.csv", "text,label\n", "empty-file", ""),
        ("a.jsonl", "", "empty-file", ""),
        ("a.json", "[]", "empty-file", ""),
        ("a.csv", "text,label\na,b,c\n", "malformed-file", "line 2 has 3 fields"),
        ("a.csv", "text,text\na,b\n", "malformed-file", "'text'"),
        ("a.csv", 'text,label\n"a" b,c\n', "malformed-file", "line 2"),
        ("a.jsonl", '{"text": 1}\n{"text"\n', "malformed-file", "line 2"),
        ("a.jsonl", "1\n", "malformed-file", "row 0"),
        ("a.jsonl", "[1]\n", "malformed-file", ".json"),
        ("a.json", '{"text": [1, 2], "label": [1]}', "malformed-file", "length"),
        ("a.json", "3", "malformed-file", "list"),
        ("a.parquet", "no parquet", "malformed-file", ".parquet"),
        ("a.csv", b"text,label\n\xff\xfe,b\n", "not-utf8", "UTF-8"),
        ("a.txt", "text", "unknown-file-type", ".parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_in_one_line(
    name: str, content: str | bytes, code: str, named: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with raises(DataError, code, name, named):
        read_file(path)


@pytest.mark.parametrize(
    ("overrides", "error", "code", "named"),
    [
        (["data.text='txt'"], DataError, "no-such-column", ("'txt'", "'text'")),
        (["data.label='labels'"], DataError, "no-such-column", ("'labels'", "'label'")),
        (["data.domain='site'"], DataError, "no-such-column", ("'site'",)),
        (["data.group='documents'"], DataError, "no-such-column", ("'documents'", "'document'")),
        (["data.source='tyni.csv'"], DataError, "no-such-file", ("'tyni.csv'",)),
        (["data.source='vadr'"], DataError, "no-such-dataset", ("'vadr'", "'vader'")),
        (["data.source='some-org/some-set'"], DataError, "no-such-dataset", ("some-org/some-set",)),
        (["data.group=", "data.test='validation'"], DataError, "not-a-data-file", ("data.test", "'validation'")),
        (["data.subset='en'"], ConfigError, "key-without-effect", ("data.subset",)),
        (["data.train_split='all'"], ConfigError, "key-without-effect", ("data.train_split",)),
        (["data.test_fraction=0.001"], DataError, "empty-test-set", ("data.test_fraction", "0.001")),
        (["partition={name='iid', clients=1000}"], DataError, "client-without-examples", ("partition.clients",)),
        (["partition={name='natural', column='user'}"], DataError, "no-such-column", ("'user'",)),
        (["partition={name='iid', clients=4, size=2}"], ConfigError, "unknown-key", ("'size'",)),
        (
            ["task={name='text-classification', labels=['a', 'b']}"],
            DataError,
            "label-not-a-class",
            ("row 0", "'positive'"),
        ),
    ],
)
def test_a_wrong_config_is_said_in_one_line(
    overrides: list[str],
    error: type[FedloraError],
    code: str,
    named: tuple[str, ...],
    tiny_bert: Path,
    tiny_csv: Path,
) -> None:
    with raises(error, code, *named):
        load_data(configure(tiny_bert, tiny_csv, *overrides))


def test_a_missing_file_names_its_neighbour(tiny_bert: Path, tiny_csv: Path) -> None:
    with raises(DataError, "no-such-file", tiny_csv, "tinny.csv"):
        load_data(configure(tiny_bert, tiny_csv.with_name("tinny.csv")))


def test_a_domain_partition_without_domains_asks_for_the_column(tiny_bert: Path, tiny_csv: Path) -> None:
    config = parse_config(f"model.name='{tiny_bert}'\ndata.source='{tiny_csv}'\npartition={{name='domain', clients=4}}")
    with raises(DataError, "no-domain-column", "data.domain"):
        load_data(config)


@pytest.mark.parametrize("column", ["text", "label", "domain", "document"])
def test_a_gap_is_named_by_its_row_in_the_file_even_under_a_limit(column: str, tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "great film", "label": "p", "domain": "films", "document": str(i)} for i in range(30)]
    rows[17][column] = ""
    path = write(tmp_path / "gap.csv", rows)
    with raises(DataError, "missing-value", "row 17 (from 0)", f"'{column}'"):
        load_data(configure(tiny_bert, path, "data.limit=3"))


def test_a_corpus_that_was_not_fetched_names_the_command(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    with raises(AssetError, "asset-not-fetched", "fedlora assets vader"):
        load_data(configure(tiny_bert, "vader"))


def test_a_corpus_names_its_own_columns_and_the_config_can_name_others(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"text": "prompt", "domain": "person"}
    monkeypatch.setitem(ASSETS, "chat", replace(ASSETS["vader"], columns=own))  # type: ignore[arg-type]
    assert column_roles(DataConfig(source="chat")) == {"text": "prompt", "label": "label", "domain": "person"}
    named = DataConfig(source="chat", text="answer", domain="topic", group="talk")
    assert column_roles(named) == {"text": "answer", "label": "label", "domain": "topic", "group": "talk"}
    assert column_roles(DataConfig(source="a.csv")) == {"text": "text", "label": "label"}


def test_a_nodes_own_file_has_the_classes_of_all(tiny_bert: Path, tiny_csv: Path, tmp_path: Path) -> None:
    rows = [{"text": "great film", "label": "positive"}, {"text": "lovely film", "label": "positive"}]
    path = write(tmp_path / "node.csv", rows)
    labels = "task={name='text-classification', labels=['negative', 'positive']}"
    examples = load_local(configure(tiny_bert, tiny_csv, labels), path)
    assert examples.labels is not None
    assert examples.labels.tolist() == [1, 1]
    assert examples.label_names == ("negative", "positive")
    assert texts(examples, tiny_bert) == ["great film", "lovely film"]
    assert load_local(configure(tiny_bert, "vader"), path).label_names == ("negative", "positive")
    with raises(DataError, "classes-unknown", path, "task.labels"):
        load_local(configure(tiny_bert, tiny_csv), path)
    with raises(DataError, "no-such-file", "nodes.csv"):
        load_local(configure(tiny_bert, tiny_csv, labels), tmp_path / "nodes.csv")


def test_a_servers_own_test_file_keeps_its_domains(tiny_bert: Path, tiny_csv: Path) -> None:
    labels = "task={name='text-classification', labels=['negative', 'positive']}"
    examples = load_local(configure(tiny_bert, tiny_csv, labels), tiny_csv)
    assert len(examples) == 240
    assert set(examples.columns["domain"]) == {"films", "phones"}


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_the_split_comes_as_near_to_the_fraction_as_whole_groups_allow(fraction: float) -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 9, size=300)
    groups = np.repeat(np.arange(300), sizes)
    domains = np.repeat(generator.choice(["a", "b", "c"], size=300), sizes)
    mask = split_test(len(groups), fraction, 1, groups=groups, domains=domains)
    for domain in "abc":
        here = domains == domain
        assert abs(mask[here].sum() - fraction * here.sum()) <= 4.5  # half of the largest group, rounded up
    assert not set(groups[mask]) & set(groups[~mask])
    assert (mask == split_test(len(groups), fraction, 1, groups=groups, domains=domains)).all()
    assert (mask != split_test(len(groups), fraction, 2, groups=groups, domains=domains)).any()


def test_a_domain_with_one_group_stays_in_training() -> None:
    groups = np.array([0] * 5 + [1, 2, 3, 4])
    domains = np.array(["a"] * 5 + ["b"] * 4)
    mask = split_test(9, 0.5, 0, groups=groups, domains=domains)
    assert not mask[:5].any()
    assert mask.sum() == 2
    with raises(DataError, "empty-test-set", "data.test_fraction"):
        split_test(5, 0.5, 0, groups=groups[:5])


@pytest.mark.parametrize("seed", range(5))
def test_each_domain_keeps_its_shares_of_the_classes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.where(generator.random(1000) < 0.04, 1, 0)
    domains = generator.choice(["a", "b"], size=1000)
    mask = split_test(1000, 0.2, seed, domains=domains, labels=labels)
    for domain in "ab":
        for label in (0, 1):
            here = (domains == domain) & (labels == label)
            assert abs(mask[here].sum() - 0.2 * here.sum()) < 1


@pytest.mark.parametrize("seed", range(20))
def test_no_group_more_or_less_would_bring_the_test_nearer_to_its_share(seed: int) -> None:
    sizes = [20, 450, 30, 100, 80, 200, 120]
    groups = np.repeat(np.arange(7), sizes)
    mask = split_test(1000, 0.2, seed, groups=groups)
    got = mask.sum()
    inside = {int(group) for group in groups[mask]}
    for group, size in enumerate(sizes):
        assert abs(got - size - 200 if group in inside else got + size - 200) >= abs(got - 200) - 1e-9
    assert got >= 110, "not a fifth of what was asked for, all of one clinic"


def test_groups_are_chosen_for_the_shares_of_the_classes() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 20)
    rates = np.where(np.arange(60) < 12, 0.9, 0.05)  # a fifth of the clinics has most of the ill
    labels = (generator.random(1200) < rates[groups]).astype(np.int64)
    for seed in range(10):
        mask = split_test(1200, 0.25, seed, groups=groups, labels=labels)
        assert abs(labels[mask].mean() - labels.mean()) < 0.04


def test_a_test_set_of_one_group_is_said() -> None:
    groups = np.repeat([0, 1, 2], [20, 490, 490])
    mask = split_test(1000, 0.2, 0, groups=groups)
    assert mask.sum() == 20
    assert "20 of 1,000 examples (2.0%), all of one group" in describe_split(mask, 0.2, groups)
    even = np.repeat(np.arange(50), 20)
    assert describe_split(split_test(1000, 0.2, 0, groups=even), 0.2, even) == ""


def test_groups_have_the_names_that_people_know(tiny_bert: Path, tiny_csv: Path) -> None:
    natural = "{name='natural', column='domain'}"
    names = "data.group_names={domain={phones='Telephones'}}"
    data = load_data(configure(tiny_bert, tiny_csv, names, partition=natural))
    assert data.client_names == data.domains == ("Telephones", "films")
    assert [set(data.train.columns["domain"][rows]) for rows in data.clients] == [{"Telephones"}, {"films"}]
    for wrong, code, named in [
        ("{domain={fones='x'}}", "no-such-value", ("'fones'", "'phones'")),
        ("{domain={phones='films'}}", "name-given-twice", ("'films'",)),
        ("{domian={phones='x'}}", "no-such-column", ("'domian'", "'domain'")),
    ]:
        with raises(ConfigError, code, *named):
            load_data(configure(tiny_bert, tiny_csv, f"data.group_names={wrong}", partition=natural))


@pytest.mark.slow
def test_the_vader_corpus_has_its_columns_by_default(tiny_bert: Path, vader: Path) -> None:
    config = parse_config(f"model.name='{tiny_bert}'\npartition={{name='domain', clients=8}}")
    data = load_data(config)
    assert len(data.train) + len(data.test) == 19_459
    assert data.domains == ("amazon", "movies", "nyt", "tweets")
    assert data.label_names == ("negative", "positive")
    assert not set(data.train.columns["document"]) & set(data.test.columns["document"])
    for name, size in {"movies": 10_072, "amazon": 2_985, "nyt": 2_970, "tweets": 3_432}.items():
        share = (data.test.columns["domain"] == name).sum() / size
        assert abs(share - 0.1) < 0.005
    assert all(len(set(data.train.columns["domain"][rows])) == 1 for rows in data.clients)


def test_a_missing_file_is_said_before_the_column_that_it_would_have(tiny_bert: Path, tmp_path: Path) -> None:
    text = f"model.name='{tiny_bert}'\ndata.source='{tmp_path}/nowhere.csv'\npartition={{name='domain', clients=2}}"
    with raises(DataError, "no-such-file", "nowhere.csv"):
        load_data(parse_config(text))
