"""Models, tokenizers, data and clients that are passed in as objects train as the same ones do by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import peft
import pytest
import torch
from support.errors import raises
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel

import fedlora
from fedlora.api import resolve_config
from fedlora.model.fingerprint import fingerprint
from fedlora.passed_in import keep_model


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_bert: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(tiny_bert)


@pytest.fixture
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


def as_dataset(frame: pandas.DataFrame) -> datasets.Dataset:
    """With its classes as numbers, as the hub has them."""
    names = ["positive", "negative"]  # not in the order of the alphabet
    found = datasets.Dataset.from_pandas(frame.assign(label=frame["label"].map(names.index)))
    return found.cast_column("label", datasets.ClassLabel(names=names))


def as_rows(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = frame.to_dict("records")
    return [row if number % 2 else dict(reversed(row.items())) for number, row in enumerate(rows)]


def adapter_bytes(run: fedlora.Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", [lambda frame: frame, as_dataset, as_rows])
def test_objects_train_what_their_names_train(
    tiny_toml: Path,
    tiny_csv: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    form: Callable[[pandas.DataFrame], Any],
) -> None:
    frame = pandas.read_csv(tiny_csv).sample(frac=1, random_state=0)  # its index is not 0, 1, 2, ...
    named = tiny_toml.with_name("shuffled.csv")
    frame.to_csv(named, index=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, modules = model.config.to_dict(), [type(module) for module in model.modules()]
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "dataset": form(frame)}
    passed = fedlora.run(tiny_toml, **given, name="passed", quiet=True)
    task = {"labels": ["positive", "negative"]} if form is as_dataset else {}
    by_name = fedlora.run(tiny_toml, data={"source": str(named)}, task=task, name="by-name", quiet=True)
    assert adapter_bytes(passed) == adapter_bytes(by_name)
    mine, theirs = (json.loads((run.path / "provenance.json").read_text()) for run in (passed, by_name))
    same = ("train_data", "test_data", "tokenizer", "class_names")
    assert [mine[part] for part in same] == [theirs[part] for part in same]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [type(module) for module in model.modules()] == modules


@pytest.mark.slow
def test_the_record_says_that_they_were_passed_in(
    tiny_toml: Path, tiny_csv: Path, model: PreTrainedModel, tokenizer: Any
) -> None:
    frame = pandas.read_csv(tiny_csv)
    run = fedlora.run(tiny_toml, model=model, tokenizer=tokenizer, dataset=frame, rounds=1, quiet=True)
    copies = json.loads((run.path / "environment.json").read_text())["passed_in"]
    assert [Path(run.config.model.name).name, Path(run.config.data.source).stem] == copies
    made = json.loads((run.path / "provenance.json").read_text())
    assert made["base"] == fingerprint(fedlora.assets.Checkpoint(run.config.model.name))
    assert "passed in by the caller (model-" in run.report.read_text()


@pytest.mark.slow
def test_a_resume_takes_the_same_model_again_and_no_other(
    tiny_toml: Path, tmp_path: Path, model: PreTrainedModel, tokenizer: Any
) -> None:
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "quiet": True}
    whole = fedlora.run(tiny_toml, **given, name="whole")
    fedlora.run(tiny_toml, **given, rounds=1)
    copies = tmp_path / "cache" / "passed-in"
    shutil.rmtree(copies)
    written = tiny_toml.parent / "runs" / "tiny" / "config.toml"
    with raises(fedlora.FedloraError, "copy-lost", "model="):
        fedlora.run(fedlora.load_config(written), rounds=2, resume=True, quiet=True)
    other = BertModel(model.config)
    with raises(fedlora.FedloraError, "provenance-mismatch", "the base model"):
        fedlora.run(tiny_toml, model=other, tokenizer=tokenizer, resume=True, quiet=True)
    assert adapter_bytes(fedlora.run(tiny_toml, **given, resume=True)) == adapter_bytes(whole)


@pytest.mark.slow
def test_evaluation_takes_the_same_model_again_and_no_other(
    tiny_toml: Path, tiny_csv: Path, tmp_path: Path, model: PreTrainedModel, tokenizer: Any
) -> None:
    run = fedlora.run(tiny_toml, model=model, tokenizer=tokenizer, rounds=1, quiet=True)
    shutil.rmtree(tmp_path / "cache" / "passed-in")
    with raises(fedlora.FedloraError, "copy-lost", "model="):
        fedlora.evaluate(run)
    with raises(fedlora.FedloraError, "provenance-mismatch", "the base model"):
        fedlora.evaluate(run, model=BertModel(model.config), tokenizer=tokenizer)
    measured = fedlora.evaluate(run, model=model, tokenizer=tokenizer)
    assert measured.loc["all", "accuracy"] == pytest.approx(run.metrics["accuracy"].iloc[-1])
    assert type(run.model()).__name__.startswith("PeftModel")  # the copy is back
    rows = pandas.read_csv(tiny_csv)
    assert fedlora.evaluate(run, rows).equals(fedlora.evaluate(run, tiny_csv))
    with raises(fedlora.FedloraError, "key-without-effect", "data="):
        fedlora.evaluate(run, dataset=rows)


@pytest.mark.slow
def test_clients_bring_their_own_data(tiny_toml: Path, tiny_csv: Path) -> None:
    frame = pandas.read_csv(tiny_csv)
    parts = {name: part.drop(columns="domain") for name, part in frame.groupby("domain")}
    config = fedlora.load_config(tiny_toml, ["data.domain="])
    run = fedlora.run(config, clients=parts, name="passed", quiet=True)
    assert json.loads((run.path / "partition.json").read_text())["client_names"] == ["films", "phones"]
    whole = pandas.concat([part.assign(client=name) for name, part in parts.items()])
    whole.to_csv(named := tiny_toml.with_name("clients.csv"), index=False)
    table = {"name": "natural", "column": "client"}
    by_name = {"data": {"source": str(named), "domain": "client"}, "partition": table}
    assert adapter_bytes(run) == adapter_bytes(fedlora.run(config, **by_name, name="by-name", quiet=True))
    several = [frame.iloc[start : start + 20] for start in range(0, 220, 20)]  # 0 to 10: 10 comes after 9
    sizes = fedlora.partition_table(config, clients=[*several, frame.iloc[220:230]])
    assert sizes["name"].tolist() == [f"{number:02}" for number in range(12)]
    assert sizes["examples"].tolist() == [15] * 11 + [8]  # a quarter of each is for the test
    tested = fedlora.partition_table(config, clients=several, dataset={"test": frame.iloc[220:]})
    assert tested["examples"].tolist() == [20] * 11


@pytest.mark.nightly
def test_several_processes_read_the_copies(
    tiny_toml: Path, tiny_csv: Path, model: PreTrainedModel, tokenizer: Any
) -> None:
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "dataset": pandas.read_csv(tiny_csv), "rounds": 1}
    given |= {"strategy": {"name": "flora"}, "quiet": True}
    one, two = (
        fedlora.run(tiny_toml, **given, runtime={"processes": number, "cohort": 1}, name=f"run-{number}")
        for number in (1, 2)
    )
    assert adapter_bytes(one) == adapter_bytes(two)


def test_a_private_run_s_files_hold_no_hash_of_its_data(tiny_toml: Path, tiny_csv: Path, tmp_path: Path) -> None:
    frame = pandas.read_csv(tiny_csv)
    privacy = {"unit": "client", "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 0.01}
    changes: dict[str, Any] = {"privacy": privacy, "server": {"aggregation_error": False, "weighting": "uniform"}}
    names = []
    for key in ("one", "two"):  # two caches, two keys
        config = resolve_config(tiny_toml, {**changes, "dataset": frame})
        names.append(config.data.source)
        assert resolve_config(tiny_toml, {**changes, "dataset": frame}) == config
        (tmp_path / "cache" / "passed-in").rename(tmp_path / key)
    public = resolve_config(tiny_toml, {"dataset": frame}).data.source
    assert len({*names, public}) == 3


@pytest.mark.slow
def test_a_head_that_the_object_has_is_kept(tiny_toml: Path, tiny_bert: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    run = fedlora.run(tiny_toml, model=model, tokenizer=tokenizer, rounds=1, quiet=True)
    (note,) = json.loads((run.path / "environment.json").read_text())["new_weights"]
    assert "head is kept" in note


def tuned(model: PreTrainedModel) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


def injected(model: PreTrainedModel) -> Any:
    tuned(model)
    return model


def rebuilt(model: Any) -> Any:
    model.pooler.dense = torch.nn.Sequential(model.pooler.dense)
    return model


def test_a_model_that_was_never_saved_stays_as_it_is() -> None:
    made = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    before = made.config.to_dict()
    keep_model(made)
    assert made.config.to_dict() == before


class Mine(BertModel):
    pass


@pytest.mark.parametrize(
    ("change", "kind", "code", "named"),
    [
        (tuned, fedlora.FedloraError, "bad-object", "merge_and_unload"),
        (injected, fedlora.FedloraError, "model-not-loadable", "merge_and_unload"),
        (rebuilt, fedlora.FedloraError, "model-not-loadable", "pooler.dense"),
        (lambda model: Mine(model.config), fedlora.FedloraError, "model-not-loadable", "Mine"),
        (lambda model: model.to("meta"), fedlora.FedloraError, "model-not-loadable", "memory"),
        (lambda model: torch.nn.Linear(2, 2), fedlora.FedloraError, "bad-object", "Linear"),
    ],
)
def test_a_model_that_would_load_as_another_is_refused(
    model: PreTrainedModel, change: Callable[[Any], Any], kind: type[fedlora.FedloraError], code: str, named: str
) -> None:
    with raises(kind, code, named):
        keep_model(change(model))


@pytest.mark.parametrize(
    ("given", "code", "named"),
    [
        ({"tokenizer": object()}, "tokenizer-alone", "model="),
        ({"dataset": 3}, "bad-object", "'train'"),
        ({"data": [{"text": "a", "label": "b"}]}, "bad-object", "pass examples as dataset="),
        ({"data": "x.csv"}, "not-a-table", "set data.source = 'x.csv'"),
        ({"dataset": []}, "empty-file", "'train'"),
        ({"dataset": [{"text": 1}, {"text": "one"}]}, "mixed-types", "'train'"),
        ({"dataset": {"trian": []}}, "unknown-key", "'trian'"),
        ({"dataset": [], "data": {"source": "x.csv"}}, "given-twice", "dataset="),
        ({"clients": [[{"text": "a"}]], "partition": {"name": "iid"}}, "given-twice", "clients="),
        ({"clients": [[{"text": "a"}], []]}, "client-without-examples", "'1'"),
        ({"clients": []}, "bad-object", "clients="),
        ({"clients": [[{"text": "a", "client": 1}]]}, "column-taken", "'client'"),
        ({"clients": [[{"text": "a"}], [{"text": 1}]]}, "mixed-types", "clients="),
        ({"clients": 3}, "bad-object", "clients="),
    ],
)
def test_what_cannot_be_passed_in_is_one_line(tiny_toml: Path, given: dict[str, Any], code: str, named: str) -> None:
    with raises(fedlora.FedloraError, code, named):
        fedlora.run(tiny_toml, **given, quiet=True)
    assert not (tiny_toml.parent / "runs").exists()


def test_the_table_of_the_clients_is_still_a_table(tiny_toml: Path) -> None:
    assert resolve_config(tiny_toml, {"clients": {"ranks": [2, 3]}}).clients.ranks == (2, 3)


def test_a_model_without_its_tokenizer_is_answered_with_the_keyword(tiny_toml: Path, model: PreTrainedModel) -> None:
    with raises(fedlora.FedloraError, "no-tokenizer", "passed in by the caller", "pass tokenizer= beside model="):
        fedlora.run(tiny_toml, model=model, quiet=True)


def test_a_column_that_passed_in_data_lack_is_said_of_them(tiny_toml: Path, tiny_csv: Path) -> None:
    frame = pandas.read_csv(tiny_csv).rename(columns={"text": "words"})
    with raises(fedlora.FedloraError, "no-such-column", "data.source 'passed in by the caller", "'text'"):
        fedlora.run(tiny_toml, dataset=frame, quiet=True)
