"""Evaluation without training: the clients of a federation measure an adapter on what they keep apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.aggregators import GlobalState
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, PrivacyError, RoundError
from fedlora.federation.client_pool import ClientPool, RoundRequest
from fedlora.federation.evaluator import Evaluator
from fedlora.federation.given_adapter import read_given
from fedlora.federation.round_record import quorum_of
from fedlora.runs.place import path_of
from fedlora.runs.rundir import RunDir
from fedlora.training.workspace import Workspace

EVALUATION = "evaluation.json"
"""In the folder of an evaluation without training: its figures."""


def require_clients_evaluate(config: RunConfig) -> None:
    """Raise unless the clients of a config keep test examples apart and may report on them.

    Raises:
        PrivacyError: the config has a table `[privacy]`.
        ConfigError: `evaluation.on` is another.
    """
    if config.privacy is not None:
        raise PrivacyError(
            "the clients of a private federation report no figures of their own examples, which [privacy] protects: "
            "measure the adapter on public data with fedlora evaluate ADAPTER --data FILE",
            code="evaluation-not-private",
        )
    if not config.evaluation.at_clients:
        raise ConfigError(
            f"with evaluation.on = {config.evaluation.on!r} clients keep no test examples apart and train on all: "
            "train with evaluation.on = 'clients', or add --set evaluation.on=clients for an adapter from elsewhere",
            code="clients-do-not-evaluate",
        )


def evaluation_dir(config: RunConfig, root: str | Path | None = None) -> RunDir:
    """The folder, beside the runs, of what the nodes of a deployment measure without training; see `RunDir.create`."""
    path = path_of(config, root)
    return RunDir(path.with_name(f"{path.name}.evaluation"), config)


def evaluate_adapter(
    pool: ClientPool, config: RunConfig, workspace: Workspace, folder: Path, callbacks: Callback
) -> dict[str, Any]:
    """Let the clients measure an adapter.

    Args:
        pool: The clients.
        config: Of the federation.
        workspace: The server's; needs no examples.
        folder: With the adapter in PEFT's format.
        callbacks: Told who reports nothing, and what is not known of the adapter.

    Returns:
        See "federated" of `Evaluator.measure`.

    Raises:
        PrivacyError, ConfigError: see `require_clients_evaluate`.
        ModelError: the adapter is not for the federation's model.
        RunDirError: it was trained on another base, tokenizer or classes.
        RoundError: no client is there, or none reports anything.
    """
    require_clients_evaluate(config)
    adapter, notes = read_given(workspace, folder)
    for note in notes:
        callbacks.message(note)
    state = GlobalState(adapter)
    clients = pool.available(0, quorum_of(len(workspace.data.clients), config.server.quorum))
    how = config.evaluation.model_copy(update={"on": "clients", "clients_fraction": 1.0})
    alone = config.model_copy(update={"evaluation": how, "selection": None})
    request = RoundRequest(0, (), state, of_run=False)
    line = Evaluator(pool, alone, workspace, False, callbacks).measure(request, clients, lambda _: True)
    found = line["federated"]
    if not found["clients"]:
        why = next(iter(found["left_out"].values()), "nobody was asked")
        raise RoundError(f"no client reports a figure: {why}", code="nobody-reports")
    return dict(found)
