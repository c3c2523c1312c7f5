"""Archives that nobody here wrote: read, and unpacked without leaving the folder."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

from fedlora.errors import AssetError


def safe_path(folder: Path, name: str) -> Path:
    """Where an archive's member `name` belongs in `folder`; `AssetError` if it would lie outside.

    Args:
        folder: where the archive is unpacked.
        name: with forward slashes, as in an archive.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or ":" in name:
        raise AssetError(f"an archive holds the unsafe path {name!r}; nothing was kept", code="unsafe-path")
    return folder.joinpath(*parts)


def extract_zip(
    archive: Path | IO[bytes], folder: Path, *, prefix: str = "", only: Iterable[str] | None = None
) -> None:
    """Write a zip file's members under `prefix` into a folder; paths that lead out of it are refused.

    Args:
        archive: the zip file.
        folder: where to write.
        prefix: members whose names start with it are taken, without it: "package/model/".
        only: names after the prefix that are wanted; None for all.
    """
    wanted = None if only is None else frozenset(only)
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            name = member.filename.removeprefix(prefix)
            if member.is_dir() or not member.filename.startswith(prefix) or (wanted is not None and name not in wanted):
                continue
            target = safe_path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def tar_member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """A file of a tar archive; `AssetError` if there is something else by that name, `KeyError` if there is nothing."""
    member = archive.extractfile(name)
    if member is None:
        raise AssetError(f"{name!r} is not a regular file in its archive; nothing was kept", code="archive-damaged")
    return member
