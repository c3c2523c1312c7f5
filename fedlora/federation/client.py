"""What a client does in a round: train what it was asked for on its own examples, and say what may be said of it.

Many clients of one process train together where they can (`fedlora.training.phases`). In a private run nothing leaves a
client but what is on the list of `fedlora.privacy.disclosure`: no number of examples, no loss, no seconds, and of
errors only those that cannot tell of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.config import RunConfig
from fedlora.errors import (
    AssetError,
    ConfigError,
    FedloraError,
    ModelError,
    PolicyError,
    PrivacyError,
    ReplyError,
    RuleError,
    TrainingError,
    in_words,
)
from fedlora.federation.client_ledger import Account
from fedlora.federation.client_pool import SHARED, Failure, Sums
from fedlora.federation.client_store import OPTIMIZER, RESIDUAL, ClientStore, divided, named
from fedlora.federation.discretion import withheld
from fedlora.federation.plausibility import START_LOSS
from fedlora.federation.protocol import TrainedReply, TrainRequest, update_head
from fedlora.model.base_history import follow
from fedlora.privacy.disclosure import Disclosure
from fedlora.privacy.ledger import Attempt
from fedlora.rng import derive
from fedlora.sanitize import clean_text
from fedlora.training.dp_check import check_model
from fedlora.training.dp_loop import train_private_cohort
from fedlora.training.dp_settings import PrivateSettings, private_settings
from fedlora.training.evaluate import evaluate
from fedlora.training.job import TrainJob, TrainResult
from fedlora.training.out_of_memory import OUT_OF_MEMORY
from fedlora.training.own_loop import FROZEN_CHANGED, FROZEN_PART_CHANGED
from fedlora.training.phases import train_in_phases
from fedlora.training.step import Outcome
from fedlora.training.workspace import Workspace, close_workspace

logger = logging.getLogger(__name__)

TELLS_NOTHING = (AssetError, ConfigError, ModelError, PrivacyError, ReplyError, RuleError)
"""Errors of the config, the model and the messages: a private client sends their text, unless its data had been looked
at when they were raised (`looking_at_data`)."""


Answer = TrainedReply | Failure | Exception
"""What comes of one client: a reply, a failure in words that may leave it, or an exception that nobody foresaw."""


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
        return _answer_privately(workspace, requests, account, store)
    answers: list[Answer] = []
    facts = [_measured(workspace, request, store) for request in requests]
    sound = [request for request, fact in zip(requests, facts, strict=True) if not isinstance(fact, Exception)]
    trained = iter(_trained(workspace, sound, store))
    outcomes = [fact if isinstance(fact, Exception) else next(trained) for fact in facts]
    owns = _trained_for_themselves(workspace, requests, outcomes, store)
    for request, fact, outcome, own in zip(requests, facts, outcomes, owns, strict=True):
        try:
            if isinstance(own, Exception):
                raise own
            if isinstance(outcome, Exception) and config.client_privacy is not None:
                outcome = _unchanged(workspace, request, outcome, store)
            if isinstance(outcome, Exception):
                raise outcome
            assert not isinstance(fact, Exception)  # it would be the outcome
            answers.append(_reply(request, outcome, _figures(outcome, config) | fact, config, store, own=own))
        except Exception as error:
            answers.append(failure_of(error, config))
    return answers


def measure_apart(
    workspace: Workspace, request: TrainRequest, parts: Sequence[str], store: ClientStore
) -> dict[str, Sums] | Failure:
    """What a client reports of a state: sums over examples that it keeps apart, and nothing of a few examples.

    Args:
        workspace: Of the client; its base holds the state's model.
        request: With the state's adapter, of which the client replaces what it keeps.
        parts: Of its examples; see `ClientPool.evaluate`.
        store: Has what the client keeps.
    """
    config, client_id, found = workspace.config, request.client_id, dict[str, Sums]()
    if config.privacy is not None:
        return Failure("refused", "in a private run no client evaluates on its own examples")
    keeps = bool(request.plan.kept) or (config.train.personal is not None and bool(request.plan.trains))
    try:
        personal = _Start.of(request, store, config).adapter if keeps else request.plan.adapter
    except ReplyError as error:  # what it kept is lost
        return Failure("refused", str(error))
    for part in parts:
        examples = part.removesuffix(SHARED)
        apart = workspace.data.apart.get(examples)
        rows = () if apart is None or client_id >= len(apart.clients) else apart.clients[client_id]
        if apart is not None and len(rows) >= config.evaluation.min_examples:
            if keeps:
                workspace.base.write(request.plan.adapter if part != examples else personal)
            found[part] = evaluate(workspace.base, workspace.task, apart.examples, indices=np.asarray(rows)).sums
    if found:
        return found
    least = config.evaluation.min_examples
    return Failure("refused", f"it keeps fewer than {least} examples apart (evaluation.min_examples)")


def failure_of(error: Exception, config: RunConfig | None) -> Failure | Exception:
    """What a client says of an error: its text, or in a private run no more than that it failed.

    Args:
        error: Any.
        config: As the client reads it; None where it cannot be read.

    Returns:
        The error itself if it ends a run that is not private: a fault of the program, memory that ran out, or a loop
        that changed what is frozen.
    """
    if config is not None and config.privacy is not None and not isinstance(error, TELLS_NOTHING):
        error = withheld(error)
    ends = not isinstance(error, FedloraError) or error.code in (OUT_OF_MEMORY, FROZEN_CHANGED, FROZEN_PART_CHANGED)
    if isinstance(error, FedloraError) and error.code == FROZEN_CHANGED:
        close_workspace()  # its base is not what it was
    return error if ends else Failure("refused", str(error))


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


def _examples_to_train_on(workspace: Workspace, client_id: int) -> np.ndarray:
    indices = examples_of_client(workspace, client_id)
    if not len(indices):
        raise TrainingError(
            f"client {client_id} has no examples: give it some, or lower partition.clients", code="no-examples"
        )
    return indices


@dataclass(frozen=True)
class _Start:
    """Where a client starts in a round.

    Args:
        adapter: The plan's, with what the client keeps in its place: with `train.personal` its own model.
        optimizer: The state that the client kept of its optimiser.
    """

    adapter: AdapterState
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, request: TrainRequest, store: ClientStore, config: RunConfig) -> _Start:
        """With what the store has."""
        plan = request.plan
        kept = plan.kept if config.train.personal is None else plan.adapter.tensors()
        if not plan.kept and not config.clients_keep:
            return cls(plan.adapter)
        if config.train.keep_optimizer and plan.fresh_seed is not None:
            raise ReplyError(
                f"train.keep_optimizer: {config.strategy.name!r} starts each round from a new adapter, to which no "
                "earlier state of an optimiser belongs: remove it",
                code="state-of-another-adapter",
            )
        loaded, state, _ = divided(store.load(request.client_id, request.kept_round))
        for name, value in loaded.items():
            if name not in kept or value.shape != kept[name].shape:
                raise _kept_differs(request, name, value)
        return cls(plan.adapter.with_tensors(loaded), state)


def _reply(
    request: TrainRequest,
    result: TrainResult,
    figures: Mapping[str, float],
    config: RunConfig,
    store: ClientStore,
    ledger: str = "",
    own: AdapterState | None = None,
) -> TrainedReply:
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
    if kept or config.clients_keep:  # of a first round that failed there is nothing, which nobody may see
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
                raise _kept_differs(request, name, before)
            sent[name] = sent[name] + before
    received = request.as_received(sent, seed)
    return sent, residual | {name: value - received[name] for name, value in sent.items()}


def _kept_differs(request: TrainRequest, name: str, value: Tensor) -> ReplyError:
    return ReplyError(
        f"client {request.client_id} kept {name!r} {tuple(value.shape)} in an earlier round, and is asked to keep "
        "something else: let its rank and its model be those with which it began",
        code="kept-part-differs",
    )


def _unchanged(workspace: Workspace, request: TrainRequest, error: Exception, store: ClientStore) -> TrainResult:
    """What a client sends whose training failed, where all that it holds is protected: an update that changes nothing.

    That it failed may depend on its data; the server would leave it out and write down that it did.
    """
    k = request.client_id
    logger.warning("client %d failed, and its update changes nothing: %s", k, clean_text(in_words(error)))
    logger.debug("a private client failed", exc_info=error)
    held = len(workspace.data.clients[k]) if k < len(workspace.data.clients) else 0
    start = _Start.of(request, store, workspace.config)
    return TrainResult(start.adapter, max(1, held), 0, 0, float("nan"), 0.0, 0.0, start.optimizer)


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


# ------------------------------------------------------------------------------------------------ training


def _measured(workspace: Workspace, request: TrainRequest, store: ClientStore) -> dict[str, float] | Exception:
    """What the rule asks to know of the client before it trains."""
    if START_LOSS not in request.plan.asks:
        return {}
    try:
        indices = _examples_to_train_on(workspace, request.client_id)
        workspace.base.write(_job(workspace, request, indices, store).adapter)
        found = evaluate(workspace.base, workspace.task, workspace.data.train, indices=indices)
        return {START_LOSS: found.overall["loss"]}
    except Exception as error:
        return error


def _trained(
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
            jobs[number] = _job(workspace, request, indices, store)
        except Exception as error:
            outcomes[number] = error
    if jobs:
        configs = [workspace.config.train_of(requests[number].client_id) for number in jobs]
        on = (workspace.base, workspace.task, workspace.data.train, list(jobs.values()), configs)
        try:
            if settings is None:
                results = train_in_phases(*on)
            else:
                results = train_private_cohort(*on, [settings[number] for number in jobs])
        except Exception as error:  # what stopped all of them came of each
            results = [error] * len(jobs)
        outcomes |= dict(zip(jobs, results, strict=True))
    return [outcomes[number] for number in range(len(requests))]


def _trained_for_themselves(
    workspace: Workspace, requests: Sequence[TrainRequest], outcomes: Sequence[Outcome], store: ClientStore
) -> list[AdapterState | Exception | None]:
    """The clients' own models after the round (Ditto, Li et al. 2021, arXiv 2012.04221, algorithm 1).

    v <- v - eta (grad L(v) + lambda (v - w)), with w as the client was sent it, on the batches of the shared model. A
    client that has none yet begins with w. None where there is no `train.personal`, or w's training failed.
    """
    config = workspace.config
    found: list[AdapterState | Exception | None] = [None] * len(requests)
    trained = [k for k, outcome in enumerate(outcomes) if isinstance(outcome, TrainResult)]
    if config.train.personal is None or not trained:
        return found
    jobs, configs = [], []
    for k in trained:
        request = requests[k]
        shared = _job(workspace, request, examples_of_client(workspace, request.client_id), store)
        own = _Start.of(request, store, config).adapter
        jobs.append(replace(shared, adapter=own, toward=request.plan.adapter, proximal_mu=0.0, tilt={}))
        configs.append(config.train_of(request.client_id).model_copy(update={"proximal_mu": config.train.personal}))
    results: Sequence[Outcome]
    try:
        results = train_in_phases(workspace.base, workspace.task, workspace.data.train, jobs, configs)
    except Exception as error:  # what stopped all of them came of each
        results = [error] * len(jobs)
    for k, result in zip(trained, results, strict=True):
        if isinstance(result, FedloraError):
            result = type(result)(f"its own model (train.personal): {result}", code=result.code)
        found[k] = result if isinstance(result, Exception) else result.adapter
    return found


def _job(workspace: Workspace, request: TrainRequest, indices: np.ndarray, store: ClientStore) -> TrainJob:
    """What a request asks, on a base that is brought to its version."""
    plan, config = request.plan, workspace.config
    start = _Start.of(request, store, config)
    follow(workspace.base, plan.base_updates, plan.base_version, request.base_digest, request.since_digest)
    return TrainJob(
        adapter=start.adapter if config.train.personal is None else plan.adapter,
        trains=plan.trains,
        indices=indices,
        seed=derive(config.seed, "train", request.round, request.client_id),
        proximal_mu=plan.proximal_mu or config.train.proximal_mu,
        tilt=plan.tilt,
        round=request.round,
        rounds=config.rounds,
        optimizer=start.optimizer,
        client_id=request.client_id,
        first=plan.first,
        first_times=plan.first_times,
    )


# ------------------------------------------------------------------------------------------------ DP-SGD


@dataclass(frozen=True)
class _Attempted:
    """A private client's attempt at a round, open in its ledger."""

    account: Account
    settings: PrivateSettings
    attempt: Attempt


def _answer_privately(
    workspace: Workspace,
    requests: Sequence[TrainRequest],
    account: Callable[[TrainRequest], Account],
    store: ClientStore,
) -> list[Answer]:
    """Each client's ledger says that it spends before anybody's data are touched, and is held until all have trained.

    A client whose budget does not allow the round answers that it is spent.
    """
    config = workspace.config
    answers: dict[int, Answer] = {}
    with ExitStack() as ledgers:
        attempts: dict[int, _Attempted] = {}
        for number, request in enumerate(requests):
            try:
                settings, own = private_settings(config, request.client_id), account(request)
                own.ledger.require_head(request.ledger)
                if request.kept_round and own.release is not None:
                    own.ledger.seen(own.run, request.kept_round)  # what was kept goes into what leaves now
                if (spent := _spent(own, settings, request.round)) is not None:
                    answers[number] = spent
                    continue
                # Test examples are public; on a node with data of its own they are invented ones.
                nothing = _job(workspace, request, np.empty(0, np.int64), store)
                check_model(workspace.base, workspace.task, workspace.data.probes, nothing)
                attempt = own.ledger.spend(
                    settings.entry, run=own.run, round=request.round, budget=settings.budget, cap=own.cap
                )
                attempts[number] = _Attempted(own, settings, ledgers.enter_context(attempt))
            except Exception as error:
                answers[number] = failure_of(error, config)
        settled = [one.settings for one in attempts.values()]
        outcomes = _trained(workspace, [requests[number] for number in attempts], store, settled)
        for (number, one), outcome in zip(attempts.items(), outcomes, strict=True):
            try:
                if isinstance(outcome, Exception):
                    one.attempt.release()  # that it failed is seen, and may depend on the data: it counts for ever
                    raise outcome if isinstance(outcome, PrivacyError) else withheld(outcome)
                figures = _private_figures(outcome, one)
                reply = _reply(requests[number], outcome, figures, config, store, one.attempt.head)
                if one.account.release is not None:
                    one.account.release(reply, one.attempt)
                answers[number] = reply
            except Exception as error:
                answers[number] = failure_of(error, config)
    return [answers[number] for number in range(len(requests))]


def _spent(account: Account, settings: PrivateSettings, number: int) -> Failure | None:
    """What a client answers whose budget does not allow the round; None where it does."""
    entry, budget, cap = settings.entry, settings.budget, account.cap
    if cap is not None and not account.ledger.affords(entry, cap, run=account.run, round=number):
        stands = account.ledger.epsilon(cap.delta, cap.accountant)
        logger.warning("the policy allows epsilon %g over all runs: the ledger stands at %.3f", cap.epsilon, stands)
        return Failure("spent", str(PolicyError("epsilon", "one more round would pass it", code="refused-by-policy")))
    if budget is None or account.ledger.affords(entry, budget, run=account.run, round=number):
        return None
    epsilon = account.ledger.epsilon(budget.delta, budget.accountant)
    why = (
        f"its privacy budget is spent: its ledger stands at epsilon {epsilon:.3f}, and one more round would pass "
        f"{budget.epsilon:g}"
    )
    return Failure("spent", why)


def _private_figures(result: TrainResult, one: _Attempted) -> dict[str, float]:
    entry = one.settings.entry
    return {
        "num_examples": 1,
        "steps": float(result.steps),
        "sample_rate": entry.sample_rate,
        "noise_multiplier": entry.noise_multiplier,
        "max_grad_norm": one.settings.max_grad_norm,
        "attempts": float(one.account.ledger.attempts(one.account.run)),
    }
