"""From TOML text to a `RunConfig`: overrides, and refusals that name the nearest valid key."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fedlora.config._base import OPEN_TABLES, Section
from fedlora.config._federation import ProfileConfig
from fedlora.config._overrides import UNSET, Keys, Overrides, apply_overrides, changed_keys, refuse_twice, without_unset
from fedlora.config._paths import PATHS, absolute
from fedlora.config._privacy import UNITS, unit_of
from fedlora.config._run import RunConfig
from fedlora.errors import ConfigError, nearest, nearest_file
from fedlora.foreign_names import our_word
from fedlora.registry import first_problem, refuse_truth

S = TypeVar("S", bound=Section)
SHIPPED = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Where the ready files are: inside an installed package, and beside it in a checkout."""


def load_config(path: str | Path, overrides: Overrides = ()) -> RunConfig:
    """Read a TOML file and change some of its keys.

    Args:
        path: of the file, or the name of one that ships with fedlora ("quickstart"); its stem is the run's name unless
            the file gives one. Its relative paths are relative to its own folder.
        overrides: texts such as "rounds=20" or "strategy.name=ffa", whose values are TOML, a bare word being a string,
            and where a key without a value is removed; or a tree such as {"strategy": {"name": "ffa"}}, whose tables
            are merged into those of the file. Their relative paths are relative to the current folder.

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
    _require_keys(tree, section, "")
    _refuse_nul(tree, "")
    try:
        read = section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}", code="bad-value") from None
    refuse_truth(tree, read, f"{path}: ")
    return read


def find_config(path: str | Path) -> Path:
    """The file of a shipped config for a bare name that is no file itself; otherwise the path as it is."""
    path = Path(path)
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path
    return next((found for folder in SHIPPED if (found := folder / f"{path}.toml").is_file()), path)


def parse_config(
    given: str | Mapping[str, Any],
    overrides: Overrides = (),
    *,
    source: str = "config",
    name: str | None = None,
    folder: Path | None = None,
) -> RunConfig:
    """As `load_config`, from TOML text or a tree of tables.

    Args:
        given: the text of a file; or what it says, as a tree.
        overrides: see `load_config`.
        source: of what is given, for messages.
        name: of the run, unless what is given has one.
        folder: that its relative paths are relative to, those of `overrides` being relative to the current one;
            None: all paths stay as they are.
    """
    tree = _tree(given, source) if isinstance(given, str) else copy.deepcopy(dict(given))
    if name is not None:
        tree.setdefault("name", name)
    if folder is not None:
        absolute(tree, folder)
    apply_overrides(tree, overrides)
    changed = changed_keys(overrides)
    if folder is not None:
        absolute(tree, Path(), tuple(key for key in PATHS if _was_changed(key, changed)))
    _require_keys(tree, RunConfig, "")
    tree = without_unset(tree)
    _refuse_nul(tree, "")
    for table in OPEN_TABLES:
        if isinstance(fields := tree.get(table), dict) and "name" not in fields:
            tree[table] = {**RunConfig.model_fields[table].default.model_dump(), **fields}
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problem = first_problem(error)
        for unit in UNITS:  # pydantic names the branch of a union, which is no table of the file
            problem = problem.replace(f"privacy.{unit}.", "privacy.")
        where, key = f"{source}: ", problem.partition(":")[0]
        if _was_changed(key, changed) or (
            key.endswith(" is missing") and key.partition(".")[0] in {keys[0] for keys in changed}
        ):
            where = "" if isinstance(overrides, Mapping) else "--set: "
        raise ConfigError(f"{where}{problem}", code="bad-value") from None
    refuse_truth(tree, config)
    return config


def _sections() -> dict[type[BaseModel], str]:
    """Each table of a run's config with its name, the whole's being ""."""
    tables: dict[type[BaseModel], str] = {RunConfig: ""}
    for name, field in RunConfig.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        tables |= dict.fromkeys(found, name)
    return tables | dict.fromkeys(UNITS.values(), "privacy")


def _elsewhere(key: str) -> str | None:
    """Where a key stands that is none of its table's, as the end of a message; None where there is none."""
    table, _, rest = key.partition(".")
    if rest and table in RunConfig.model_fields:  # a keyword of Python's, or a key of TOML's in quotes
        return f"it is {rest!r} in the table {table!r}"
    homes = {name: None for kind, name in _sections().items() if key in kind.model_fields and key != "name"}
    return f"it is {' or '.join(f'{name}.{key}' if name else key for name in homes)}" if homes else None


def _require_table(key: str, value: Any, kind: type[BaseModel], *, optional: bool) -> None:
    """Raise `ConfigError` for a single value, or None for a table that no run lacks."""
    if value is UNSET or isinstance(value, Mapping) or (value is None and optional):
        return
    main = next((name for name in ("name", "source") if name in kind.model_fields), None)
    cure = "set its keys" if main is None or not isinstance(value, str) else f"set {key}.{main} = {value!r}"
    what = f"a {type(value).__name__}" if isinstance(value, list) else repr(value)
    raise ConfigError(f"{key!r} is a table, not {what}: {cure}", code="not-a-table")


def _was_changed(key: str, changed: Set[Keys]) -> bool:
    """Whether a dotted key was changed, by itself or as part of what holds it."""
    return any(f"{key}.".startswith(f"{'.'.join(keys)}.") for keys in changed)


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


def _require_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    """Raise `ConfigError` for a key that there is not, a single value for a table, and None where it is none of a
    key's values."""
    for key, value in tree.items():
        if key not in section.model_fields:
            cure = our_word(key) or (_elsewhere(key) if section in _sections() else None)
            cure = cure or nearest(key, section.model_fields)
            raise ConfigError(f"unknown key {prefix + key!r}; {cure}", code="unknown-key")
        field = section.model_fields[key]
        annotation, default = field.annotation, field.default
        if value is None and not (default is None or isinstance(default, BaseModel) or field.is_required()):
            raise ConfigError(
                f"{prefix + key} cannot be None: leave it out, or give its default, {default!r}", code="bad-value"
            )
        inner = next((part for part in get_args(annotation) if isinstance(part, type)), annotation)
        if key == "privacy":
            unit = unit_of(value) if isinstance(value, Mapping) else next(iter(UNITS))
            if unit not in UNITS:
                raise ConfigError(f"unknown privacy.unit {unit!r}; {nearest(str(unit), UNITS)}", code="unknown-name")
            inner = UNITS[unit]
        if isinstance(inner, type) and issubclass(inner, BaseModel) and get_origin(annotation) is not tuple:
            _require_table(prefix + key, value, inner, optional=default is None)
        if isinstance(inner, type) and issubclass(inner, Section) and isinstance(value, Mapping):
            _require_keys(value, inner, f"{prefix}{key}.")
        if key == "profiles" and isinstance(value, list):
            for profile in value:
                if isinstance(profile, Mapping):
                    _require_keys(profile, ProfileConfig, f"{prefix}{key}.")
