"""What a client does in a round: train what it was asked for on its own examples, and answer.

Many clients of one process train together where they can (`fedlora.federation.client_training`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from fedlora.config import RunConfig
from fedlora.errors import in_words
from fedlora.federation.client_ledger import Account
from fedlora.federation.client_store import ClientStore
from fedlora.federation.client_training import (
    Answer,
    measure_start,
    reply_of,
    start_of,
    train_own_models,
    train_requests,
)
from fedlora.federation.discretion import failure_of
from fedlora.federation.private_client import answer_privately
from fedlora.federation.protocol import TrainRequest
from fedlora.sanitize import clean_text
from fedlora.training.job import TrainResult
from fedlora.training.workspace import Workspace

logger = logging.getLogger(__name__)


def answer(
    workspace: Workspace,
    requests: Sequence[TrainRequest],
    account: Callable[[TrainRequest], Account],
    store: ClientStore,
) -> list[Answer]:
    """Train what some requests ask for, together where the model allows it.

    Args:
        workspace: Of these clients, with the config as they read it.
        requests: On one version of the base.
        account: Opens the ledger of a request's client, in a run with example-level privacy.
        store: Has what the clients keep, and gets it.

    Returns:
        For each request its answer.
    """
    config, store = workspace.config, store.reading_once()
    if config.example_privacy is not None:
        return answer_privately(workspace, requests, account, store)
    answers: list[Answer] = []
    facts = [measure_start(workspace, request, store) for request in requests]
    sound = [request for request, fact in zip(requests, facts, strict=True) if not isinstance(fact, Exception)]
    trained = iter(train_requests(workspace, sound, store))
    outcomes = [fact if isinstance(fact, Exception) else next(trained) for fact in facts]
    owns = train_own_models(workspace, requests, outcomes, store)
    for request, fact, outcome, own in zip(requests, facts, outcomes, owns, strict=True):
        try:
            if isinstance(own, Exception):
                raise own
            if isinstance(outcome, Exception) and config.client_privacy is not None:
                outcome = _unchanged(workspace, request, outcome, store)
            if isinstance(outcome, Exception):
                raise outcome
            assert not isinstance(fact, Exception)  # it would be the outcome
            answers.append(reply_of(request, outcome, _figures(outcome, config) | fact, config, store, own=own))
        except Exception as error:
            answers.append(failure_of(error, config))
    return answers


def _unchanged(workspace: Workspace, request: TrainRequest, error: Exception, store: ClientStore) -> TrainResult:
    """What a client sends whose training failed, where all that it holds is protected: an update that changes nothing.

    That it failed may depend on its data; the server would leave it out and write down that it did.
    """
    k = request.client_id
    logger.warning("client %d failed, and its update changes nothing: %s", k, clean_text(in_words(error)))
    logger.debug("a private client failed", exc_info=error)
    held = len(workspace.data.clients[k]) if k < len(workspace.data.clients) else 0
    start, optimizer = start_of(request, store, workspace.config)
    return TrainResult(start, max(1, held), 0, 0, float("nan"), 0.0, 0.0, optimizer)


def _figures(result: TrainResult, config: RunConfig) -> dict[str, float]:
    if config.client_privacy is not None:
        return {"num_examples": 1 if config.server.weighting == "uniform" else result.num_examples}
    return {
        "num_examples": result.num_examples,
        "examples_seen": float(result.examples_seen),
        "loss": result.loss,
        "steps": float(result.steps),
        "seconds": result.seconds,
        "compute_seconds": result.compute_seconds,
    }
