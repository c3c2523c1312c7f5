"""The client: one ClientApp for the in-process engine, Flower's simulation and real nodes.

What a process keeps between messages (the base model, the data, frozen parts of adapters) lives in imported modules:
Ray pickles an app's globals by value for each message, so a cache in a closure or in `__main__` would do nothing.

In a private run nothing leaves a client but what is on the list of `fedlora.privacy.disclosure`: no number of examples,
no loss, no seconds, and of errors only those that cannot tell of the data.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedlora import __version__
from fedlora.adapter import AdapterState
from fedlora.config import RunConfig, TrainConfig
from fedlora.errors import (
    AssetError,
    ConfigError,
    FedloraError,
    ModelError,
    PrivacyError,
    ReplyError,
    RuleError,
    TrainingError,
    in_words,
)
from fedlora.flower.app_config import client_id_of, config_of, rank_of
from fedlora.flower.discretion import looking_at_data, may_leave, withheld
from fedlora.flower.following import can_follow, follow
from fedlora.flower.handshake import require_same_config, require_same_ground
from fedlora.flower.messages import (
    Decoded,
    ReceivedPlan,
    decode_plan,
    digest,
    encode_note,
    encode_update,
    encode_upload,
)
from fedlora.flower.node_account import Account, account_of, plan_config
from fedlora.flower.plain_client import is_plain, train_plain
from fedlora.privacy.ledger import Attempt
from fedlora.rng import derive
from fedlora.sanitize import clean_text
from fedlora.training.cohort import train_cohort
from fedlora.training.dp_loop import train_private_cohort
from fedlora.training.dp_settings import PrivateSettings, check_model, private_settings
from fedlora.training.job import TrainJob, TrainResult
from fedlora.training.loop import Outcome
from fedlora.training.workspace import Workspace, open_workspace

app = ClientApp()
logger = logging.getLogger(__name__)

TELLS_NOTHING = (AssetError, ConfigError, ModelError, PrivacyError, ReplyError, RuleError)
"""Errors of the config, the model and the messages: a private client sends their text, unless its data had been looked
at when they were raised (`looking_at_data`)."""


class FrozenStore:
    """Frozen tensors by their digest, the most recently used few of them."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._held: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under their digest."""
        self._held[key] = tensors
        self._held.move_to_end(key)
        while len(self._held) > self._size:
            self._held.popitem(last=False)

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors of a digest, or None if they are not held."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)


frozen_store = FrozenStore()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this node is, and whether its versions fit the server's."""
    config: RunConfig | None = None
    try:
        config = config_of(context)
        require_same_config(message.content, config)
        client_id = client_id_of(context)
        with looking_at_data(config):
            workspace = open_workspace(config)
        require_same_ground(message.content, config, workspace.pins)
        facts: dict[str, Any] = {"fedlora": __version__, "fingerprint": workspace.base.fingerprint}
        indices = _indices(workspace, client_id)
        if config.privacy is None:
            facts["num_examples"] = len(indices)
        if (rank := rank_of(context)) is not None:
            facts["rank"] = rank
        note = may_leave(encode_note("hello", client_id=client_id, **facts), config)
    except Exception as error:
        note = _error_note(error, config)
    return Message(note, reply_to=message)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """One round of local training: plan in, the asked parts of the trained adapter out.

    A message of another strategy than fedlora's own server is answered by `fedlora.flower.plain_client`.
    """
    if is_plain(message):
        return train_plain(message, context)
    (reply,) = train_rounds([message.content], [context])
    if isinstance(reply, Exception):
        raise reply
    return Message(reply, reply_to=message)


@dataclass(frozen=True)
class _Asked:
    """A message that asks for training that can begin."""

    plan: ReceivedPlan
    frozen: Mapping[str, Tensor]
    workspace: Workspace
    client_id: int
    context: Context

    @cached_property
    def start(self) -> AdapterState:
        """Where training starts, as the server knows it."""
        return self.plan.adapter(self.frozen)


def train_rounds(contents: Sequence[RecordDict], contexts: Sequence[Context]) -> list[RecordDict | Exception]:
    """`train_round` of many nodes in one process, whose clients train together where they can.

    Args:
        contents: of the messages, each to one node.
        contexts: of these nodes.

    Returns:
        For each the reply's content, or what Flower should hear that the node's app has raised.
    """
    replies: dict[int, RecordDict | Exception] = {}
    waiting: dict[int, _Asked] = {}
    decoded = Decoded()
    for number, (content, context) in enumerate(zip(contents, contexts, strict=True)):
        try:
            plan = decode_plan(content, decoded)
            if any(asked.plan.head["base_digest"] != plan.head["base_digest"] for asked in waiting.values()):
                replies |= _train_all(waiting)  # before the base is brought to another version
                waiting.clear()
            asked = _asked(plan, context)
            if isinstance(asked, RecordDict):
                replies[number] = asked
            else:
                waiting[number] = asked
        except Exception as error:
            replies[number] = _told(error, context)
    replies |= _train_all(waiting)
    return [replies[number] for number in range(len(contents))]


def _asked(plan: ReceivedPlan, context: Context) -> _Asked | RecordDict:
    """What a plan asks of a node, or the node's question for what it lacks."""
    config, client_id = config_of(context), client_id_of(context)
    with looking_at_data(config):
        workspace = open_workspace(config)
    if client_id != plan.head["client_id"]:
        raise ReplyError(f"the plan is for client {plan.head['client_id']}, and this node is client {client_id} now")
    frozen = _frozen(plan)
    base_fits = can_follow(workspace.base, plan.head["base_digest"], plan.head["since_digest"])
    if frozen is None or not base_fits:
        return encode_note("need", frozen=frozen is None, base=not base_fits)
    return _Asked(plan, frozen, workspace, client_id, context)


def _train_all(waiting: Mapping[int, _Asked]) -> dict[int, RecordDict | Exception]:
    """Replies of clients whose plans are on one version of the base."""
    if any(asked.workspace.config.example_privacy is not None for asked in waiting.values()):
        return _train_all_privately(waiting)
    replies: dict[int, RecordDict | Exception] = {}
    outcomes = _each(lambda: run_plans(list(waiting.values())), len(waiting))
    for (number, asked), outcome in zip(waiting.items(), outcomes, strict=True):
        try:
            if isinstance(outcome, Exception) and asked.workspace.config.client_privacy is not None:
                outcome = _unchanged(asked, outcome)
            if isinstance(outcome, Exception):
                raise outcome
            replies[number] = _update(asked, outcome, _figures(outcome, asked.workspace.config))
        except Exception as error:
            replies[number] = _told(error, asked.context)
    return replies


def _each(run: Callable[[], list[Outcome]], number: int) -> list[Outcome]:
    """What came of each client; what stopped all of them came of each."""
    try:
        return run()
    except Exception as error:
        return [error] * number


def _update(asked: _Asked, result: TrainResult, figures: Mapping[str, float]) -> RecordDict:
    plan, head = asked.plan, asked.plan.head
    content = encode_update(
        encode_upload(plan, asked.start, result.adapter, asked.workspace.config.seed),
        figures,
        round_number=int(head["round"]),
        base_digest=head["base_digest"],
    )
    return may_leave(content, asked.workspace.config)


def _unchanged(asked: _Asked, error: Exception) -> TrainResult:
    """What a client sends whose training failed, where all that it holds is protected: an update that changes nothing.

    That it failed may depend on its data; the server would leave it out and write down that it did.
    """
    logger.warning("client %d failed, and its update changes nothing: %s", asked.client_id, clean_text(in_words(error)))
    logger.debug("a private client failed", exc_info=error)
    held = (
        len(asked.workspace.data.clients[asked.client_id]) if asked.client_id < len(asked.workspace.data.clients) else 0
    )
    return TrainResult(asked.start, max(1, held), 0, 0, float("nan"), 0.0, 0.0)


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


def _told(error: Exception, context: Context) -> RecordDict | Exception:
    """`_error_note`, or what it raises."""
    config: RunConfig | None = None
    try:
        config = config_of(context)
    except Exception:
        logger.debug("an error whose node has no config", exc_info=True)
    try:
        return _error_note(error, config)
    except Exception as raised:
        return raised


def _error_note(error: Exception, config: RunConfig | None) -> RecordDict:
    """A reply in plain words instead of Flower's traceback, so that the server can name the client and the cure.

    Raises:
        Exception: the error itself, if it is none of fedlora's and the run is not private.
    """
    if config is not None and config.privacy is not None and not isinstance(error, TELLS_NOTHING):
        error = withheld(error)
    if not isinstance(error, FedloraError):
        raise error
    return encode_note("error", error=str(error))


def _frozen(plan: ReceivedPlan) -> Mapping[str, Tensor] | None:
    """The plan's frozen tensors, from this message or an earlier one; None if they are not here."""
    key, frozen = plan.head["frozen"], plan.tensors("frozen/")
    if key and frozen:
        if digest(frozen) != key:
            raise ReplyError("the frozen parts of the plan are not those that it names (another hash): report this bug")
        frozen_store.put(key, frozen)
    return frozen if frozen or not key else frozen_store.get(key)


def run_plans(asked: Sequence[_Asked]) -> list[Outcome]:
    """Train what some plans ask on their clients' examples, together where they can."""

    def train(workspace: Workspace, jobs: Mapping[int, TrainJob], configs: Sequence[TrainConfig]) -> list[Outcome]:
        return train_cohort(workspace.base, workspace.task, workspace.data.train, list(jobs.values()), configs)

    return _run(asked, train, without_examples=False)


def run_plans_privately(asked: Sequence[_Asked], settings: Sequence[PrivateSettings]) -> list[Outcome]:
    """As `run_plans`, with DP-SGD; a client without examples trains on noise alone. Their ledgers are the caller's."""

    def train(workspace: Workspace, jobs: Mapping[int, TrainJob], configs: Sequence[TrainConfig]) -> list[Outcome]:
        how = [settings[number] for number in jobs]
        return train_private_cohort(
            workspace.base, workspace.task, workspace.data.train, list(jobs.values()), configs, how
        )

    return _run(asked, train, without_examples=True)


def _run(
    asked: Sequence[_Asked],
    train: Callable[[Workspace, Mapping[int, TrainJob], Sequence[TrainConfig]], list[Outcome]],
    *,
    without_examples: bool,
) -> list[Outcome]:
    """Make the jobs, by the places of `asked`, and train those that can begin.

    Args:
        asked: on one version of the base.
        train: is given the jobs and their configs.
        without_examples: whether a client that has none trains all the same.
    """
    jobs: dict[int, TrainJob] = {}
    outcomes: dict[int, Outcome] = {}
    for number, one in enumerate(asked):
        try:
            indices = _indices(one.workspace, one.client_id)
            if not (len(indices) or without_examples):
                raise TrainingError(f"client {one.client_id} has no examples: give it some, or lower partition.clients")
            jobs[number] = _job(one, indices)
        except Exception as error:
            outcomes[number] = error
    if jobs:
        workspace = asked[0].workspace
        configs = [workspace.config.train_of(asked[number].client_id) for number in jobs]
        outcomes |= dict(zip(jobs, train(workspace, jobs, configs), strict=True))
    return [outcomes[number] for number in range(len(asked))]


def _train_all_privately(waiting: Mapping[int, _Asked]) -> dict[int, RecordDict | Exception]:
    """Replies of private clients: "spent" where a budget does not allow the round.

    Each client's ledger says that it spends before anybody's data are touched, and is held until all have trained.
    """
    replies: dict[int, RecordDict | Exception] = {}
    with ExitStack() as ledgers:
        attempts: dict[int, _Attempted] = {}
        for number, asked in waiting.items():
            try:
                settings = private_settings(asked.workspace.config, asked.client_id)
                account = account_of(asked.context, asked.client_id, asked.plan.head.get("run"))
                known = "" if account.kept is None else asked.plan.digest(plan_config(asked.workspace.config))
                before = None if account.kept is None else account.kept.find(known, account.ledger)
                before = before or _spent(account, settings, int(asked.plan.head["round"]))
                if before is not None:
                    replies[number] = before
                    continue
                _check_model(asked)
                attempt = account.ledger.spend(
                    settings.entry, run=account.run, round=int(asked.plan.head["round"]), budget=settings.budget
                )
                ledgers.enter_context(attempt)
                attempts[number] = _Attempted(account, settings, attempt, known)
            except Exception as error:
                replies[number] = _told(error, asked.context)
        asking, how = [waiting[number] for number in attempts], [one.settings for one in attempts.values()]
        outcomes = _each(lambda: run_plans_privately(asking, how), len(asking))
        for (number, one), outcome in zip(attempts.items(), outcomes, strict=True):
            asked = waiting[number]
            try:
                if isinstance(outcome, Exception):
                    one.attempt.release()  # that it failed is seen, and may depend on the data: it counts for ever
                    raise outcome if isinstance(outcome, PrivacyError) else withheld(outcome)
                reply = _update(asked, outcome, _private_figures(outcome, one))
                one.release(reply)
                replies[number] = reply
            except Exception as error:
                replies[number] = _told(error, asked.context)
    return replies


@dataclass(frozen=True)
class _Attempted:
    """A private client's attempt at a round.

    Args:
        account: of the client.
        settings: of its training.
        attempt: open in its ledger.
        plan: digest of the plan, where the answer is kept.
    """

    account: Account
    settings: PrivateSettings
    attempt: Attempt
    plan: str

    def release(self, reply: RecordDict) -> None:
        """Keep the reply and write down that it leaves, where the ledger is not the server's too."""
        if self.account.kept is None:
            return
        try:
            self.account.kept.keep(self.plan, self.attempt.name, reply)
        except OSError as error:
            logger.warning("the answer cannot be kept (%s): if it is asked for again, it counts again", error)
        self.attempt.release()


def _spent(account: Account, settings: PrivateSettings, number: int) -> RecordDict | None:
    """What a client answers whose budget does not allow the round; None where it does."""
    entry, budget = settings.entry, settings.budget
    if budget is None or account.ledger.affords(entry, budget, run=account.run, round=number):
        return None
    epsilon = account.ledger.epsilon(budget.delta, budget.accountant)
    return encode_note(
        "spent",
        error=f"its privacy budget is spent: its ledger stands at epsilon {epsilon:.3f}, and one more round would "
        f"pass {budget.epsilon:g}",
    )


def _private_figures(result: TrainResult, one: _Attempted) -> dict[str, float]:
    entry = one.settings.entry
    figures = {
        "steps": float(result.steps),
        "sample_rate": entry.sample_rate,
        "noise_multiplier": entry.noise_multiplier,
        "max_grad_norm": one.settings.max_grad_norm,
        "attempts": float(one.account.ledger.attempts(one.account.run)),
    }
    return {"num_examples": 1, **figures}


def _check_model(asked: _Asked) -> None:
    """Look at the model on examples that are public: test examples, or on a node with data of its own invented ones."""
    workspace = asked.workspace
    check_model(workspace.base, workspace.task, workspace.data.test, _job(asked, np.empty(0, np.int64)))


def _job(asked: _Asked, indices: np.ndarray) -> TrainJob:
    """What a plan asks, on a base that was brought to its version."""
    plan, head, workspace = asked.plan, asked.plan.head, asked.workspace
    follow(workspace.base, plan.base_updates(), head["base_version"], head["base_digest"], head["since_digest"])
    return TrainJob(
        adapter=asked.start,
        trains=frozenset(head["trains"]),
        indices=indices,
        seed=derive(workspace.config.seed, "train", head["round"], asked.client_id),
        proximal_mu=max(head["proximal_mu"], workspace.config.train.proximal_mu),
    )


def _indices(workspace: Workspace, client_id: int) -> np.ndarray:
    clients = workspace.data.clients
    if not 0 <= client_id < len(clients):
        raise TrainingError(f"there is no client {client_id}: the partition has {len(clients)}, numbered from 0")
    return clients[client_id]
