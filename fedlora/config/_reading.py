"""From TOML text to a `RunConfig`: overrides, and refusals that name the nearest valid key."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedlora.config._base import OPEN_TABLES, Section
from fedlora.config._federation import ProfileConfig
from fedlora.config._overrides import apply_overrides, refuse_twice, without_unset
from fedlora.config._paths import PATHS, absolute
from fedlora.config._privacy import UNITS, unit_of
from fedlora.config._run import RunConfig
from fedlora.errors import ConfigError, nearest, nearest_file
from fedlora.foreign_names import our_word
from fedlora.registry import first_problem

S = TypeVar("S", bound=Section)
SHIPPED = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Where the ready files are: inside an installed package, and beside it in a checkout."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply `key=value` overrides.

    Args:
        path: of the file, or the name of one that ships with fedlora ("quickstart"); its stem is the run's name unless
            the file gives one. Its relative paths are relative to its own folder.
        overrides: such as "rounds=20" or "strategy.name=ffa"; values are TOML, a bare word is a string, and a key
            without a value is removed. Their relative paths are relative to the current folder.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown (with the nearest valid one), a value is wrong.
    """
    path = find_config(path)
    text = _read(path, "config file", [other.stem for folder in SHIPPED for other in folder.glob("*.toml")])
    refuse_twice(overrides)
    return parse_config(text, overrides, source=str(path), name=path.stem, folder=path.parent)


def load_section(path: Path, section: type[S], what: str) -> S:
    """Read a TOML file that is one table of its own, such as a site's policy.

    Args:
        path: The file.
        section: The table's model.
        what: Words for the file in messages, such as "policy".

    Raises:
        ConfigError: see `load_config`.
    """
    tree = _tree(_read(path, what), str(path))
    _refuse_unknown(tree, section, "")
    _refuse_nul(tree, "")
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}", code="bad-value") from None


def find_config(path: str | Path) -> Path:
    """The file of a shipped config for a bare name that is no file itself; otherwise the path as it is."""
    path = Path(path)
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path
    return next((found for folder in SHIPPED if (found := folder / f"{path}.toml").is_file()), path)


def parse_config(
    text: str,
    overrides: Sequence[str] = (),
    *,
    source: str = "config",
    name: str | None = None,
    folder: Path | None = None,
) -> RunConfig:
    """As `load_config`, from TOML text.

    Args:
        text: of the file.
        overrides: see `load_config`.
        source: of the text, for messages.
        name: of the run, unless the text gives one.
        folder: that the text's relative paths are relative to, those of `overrides` being relative to the current one;
            None: all paths stay as they are.
    """
    tree = _tree(text, source)
    if name is not None:
        tree.setdefault("name", name)
    if folder is not None:
        absolute(tree, folder)
    apply_overrides(tree, overrides)
    if folder is not None:
        absolute(tree, Path(), tuple(key for key in PATHS if key in {o.partition("=")[0].strip() for o in overrides}))
    _refuse_unknown(tree, RunConfig, "")
    tree = without_unset(tree)
    _refuse_nul(tree, "")
    for table in OPEN_TABLES:
        if isinstance(given := tree.get(table), dict) and "name" not in given:
            tree[table] = {**RunConfig.model_fields[table].default.model_dump(), **given}
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error)
        for unit in UNITS:  # pydantic names the branch of a union, which is no table of the file
            problem = problem.replace(f"privacy.{unit}.", "privacy.")
        keys = [override.partition("=")[0].strip() for override in overrides]
        where = "--set" if problem.partition(":")[0] in keys else source
        raise ConfigError(f"{where}: {problem}", code="bad-value") from None


def _read(path: Path, what: str, shipped: Sequence[str] = ()) -> str:
    """The text of a TOML file; without a suffix a name may also have been meant as one of those that are shipped."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        others += [] if path.suffix else shipped
        raise ConfigError(
            f"there is no {what} {str(path)!r}; {nearest_file(path, others)}", code="no-such-file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {str(path)!r} is not UTF-8 text: convert it", code="not-utf8") from None
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{what} {str(path)!r} cannot be read: {why}", code="file-not-readable") from None


def _tree(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid TOML: {error}", code="not-toml") from None


def _refuse_nul(tree: Any, key: str) -> None:
    """No file name and no program takes text with a NUL character, which TOML can write."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            _refuse_nul(str(name), f"a name in {key or 'the config'}")
            _refuse_nul(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            _refuse_nul(value, key)
    elif isinstance(tree, str) and "\0" in tree:
        raise ConfigError(f"{key} contains a NUL character: remove it", code="nul-character")


def _refuse_unknown(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in section.model_fields:
            cure = our_word(key) or nearest(key, section.model_fields)
            raise ConfigError(f"unknown key {prefix + key!r}; {cure}", code="unknown-key")
        annotation = section.model_fields[key].annotation
        inner = next((part for part in get_args(annotation) if isinstance(part, type)), annotation)
        if key == "privacy" and isinstance(value, Mapping):
            if (unit := unit_of(value)) not in UNITS:
                raise ConfigError(f"unknown privacy.unit {unit!r}; {nearest(str(unit), UNITS)}", code="unknown-name")
            inner = UNITS[unit]
        if isinstance(inner, type) and issubclass(inner, Section) and isinstance(value, Mapping):
            _refuse_unknown(value, inner, f"{prefix}{key}.")
        if key == "profiles" and isinstance(value, list):
            for profile in value:
                if isinstance(profile, Mapping):
                    _refuse_unknown(profile, ProfileConfig, f"{prefix}{key}.")
