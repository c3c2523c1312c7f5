"""Where a run's folder goes, and what may be in the way there."""

from __future__ import annotations

import glob
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunDirError
from fedlora.files import sync_folder
from fedlora.sanitize import clean_text

REMOVED = ".removed"


def path_of(config: RunConfig, root: str | Path | None = None) -> Path:
    """The folder of a run.

    Args:
        config: resolved.
        root: the folder that it is made in; None: `config.output`.

    Raises:
        ConfigError: the run's name cannot be a folder's name.
    """
    if config.name in ("", ".", "..") or any(mark in config.name for mark in ("/", "\\", "\0")):
        raise ConfigError(
            f"name {config.name!r} must be a plain folder name: letters, digits, '-', '_' and '.'", code="bad-run-name"
        )
    return Path(config.output if root is None else root) / config.name


def check_free(config: RunConfig, *, overwrite: bool = False) -> None:
    """Raise what `RunDir.create` would raise of an earlier run, or of a place that cannot be written; leaves nothing.

    Raises:
        RunDirError: the folder is there, with an earlier run or with something else, or cannot be made.
        ConfigError: the run's name cannot be a folder's name.
    """
    path = path_of(config)
    try:
        refuse_foreign(path) if overwrite else refuse_taken(path)
        above = next(folder for folder in path.absolute().parents if folder.exists())
        tempfile.TemporaryDirectory(prefix=".fedlora-", dir=above).cleanup()  # what permissions do not say
    except OSError as error:
        raise unwritable(path, error) from None


def refuse_foreign(path: Path) -> None:
    """Whatever is no run's is not touched, even where overwriting was asked for."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise RunDirError(
            f"{str(path)!r} exists and is not a folder: choose another name with --set name=...",
            code="not-a-folder",
        )
    if path.exists() and any(path.iterdir()) and not (path / "config.toml").is_file():
        raise RunDirError(
            f"{str(path)!r} holds files that are not a run's: choose another name with --set name=...",
            code="folder-holds-other-files",
        )


def refuse_taken(path: Path) -> None:
    """Raise where there is an earlier run, or what is no run's."""
    refuse_foreign(path)
    if not (path / "config.toml").is_file():
        return
    if (path / "result.json").is_file():
        raise RunDirError(
            f"{str(path)!r} holds a finished run: replace it with --overwrite, or choose another name with --set "
            "name=...",
            code="run-exists",
        )
    raise RunDirError(
        f"{str(path)!r} holds an unfinished run: continue it with --resume {path}, replace it with --overwrite, "
        "or choose another name with --set name=...",
        code="run-unfinished",
    )


def remove_run(path: Path) -> None:
    """Remove a run's folder, which is there as a whole or not at all whenever this process is killed: a part of a run
    would go on from its checkpoint without the privacy that it has spent."""
    gone = _beside(path, REMOVED)
    path.rename(gone)
    shutil.rmtree(gone)


def remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed has left of folders that it removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{REMOVED}"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """An empty folder to fill; at the end it gets its name, which is taken by an empty folder at most.

    Raises:
        OSError: the folder cannot be made, or another one has the name.
    """
    made = _beside(path, ".tmp")
    made.mkdir(parents=True)
    try:
        yield made
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    sync_folder(path.parent)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{suffix}")


def unwritable(path: Path, error: OSError) -> RunDirError:
    """What is said of a folder that cannot be made."""
    return RunDirError(
        f"the run's folder {clean_text(repr(str(path)), 300)} cannot be created: {error.strerror or error}; choose "
        "another place with --set output=... or --set name=...",
        code="folder-not-writable",
    )
