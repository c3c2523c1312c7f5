"""What relative paths are relative to: those in a config file to its folder, those of overrides to the current one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError

FOLDERS = ("model.name", "adapter.start")
PATHS = (*FOLDERS, "data.source", "data.test")
"""Keys whose value may be a path: of a folder with a model or an adapter, or of a file with data; that of
`adapter.start` is nothing else. Where the run's folder goes (`output`) is relative to the current folder, always."""
DATA_FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def absolute(tree: dict[str, Any], folder: Path, keys: tuple[str, ...] = PATHS) -> None:
    """Make the relative paths of a config absolute, in place; names of the hub and of assets stay as they are.

    Args:
        tree: of the TOML file.
        folder: that they are relative to.
        keys: to look at.

    Raises:
        ConfigError: there is no such file in `folder`, and there is one in the current folder.
    """
    for key in keys:
        table, _, last = key.partition(".")
        here = tree.get(table)
        if isinstance(here, dict) and isinstance(value := here.get(last), str) and value:
            here[last] = _absolute(key, value, folder)


def with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tables with paths that any current folder understands; relative ones are the current folder's."""
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    absolute(tree, Path())
    return tree


def _absolute(key: str, value: str, folder: Path) -> str:
    given = Path(value).expanduser()
    there, here = (Path(os.path.abspath(place / given)) for place in (folder, Path()))
    exists = Path.is_dir if key in FOLDERS else Path.is_file
    if exists(there):
        return str(there)
    if here != there and exists(here):
        raise ConfigError(
            f"{key} = {value!r} is in the current folder, but paths in a config are relative to its own folder: "
            f"write {os.path.relpath(here, folder)!r} or {str(here)!r} there",
            code="path-in-current-folder",
        )
    is_path = value.startswith(("~", "./", "../")) or key == "adapter.start"
    return str(there) if is_path or (key not in FOLDERS and given.suffix.lower() in DATA_FILES) else value
