"""A model's revision and its permission to run code reach everything that is loaded of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from fedlora.assets import Checkpoint
from fedlora.config import ModelConfig
from fedlora.model.fingerprint import fingerprint
from fedlora.tasks._text import load_tokenizer
from fedlora.tasks.image_classification import _processor
from fedlora.tasks.text_classification import TextClassification


@pytest.fixture
def hub(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub name whose revision "v2" has a token more than its main branch."""
    from huggingface_hub import constants

    name = f"tiny/{tmp_path.name}"  # what was read of a hub name is kept
    repo = tmp_path / f"models--{name.replace('/', '--')}"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_bert, repo / "snapshots" / commit)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(repo / "snapshots" / ("b" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return name


def test_a_revision_has_its_own_tokenizer(hub: str) -> None:
    sizes = {
        revision: len(load_tokenizer(Checkpoint.of(ModelConfig(name=hub, revision=revision))))
        for revision in (None, "main", "v2", "b" * 40)
    }
    assert sizes["v2"] == sizes["b" * 40] == sizes[None] + 1
    assert sizes["main"] == sizes[None]


def test_a_folder_and_the_hubs_cache_with_the_same_files_are_the_same_model(
    hub: str, tiny_bert: Path, tmp_path: Path
) -> None:
    task, v2 = TextClassification(), tmp_path / f"models--{hub.replace('/', '--')}" / "snapshots" / ("b" * 40)
    for revision, commit, folder in ((None, "a" * 40, tiny_bert), ("v2", "b" * 40, v2)):
        there, here = Checkpoint(hub, revision), Checkpoint(str(folder))
        assert task.reads(there) == task.reads(here)
        assert fingerprint(there, commit) == fingerprint(there) == fingerprint(here)
    assert task.reads(Checkpoint(hub)) != task.reads(Checkpoint(hub, "v2"))


def test_remote_code_is_allowed_for_all_of_a_model_or_for_nothing(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def spy(loader: str, found: Any) -> None:
        def load(source: str, **options: Any) -> Any:
            given.append({"source": source, **options})
            return found

        monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", load)

    spy("AutoTokenizer", transformers.AutoTokenizer.from_pretrained(tiny_bert))
    spy("AutoImageProcessor", object())
    spy("AutoConfig", object())
    for trust in (True, False):
        checkpoint = Checkpoint.of(ModelConfig(name=str(tiny_bert), revision="v3", trust_remote_code=trust))
        load_tokenizer(checkpoint)
        _processor(checkpoint)
    assert [(one["trust_remote_code"], one["revision"]) for one in given] == [(True, "v3")] * 3 + [(False, "v3")] * 3
