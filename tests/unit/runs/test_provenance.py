"""What a run stands on may be moved, and not changed: every command that reads a run says what changed."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from support.command_line import invoke

from fedlora.assets import Checkpoint
from fedlora.hashing import digest_of, file_digest, row_digests
from fedlora.model.fingerprint import fingerprint
from fedlora.provenance import MODEL, WORDS, Provenance, config_digest
from fedlora.runs.rundir import RunDir
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.image_classification import ImageClassification
from fedlora.tasks.text_classification import TextClassification
from fedlora.training import close_workspace

Cli = Callable[..., Result]

TOML = """
rounds = 1
[model]
name = "bert"
[adapter]
rank = 2
targets = ["query", "value"]
[data]
source = "train.csv"
test = "test.csv"
[partition]
name = "iid"
clients = 2
[train]
steps = 1
lr = 0.01
[runtime]
threads = 1
kernels = "off"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_csv: Path) -> Path:
    """A folder with a base, data, a config with relative paths, and a finished run of all that; tests copy it."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_bert, folder / "bert")
    header, *lines = tiny_csv.read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([header, *lines[:60]]) + "\n")
    (folder / "test.csv").write_text("\n".join([header, *lines[60:90]]) + "\n")
    (folder / "more.csv").write_text("\n".join([header, *lines[90:120]]) + "\n")
    (folder / "scene.toml").write_text(TOML)
    done = call("run", folder / "scene.toml", "-q", "--set", f"output={folder / 'runs'}")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def scene(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `made` elsewhere: a run whose base and data were moved with it."""
    folder = tmp_path / "moved"
    shutil.copytree(made, folder)
    written = folder / "runs" / "scene" / "config.toml"
    written.write_text(written.read_text().replace(str(made), str(folder)))
    close_workspace()
    yield folder
    close_workspace()


def call(*words: object) -> Result:
    return invoke(*words, env={"COLUMNS": "200", "NO_COLOR": "1"})


def swap_base(folder: Path) -> None:
    path = folder / "bert" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "word_embeddings" in name)
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, path, {"format": "pt"})


def change_architecture(folder: Path) -> None:
    path = folder / "bert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_eps": 0.1}))


def add_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    tokenizer.add_special_tokens({"additional_special_tokens": ["great"]})
    tokenizer.save_pretrained(folder / "bert")


def edit(name: str, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / name
        rows = change(list(csv.DictReader(path.open())))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return do


def renamed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"negative": "up", "positive": "down"}  # which sort the other way round
    return [{**row, "label": names[row["label"]]} for row in rows]


def rename_classes(folder: Path) -> None:
    for name in ("train.csv", "test.csv"):
        edit(name, renamed)(folder)


CHANGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "base swapped": (swap_base, {"base"}),
    "architecture changed": (change_architecture, {"base"}),
    "special token added": (add_token, {"tokenizer"}),
    "rows appended": (edit("train.csv", lambda rows: [*rows, rows[0]]), {"train_data"}),
    "rows in another order": (edit("train.csv", lambda rows: rows[::-1]), {"train_data"}),
    "one word changed": (
        edit("train.csv", lambda rows: [{**rows[0], "text": rows[0]["text"] + " bad"}, *rows[1:]]),
        {"train_data"},
    ),
    "test set grown": (edit("test.csv", lambda rows: [*rows, rows[0]]), {"test_data"}),
    "test set in another order": (edit("test.csv", lambda rows: rows[::-1]), {"test_data"}),
    "classes renamed": (rename_classes, {"class_names", "train_data", "test_data"}),
}
COMMANDS: dict[str, tuple[Callable[[Path], tuple[object, ...]], set[str]]] = {
    "resume": (lambda run: ("run", "--resume", run, "-q", "--set", "rounds=2"), set(WORDS)),
    "baselines": (lambda run: ("run", "--resume", run, "-q", "--baselines"), set(WORDS)),
    "evaluate": (lambda run: ("evaluate", run), {*MODEL, "test_data"}),
    "evaluate --clients": (lambda run: ("evaluate", run, "--clients"), set(WORDS)),
    "export --format merged": (lambda run: ("export", run, run.parent / "merged", "--format", "merged"), set(MODEL)),
    "spectrum": (lambda run: ("spectrum", run), {"base"}),
}


def meetings() -> list[object]:
    """Each command with each change; two commands for each change are slow, the others nightly."""
    places = product(enumerate(COMMANDS), enumerate(CHANGES))
    return [
        pytest.param(one, two, marks=() if (i - j) % 3 == 0 else pytest.mark.nightly) for (i, one), (j, two) in places
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "change"), meetings())
def test_a_command_says_what_changed_of_what_it_reads_and_nothing_else(scene: Path, command: str, change: str) -> None:
    do, parts = CHANGES[change]
    words, reads = COMMANDS[command]
    do(scene)
    before = {path: path.read_bytes() for path in sorted((scene / "runs").rglob("*")) if path.is_file()}
    result = call(*words(scene / "runs" / "scene"))
    told = {part for part in WORDS if WORDS[part] in result.stderr}
    if parts & reads:
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert told == parts & reads if command != "evaluate" else told <= parts & reads
        assert told
        assert before == {p: p.read_bytes() for p in sorted((scene / "runs").rglob("*")) if p.is_file()} or (
            command == "resume"  # which has locked the run by then
        )
    else:
        assert (result.exit_code, told) == (0, set()), result.output


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.slow
def test_what_was_only_moved_or_written_again_is_the_same(
    scene: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a run's paths do not follow the current folder
    for path in (scene / "bert").iterdir():
        os.utime(path, (1, 1))
    rows = list(csv.DictReader((scene / "train.csv").open()))
    edit("train.csv", lambda _: [{name: row[name] for name in reversed(row)} for row in rows])(scene)
    result = call(*COMMANDS[command][0](scene / "runs" / "scene"))
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_a_base_that_was_moved_is_named_by_set(scene: Path) -> None:
    (scene / "bert").rename(scene / "elsewhere")
    run = scene / "runs" / "scene"
    result = call("run", "--resume", run, "-q", "--set", "rounds=2", "--set", f"model.name={scene / 'elsewhere'}")
    assert result.exit_code == 0, result.output
    assert RunDir.open(run).config.model.name == str(scene / "elsewhere")
    assert RunDir.open(run).changes == []


def test_an_exported_adapter_knows_its_base_and_its_classes(scene: Path) -> None:
    folder = scene / "alone"
    shutil.copytree(scene / "runs" / "scene" / "adapter", folder)
    words = ["evaluate", folder, "--data", scene / "test.csv", "--set", f"model.name={scene / 'bert'}", "--set"]
    assert call(*words, "task.labels=['negative','positive']").exit_code == 0
    swapped = call(*words, "task.labels=['positive','negative']")
    assert WORDS["class_names"] in swapped.stderr
    swap_base(scene)
    other = call(*words, "task.labels=['negative','positive']")
    assert WORDS["base"] in other.stderr
    (folder / "fedlora.json").unlink()  # as the message says
    assert call(*words, "task.labels=['negative','positive']").exit_code == 0


def test_the_files_of_a_run_hold_the_hashes_of_all_that_it_reads(made: Path) -> None:
    written = json.loads((made / "runs" / "scene" / "provenance.json").read_text())
    assert written.keys() == {"base", "tokenizer", "class_names", "train_data", "test_data"}
    beside = json.loads((made / "runs" / "scene" / "adapter" / "fedlora.json").read_text())["provenance"]
    assert beside == {part: written[part] for part in ("base", "tokenizer", "class_names")}


# ---------------------------------------------------------------------------------------------- the hashes


def test_a_tokenizer_is_what_it_does_and_not_where_it_lies_nor_how_it_was_called(tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    from fedlora.provenance import tokenizer_digest

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a film"], truncation=True, max_length=2, padding=True)
    assert tokenizer_digest(tokenizer) == before
    changes: list[Callable[[Any], None]] = [
        lambda t: t.add_tokens(["<x>"]),
        lambda t: t.add_special_tokens({"pad_token": "[MASK]"}),
        lambda t: setattr(t.backend_tokenizer, "normalizer", None),
    ]
    for change in changes:
        other = AutoTokenizer.from_pretrained(tiny_bert)
        change(other)
        assert tokenizer_digest(other) != before


def test_a_chat_template_counts_where_conversations_are_rendered(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    found = {}
    for template in (None, "{{ messages[0]['content'] }}", "{{ messages[0]['content'] }}!"):
        folder = tmp_path / str(len(found))
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        found[template] = CausalLM().reads(folder)
        assert CausalLM(format="text").reads(folder).keys() == {"tokenizer"}
        assert TextClassification().reads(folder).keys() == {"tokenizer"}
    assert len({reads["chat_template"] for reads in found.values()}) == 3
    assert len({reads["tokenizer"] for reads in found.values()}) == 1


def test_an_image_processor_is_its_sizes_and_means(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    facts |= {"image_mean": [0.5], "image_std": [0.5]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_channels": 1, "patch_size": 4}))
    found = []
    for change in ({}, {"image_mean": [0.4]}, {"image_std": [0.4]}, {"size": {"height": 4, "width": 4}}, {}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts | change))
        found.append(ImageClassification().reads(tmp_path)["processor"])
    assert found[0] == found[-1]
    assert len(set(found)) == 4


def test_weights_are_those_that_transformers_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shards = {"a": torch.randn(2), "b": torch.randn(2)}
    for name, tensor in shards.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in shards}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 2, "transformers_version": "1"}))
    before = fingerprint(Checkpoint(str(tmp_path)))
    save_file({"c": torch.randn(2)}, tmp_path / "consolidated.safetensors")  # which nobody loads
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": "2", "hidden_size": 2}))
    assert fingerprint(Checkpoint(str(tmp_path))) == before
    save_file({"b": shards["b"] + 1}, tmp_path / "b.safetensors")
    assert fingerprint(Checkpoint(str(tmp_path))) != before


def test_a_hash_that_was_kept_is_not_believed_of_a_file_that_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora import hashing

    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "WORTH_KEEPING", 1)
    monkeypatch.setattr(hashing, "SETTLED_S", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = file_digest(path)
    hashing._file_digest.cache_clear()  # as in another process
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 1
    assert file_digest(path) == first
    stamp = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size and time
    assert file_digest(path) != first


def test_rows_are_their_content_by_role(tmp_path: Path) -> None:
    rows = row_digests({"text": ["a", "b"], "label": [1, 0]})
    assert (rows == row_digests({"label": ["1", "0"], "text": ["a", "b"]})).all()
    assert (rows[::-1] == row_digests({"text": ["b", "a"], "label": [0, 1]})).all()
    assert (rows != row_digests({"text": ["a1", "b"], "label": ["", 1]})).all()
    (tmp_path / "one").write_bytes(b"picture")
    (tmp_path / "two").write_bytes(b"picture")
    same = row_digests({"image": [str(tmp_path / "one"), tmp_path / "two"]})
    assert same[0] == same[1]


def test_only_what_both_know_can_have_changed() -> None:
    known = Provenance(base="a", tokenizer="b", test_data="c")
    assert known.changed(Provenance()) == Provenance().changed(known) == ()
    assert known.changed(Provenance(base="x", tokenizer="b", train_data="y")) == ("base",)
    assert Provenance.read({**known.known, "foreign": 1, "processor": 3}) == known
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert config_digest({"a": 1, "_name_or_path": "x"}) == config_digest({"a": 1, "_name_or_path": "y"})
