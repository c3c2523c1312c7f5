"""Where a run's folder goes, and what may be in the way there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunDirError
from fedlora.sanitize import clean_text

BEFORE_CONFIG = ("environment.json", "run-id")
"""Files that a run's folder has before config.toml, by which it is known as a run's."""


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
    if path.exists() and not (path / "config.toml").is_file() and not all(map(_is_unfinished, path.iterdir())):
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
    """Remove a run's folder. A kill in between leaves a run that goes on from its beginning, or nothing that is in the
    way of a new one."""
    last = ("config.toml", *BEFORE_CONFIG)
    for entry in sorted(path.iterdir(), key=lambda entry: last.index(entry.name) if entry.name in last else -1):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    path.rmdir()


def _is_unfinished(entry: Path) -> bool:
    """Whether a file may be of a run that was killed before its folder was made."""
    return entry.name in (*BEFORE_CONFIG, ".lock") or (entry.name.startswith(".") and entry.suffix == ".tmp")


def unwritable(path: Path, error: OSError) -> RunDirError:
    """What is said of a folder that cannot be made."""
    return RunDirError(
        f"the run's folder {clean_text(repr(str(path)), 300)} cannot be created: {error.strerror or error}; choose "
        "another place with --set output=... or --set name=...",
        code="folder-not-writable",
    )
