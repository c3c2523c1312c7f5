"""Sign the run of a coordinator's app: see `fedlora.site.signatures`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig, load_config
from fedlora.deploy.project import read_toml
from fedlora.errors import DeployError
from fedlora.files import write_atomically

PROJECT, RUN = "pyproject.toml", "run.toml"
"""Files of an app."""
_SIGNATURE = re.compile(r'^signature = "[^"]*"', re.MULTILINE)


def app_of(folder: Path) -> Path:
    """The folder of the app, given a federation's or its coordinator's.

    Raises:
        DeployError: it is neither.
    """
    for found in (folder / "app", folder / "coordinator" / "app"):
        if (found / PROJECT).is_file() and (found / RUN).is_file():
            return found.resolve()
    raise DeployError(
        f"{str(folder)!r} is no coordinator's folder: create one with fedlora deploy init", code="not-a-federation"
    )


def read_app(run: Path) -> tuple[RunConfig, str]:
    """The config that an app's nodes will read, with the changes that its `set` makes, and its signature.

    Args:
        run: The app's run.toml; without the rest of the app beside it nothing is set, and there is no signature.

    Raises:
        ConfigError: it is wrong.
        DeployError: it names a file by a relative path, which is another on each machine.
    """
    app, table = run.resolve().parent, dict[str, Any]()
    if (app / PROJECT).is_file():
        tree = read_toml(app / PROJECT, ())
        table = tree.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {})
    config = load_config(run, shlex.split(str(table.get("set", ""))))
    for key, value in (("data.source", config.data.source), ("data.test", config.data.test)):
        if value is not None and Path(value).is_relative_to(app):
            raise DeployError(
                f"{key} = {value!r} is relative to the app's folder, which is another on each node: write the path "
                f"that it has on the machines into {str(run)!r}",
                code="path-not-absolute",
            )
    return config, str(table.get("signature", ""))


def write_signature(app: Path, signature: str) -> None:
    """Put a signature into the app, from which it comes with every run.

    Raises:
        DeployError: the app has no place for one.
    """
    path = app / PROJECT
    text, places = _SIGNATURE.subn(f'signature = "{signature}"', path.read_text(encoding="utf-8"))
    if places != 1:
        raise DeployError(
            f'{str(path)!r} has no line signature = "" under [tool.flwr.app.config]: add it', code="no-place"
        )
    write_atomically(path, text.encode())
