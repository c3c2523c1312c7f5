"""A client's training from request to reply: where it starts, on what it trains, what it sends of that and keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.config import RunConfig, TrainConfig
from fedlora.errors import FedloraError, ReplyError, TrainingError
from fedlora.federation.client_pool import Failure
from fedlora.federation.client_store import OPTIMIZER, RESIDUAL, ClientStore, divided, kept_differs, named
from fedlora.federation.plausibility import START_LOSS
from fedlora.federation.protocol import TrainedReply, TrainRequest, update_head
from fedlora.model.base_history import follow
from fedlora.privacy.disclosure import Disclosure
from fedlora.rng import derive
from fedlora.training.cohort import train_cohort
from fedlora.training.dp_loop import train_private_cohort
from fedlora.training.dp_settings import PrivateSettings
from fedlora.training.evaluate import losses_of
from fedlora.training.job import TrainJob, TrainResult
from fedlora.training.step import Outcome
from fedlora.training.workspace import Workspace

Answer = TrainedReply | Failure | Exception
"""What comes of one client: a reply, a failure in words that may leave it, or an exception that nobody foresaw."""


def start_of(request: TrainRequest, store: ClientStore, config: RunConfig) -> tuple[AdapterState, Mapping[str, Tensor]]:
    """Where a client starts to train the shared model in a round.

    Returns:
        The plan's adapter, with the parts that the client keeps in their place, and the state that it kept of its
        optimiser. What it kept by a key that a resume has switched off since is left alone.
    """
    plan = request.plan
    if not plan.kept and not config.clients_keep:
        return plan.adapter, {}
    if config.train.keep_optimizer and plan.fresh_seed is not None:
        raise ReplyError(
            f"train.keep_optimizer: {config.strategy.name!r} starts each round from a new adapter, to which no "
            "earlier state of an optimiser belongs: remove it",
            code="state-of-another-adapter",
        )
    loaded, state, _ = divided(store.load(request.client_id, request.kept_round))
    adapter = _with_kept(request, loaded, plan.kept) if plan.kept else plan.adapter
    return adapter, state if config.train.keep_optimizer else {}


def own_model_of(request: TrainRequest, store: ClientStore) -> AdapterState:
    """A client's own model (`train.personal`) before a round: the plan's adapter where it has none yet."""
    loaded, _, _ = divided(store.load(request.client_id, request.kept_round))
    return _with_kept(request, loaded, request.plan.adapter.tensors())


def _with_kept(request: TrainRequest, loaded: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> AdapterState:
    """The plan's adapter with what a client loaded of what it is asked to keep, of which `kept` has the shapes."""
    for name, value in loaded.items():
        if name not in kept or value.shape != kept[name].shape:
            raise kept_differs(request.client_id, name, value)
    return request.plan.adapter.with_tensors(loaded)


def examples_of_client(workspace: Workspace, client_id: int) -> np.ndarray:
    """Positions of a client's examples in the training set.

    Raises:
        TrainingError: there is no such client.
    """
    clients = workspace.data.clients
    if not 0 <= client_id < len(clients):
        raise TrainingError(
            f"there is no client {client_id}: the partition has {len(clients)}, numbered from 0", code="no-such-client"
        )
    return clients[client_id]


def measure_start(workspace: Workspace, request: TrainRequest, store: ClientStore) -> dict[str, float] | Exception:
    """What the rule asks to know of the client before it trains: F_k(w) of what it goes on to minimise."""
    if START_LOSS not in request.plan.asks:
        return {}
    try:
        indices = _examples_to_train_on(workspace, request.client_id)
        workspace.base.write(job_of(workspace, request, indices, store).adapter)
        losses = losses_of(workspace.base, workspace.task, workspace.data.train, indices)
        return {START_LOSS: float(losses.mean())}
    except Exception as error:
        return error


def train_requests(
    workspace: Workspace,
    requests: Sequence[TrainRequest],
    store: ClientStore,
    settings: Sequence[PrivateSettings] | None = None,
) -> list[Outcome]:
    """What came of the clients' training.

    Args:
        workspace: Of the clients.
        requests: On one version of the base.
        store: Has what the clients keep.
        settings: Of DP-SGD, one for each; a client without examples trains on noise alone then. None: no DP-SGD.
    """
    jobs: dict[int, TrainJob] = {}
    outcomes: dict[int, Outcome] = {}
    for number, request in enumerate(requests):
        try:
            examples = _examples_to_train_on if settings is None else examples_of_client
            indices = examples(workspace, request.client_id)
            jobs[number] = job_of(workspace, request, indices, store)
        except Exception as error:
            outcomes[number] = error
    if jobs:
        configs = [workspace.config.train_of(requests[number].client_id) for number in jobs]
        on = (workspace.base, workspace.task, workspace.data.train, list(jobs.values()), configs)
        try:
            if settings is None:
                results = train_cohort(*on)
            else:
                results = train_private_cohort(*on, [settings[number] for number in jobs])
        except Exception as error:  # what stopped all of them came of each
            results = [error] * len(jobs)
        outcomes |= dict(zip(jobs, results, strict=True))
    return [outcomes[number] for number in range(len(requests))]


def train_own_models(
    workspace: Workspace, requests: Sequence[TrainRequest], outcomes: Sequence[Outcome], store: ClientStore
) -> list[AdapterState | Exception | None]:
    """The clients' own models after the round (Ditto, Li et al. 2021, arXiv 2012.04221, algorithm 1).

    v <- v - eta (grad L(v) + lambda (v - w)), with w as the client was sent it, on the batches of the shared model. A
    client that has none yet begins with w. None where there is no `train.personal`, or w's training failed.
    """
    config = workspace.config
    found: list[AdapterState | Exception | None] = [None] * len(requests)
    jobs, configs = dict[int, TrainJob](), list[TrainConfig]()
    for k, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
        if config.train.personal is None or not isinstance(outcome, TrainResult):
            continue
        try:
            shared = job_of(workspace, request, examples_of_client(workspace, request.client_id), store)
            own = own_model_of(request, store)
        except Exception as error:
            found[k] = error
            continue
        jobs[k] = replace(shared, adapter=own, toward=request.plan.adapter, proximal_mu=0.0, tilt={})
        configs.append(config.train_of(request.client_id).model_copy(update={"proximal_mu": config.train.personal}))
    if not jobs:
        return found
    results: Sequence[Outcome]
    try:
        results = train_cohort(workspace.base, workspace.task, workspace.data.train, list(jobs.values()), configs)
    except Exception as error:  # what stopped all of them came of each
        results = [error] * len(jobs)
    for k, result in zip(jobs, results, strict=True):
        if isinstance(result, FedloraError):
            result = type(result)(f"its own model (train.personal): {result}", code=result.code)
        found[k] = result if isinstance(result, Exception) else result.adapter
    return found


def job_of(workspace: Workspace, request: TrainRequest, indices: np.ndarray, store: ClientStore) -> TrainJob:
    """What a request asks, on a base that is brought to its version."""
    plan, config = request.plan, workspace.config
    start, optimizer = start_of(request, store, config)
    follow(workspace.base, plan.base_updates, plan.base_version, request.base_digest, request.since_digest)
    return TrainJob(
        adapter=start,
        trains=plan.trains,
        indices=indices,
        seed=derive(config.seed, "train", request.round, request.client_id),
        proximal_mu=plan.proximal_mu or config.train.proximal_mu,
        tilt=plan.tilt,
        round=request.round,
        rounds=config.rounds,
        optimizer=optimizer,
        client_id=request.client_id,
        first=plan.first,
        first_times=plan.first_times,
    )


def _examples_to_train_on(workspace: Workspace, client_id: int) -> np.ndarray:
    indices = examples_of_client(workspace, client_id)
    if not len(indices):
        raise TrainingError(
            f"client {client_id} has no examples: give it some, or lower partition.clients", code="no-examples"
        )
    return indices


def reply_of(
    request: TrainRequest,
    result: TrainResult,
    figures: Mapping[str, float],
    config: RunConfig,
    store: ClientStore,
    ledger: str = "",
    own: AdapterState | None = None,
) -> TrainedReply:
    """What a client sends; what it keeps goes to the store.

    Args:
        request: What was asked.
        result: Of the training.
        figures: That go with it, by name; in a private run the list of `fedlora.privacy.disclosure` has all of them.
        config: As the client reads it.
        store: Gets what the client keeps.
        ledger: The head of its privacy ledger.
        own: The client's own model (`train.personal`).
    """
    if config.privacy is not None:
        head = update_head(request, ledger)
        Disclosure(config.privacy.unit).require_reply(head, tuple(figures))
    kept = result.adapter.tensors(request.plan.kept) if request.plan.kept else {}
    kept |= {} if own is None else own.tensors()
    kept |= named(OPTIMIZER, result.optimizer)
    sent = result.adapter.tensors(request.plan.sends)
    if config.wire.keeps_residual:
        sent, residual = sent_and_residual(request, sent, store, config.seed)
        kept |= named(RESIDUAL, residual)
    if kept or config.clients_keep:
        # Saved even if it is nothing, as of a private client whose first round failed: the round that follows asks for
        # this file, and its absence would tell the server of the failure.
        store.save(request.client_id, request.round, kept, request.kept_round)
    return TrainedReply(request, sent, figures, ledger)


def sent_and_residual(
    request: TrainRequest, trained: Mapping[str, Tensor], store: ClientStore, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a client sends, and what of it the wire format leaves out: error feedback.

    Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599, algorithm 1, with a round's
    change in the place of a gradient: m is added to the change, and what is not sent of their sum is the next m. The m
    of a tensor that is not asked for in a round stays as it is.
    """
    _, _, residual = divided(store.load(request.client_id, request.kept_round))
    sent: dict[str, Tensor] = {}
    for name, value in trained.items():
        sent[name] = value.cpu().to(torch.promote_types(value.dtype, torch.float32))
        if (before := residual.get(name)) is not None:
            if before.shape != value.shape:
                raise kept_differs(request.client_id, name, before)
            sent[name] = sent[name] + before
    received = request.as_received(sent, seed)
    return sent, residual | {name: value - received[name] for name, value in sent.items()}
