"""What a client does in a round with example-level privacy: its ledger first, then DP-SGD, then a reply of few figures.

Nothing leaves it but what is on the list of `fedlora.privacy.disclosure`: no number of examples, no loss, no seconds,
and of errors only those that cannot tell of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from fedlora.errors import PolicyError, PrivacyError
from fedlora.federation.client_ledger import Account
from fedlora.federation.client_pool import Failure
from fedlora.federation.client_store import ClientStore
from fedlora.federation.client_training import Answer, job_of, reply_of, train_requests
from fedlora.federation.discretion import failure_of, withheld
from fedlora.federation.protocol import TrainRequest
from fedlora.privacy.ledger import Attempt
from fedlora.training.dp_check import check_model
from fedlora.training.dp_settings import PrivateSettings, private_settings
from fedlora.training.job import TrainResult
from fedlora.training.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Attempted:
    """A private client's attempt at a round, open in its ledger."""

    account: Account
    settings: PrivateSettings
    attempt: Attempt


def answer_privately(
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
                nothing = job_of(workspace, request, np.empty(0, np.int64), store)
                check_model(workspace.base, workspace.task, workspace.data.probes, nothing)
                attempt = own.ledger.spend(
                    settings.entry, run=own.run, round=request.round, budget=settings.budget, cap=own.cap
                )
                attempts[number] = _Attempted(own, settings, ledgers.enter_context(attempt))
            except Exception as error:
                answers[number] = failure_of(error, config)
        settled = [one.settings for one in attempts.values()]
        outcomes = train_requests(workspace, [requests[number] for number in attempts], store, settled)
        for (number, one), outcome in zip(attempts.items(), outcomes, strict=True):
            try:
                if isinstance(outcome, Exception):
                    one.attempt.release()  # that it failed is seen, and may depend on the data: it counts for ever
                    raise outcome if isinstance(outcome, PrivacyError) else withheld(outcome)
                figures = _private_figures(outcome, one)
                reply = reply_of(requests[number], outcome, figures, config, store, one.attempt.head)
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
