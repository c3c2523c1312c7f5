"""Evaluation without training in a deployment: a run in which the coordinator's app sends an adapter to be measured."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedlora.config import load_config
from fedlora.deploy import commands
from fedlora.deploy.foreground import Program, environment_of, home_of
from fedlora.deploy.signing import RUN, app_of, read_app
from fedlora.errors import DeployError
from fedlora.federation.adapter_evaluation import EVALUATION, evaluation_dir, require_clients_evaluate


def is_deployment(folder: Path) -> bool:
    """Whether a folder is that of a deployed federation, or of its coordinator."""
    return any((place / "federation.toml").is_file() for place in (folder, folder / "coordinator"))


def evaluate_in_deployment(
    folder: Path, adapter: Path, overrides: Sequence[str], say: Callable[[str], object]
) -> dict[str, Any]:
    """Let the nodes of a deployment, whose programs are running, measure an adapter.

    Args:
        folder: Of the federation, or of its coordinator.
        adapter: Folder of the adapter, which the coordinator's SuperExec reads too.
        overrides: Of the config of the app; they take the place of its `set`.
        say: Told what Flower says.

    Returns:
        See `fedlora.federation.adapter_evaluation.evaluate_adapter`.

    Raises:
        PrivacyError, ConfigError: see `require_clients_evaluate`.
        DeployError: the run ended without figures.
    """
    home = home_of(folder)
    run = app_of(home) / RUN
    config = load_config(run, overrides) if overrides else read_app(run)[0]
    require_clients_evaluate(config)
    file = evaluation_dir(config, home / config.output).path / EVALUATION
    file.unlink(missing_ok=True)  # an older one's figures must not be taken for these
    given = [f"evaluate={json.dumps(str(adapter))}"]
    given += [f"set={json.dumps(shlex.join(overrides))}"] if overrides else []
    program = Program("run", commands.run(str(home), *given), home, {"FLWR_HOME": str(home / "flower")})
    with subprocess.Popen(
        program.command, cwd=home, env=environment_of(program), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            say(line.decode(errors="replace").rstrip())
    found = json.loads(file.read_bytes()) if file.is_file() else {}
    if found.get("adapter") != str(adapter):
        raise DeployError(
            f"the evaluation ended without figures: see the lines above, and FLWR_HOME={home / 'flower'} flwr list "
            f"{commands.CONNECTION}",
            code="no-figures",
        )
    return dict(found)
