"""`fedlora config`: what keys there are, what they mean, and where a run's value of each comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli._common import Overrides, app, open_console, plain_table
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fedlora.config import RunConfig
    from fedlora.explain import Key


@app.command()
def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY ...]",
            help="A config, for the values of its run; keys or tables, such as train.lr or server.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema of config files, for editors.")] = False,
) -> None:
    """Explain the keys of a config: meaning, type, default; with a CONFIG also each value and where it comes from."""
    import json

    from fedlora.config import find_config
    from fedlora.explain import find_keys, json_schema, keys

    if schema:
        if words or overrides:
            raise ConfigError(
                "--schema describes every config: give no file, key or --set with it", code="option-without-effect"
            )
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    files = [word for word in words or () if word.endswith(".toml") or find_config(word).is_file()]
    names = [word for word in words or () if word not in files]
    if len(files) > 1:
        raise ConfigError(f"give one config file, not {len(files)}", code="several-files")
    if overrides and not files:
        raise ConfigError("--set changes a config file's keys: name the file", code="no-config-file")
    values = _Values(find_config(files[0]), overrides or []) if files else None
    console = open_console()
    chosen = [key for name in names for key in find_keys(name)] if names else keys()
    if values is not None:
        chosen = [key for key in chosen if values.applies(key)]
    if names and all(name in {key.path for key in chosen} for name in names):
        for key in chosen:
            _explain(console, key, values)
    else:
        _list(console, chosen, values)


class _Values:
    """The values of one run and their sources."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        from fedlora.config import changed_keys, load_config

        self.config: RunConfig = load_config(path, overrides)
        self._path = path
        self._set = {".".join(keys) for keys in changed_keys(overrides)}
        self._file = _leaves(path)
        self._tree: dict[str, Any] = self.config.model_dump(mode="json")

    def applies(self, key: Key) -> bool:
        """Whether it is a key of this run: a field of what its open tables name, and none of a table in a list."""
        if key.path.startswith("clients.profiles.") or (key.table and self._tree[key.table] is None):
            return False
        return not key.entry or bool(self._tree[key.table][key.chooser.rpartition(".")[2]] == key.entry)

    def of(self, key: Key) -> tuple[str, str]:
        """Value and source."""
        from fedlora.explain import say

        here: Any = self._tree
        for part in key.path.split("."):
            if not isinstance(here, Mapping) or part not in here:
                return key.default, "default"
            here = here[part]
        return say(here), self._source(key.path)

    def _source(self, path: str) -> str:
        if any(f"{path}.".startswith(f"{name}.") or name.startswith(f"{path}.") for name in self._set):
            return "--set"
        if path in self._file:
            return str(self._path)
        return "the file's name" if path == "name" else "default"


def _leaves(path: Path) -> set[str]:
    """The keys that stand in a file."""
    import tomllib

    def walk(tree: Mapping[str, Any], prefix: str) -> set[str]:
        found = set()
        for key, value in tree.items():
            found |= {prefix + key} | (walk(value, f"{prefix}{key}.") if isinstance(value, Mapping) else set())
        return found

    return walk(tomllib.loads(path.read_text(encoding="utf-8")), "")


def _explain(console: Console, key: Key, values: _Values | None) -> None:
    from rich.padding import Padding
    from rich.text import Text

    about = f" (with {key.chooser} = {key.entry!r})" if key.entry else ""
    lines = [key.kind, f"default: {key.default}", key.doc]
    if values is not None:
        lines.append("here: {} ({})".format(*values.of(key)))
    console.print(Text(key.path, style="bold") + Text(about, style="dim"))
    console.print(Padding(Text("\n".join(line for line in lines if line)), (0, 0, 1, 4), expand=False))


def _list(console: Console, chosen: Sequence[Key], values: _Values | None) -> None:
    from rich.text import Text

    table = plain_table()
    table.add_column("key", no_wrap=True)
    for title in ("value", "from") if values is not None else ("default", "meaning"):
        table.add_column(title, overflow="fold")
    for key in chosen:
        name = key.path + (f" ({key.entry})" if key.entry and values is None else "")
        if values is not None:
            value, source = values.of(key)
            table.add_row(Text(name), Text(value), Text(source), style="dim" if source == "default" else "")
        else:
            table.add_row(Text(name), Text(key.default), Text(key.doc or key.kind))
    console.print(table)
