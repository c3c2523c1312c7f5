"""The client: one ClientApp for Flower's simulation and real nodes.

What a client does is `fedlora.federation.client`'s; here messages become requests, and answers messages.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora import __version__
from fedlora.aggregators import Claim, load_aggregator
from fedlora.config import RunConfig
from fedlora.errors import FedloraError, ReplyError
from fedlora.federation.client import answer
from fedlora.federation.client_evaluation import measure_apart
from fedlora.federation.client_ledger import LedgerPlace
from fedlora.federation.client_pool import Failure
from fedlora.federation.client_store import NOTHING_KEPT, ClientStore
from fedlora.federation.client_training import examples_of_client
from fedlora.federation.discretion import failure_of, looking_at_data
from fedlora.federation.protocol import TrainedReply, TrainRequest, plan_config
from fedlora.flower.app_config import client_id_of, config_of, rank_of
from fedlora.flower.evaluation_messages import encode_sums
from fedlora.flower.handshake import ledger_seen, require_same_config, require_same_ground
from fedlora.flower.kept_answers import KeptAnswer, LastAnswer
from fedlora.flower.messages import (
    HeldParts,
    decode_head,
    decode_request,
    decode_request_head,
    encode_note,
    encode_reply,
    request_digest,
)
from fedlora.flower.plain_client import is_plain, train_plain
from fedlora.hash_chain import START
from fedlora.model.base_history import can_follow, follow
from fedlora.privacy.accounting import Budget
from fedlora.privacy.disclosure import Disclosure
from fedlora.privacy.ledger import Attempt, Ledger
from fedlora.training.workspace import Workspace, open_workspace

app = ClientApp()
logger = logging.getLogger(__name__)

held_parts = HeldParts()
"""Of an imported module: Ray pickles an app's globals by value for each message, so a cache in a closure or in
`__main__` would do nothing."""
last_answer = LastAnswer()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this node is, and whether its versions fit the server's."""
    return _answered(message, context, _hello)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training: a request in, the parts of the trained adapter that it asks for out.

    A message of another strategy than fedlora's own server is answered by `fedlora.flower.plain_client`.
    """
    return train_plain(message, context) if is_plain(message) else _answered(message, context, _trained)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure a state on what this client keeps apart: sums out, and nothing of single examples."""
    return _answered(message, context, _measured)


def _answered(
    message: Message, context: Context, reply_of: Callable[[RecordDict, Context, RunConfig], RecordDict]
) -> Message:
    """The reply to a message: what a function of its content gives, or a note of what it raised."""
    config: RunConfig | None = None
    try:
        config = config_of(context)
        reply = reply_of(message.content, context, config)
    except Exception as error:
        reply = _note(failure_of(error, config))
    return Message(reply, reply_to=message)


def _hello(content: RecordDict, context: Context, config: RunConfig) -> RecordDict:
    """The content of the reply to "hello"."""
    require_same_config(content, config)
    client_id = client_id_of(context)
    with looking_at_data(config):
        workspace = open_workspace(config)
    require_same_ground(content, config, workspace.pins)
    facts: dict[str, Any] = {"fedlora": __version__, "fingerprint": workspace.base.fingerprint}
    indices = examples_of_client(workspace, client_id)
    if config.privacy is None:
        facts["num_examples"] = len(indices)
    if (rank := rank_of(context)) is not None:
        facts["rank"] = rank
    if config.example_privacy is not None and (own := ledger_place(context).own) is not None:
        ledger = Ledger(own)
        ledger.require_head(ledger_seen(content))
        facts["ledger"] = ledger.head() or START
    note = encode_note("hello", client_id=client_id, **facts)
    _require_disclosed(note, config)
    return note


def _measured(content: RecordDict, context: Context, config: RunConfig) -> RecordDict:
    """The content of the reply to a request to evaluate."""
    head, request, workspace = _request(content, context, config)
    if not isinstance(request, TrainRequest):
        return request
    plan = request.plan
    follow(workspace.base, plan.base_updates, plan.base_version, request.base_digest, request.since_digest)
    workspace.base.write(plan.adapter)
    measured = measure_apart(workspace, request, head["parts"], _store(request, context, config))
    return _note(measured) if isinstance(measured, Failure) else encode_sums(request, measured)


def _trained(content: RecordDict, context: Context, config: RunConfig) -> RecordDict:
    """The content of the reply to a request to train."""
    head, request, workspace = _request(content, context, config)
    if not isinstance(request, TrainRequest):
        return request
    if config.example_privacy is not None:
        return _trained_privately(head, request, context, workspace)
    digest = request_digest(head, plan_config(config))
    key = (context.run_id, context.node_id, digest, weakref.ref(workspace))
    if (before := last_answer.find(key)) is not None:
        return before
    (found,) = answer(workspace, [request], _no_account, _store(request, context, config))
    if not isinstance(found, TrainedReply):
        return _note(found)
    reply = encode_reply(found, config.seed)
    last_answer.keep(key, reply)
    return reply


def _request(
    content: RecordDict, context: Context, config: RunConfig
) -> tuple[dict[str, Any], TrainRequest | RecordDict, Workspace]:
    """A message's head, its request or a note that says what is needed to read it, and the client's workspace."""
    head, client_id = decode_request_head(content), client_id_of(context)
    with looking_at_data(config):
        workspace = open_workspace(config)
    if client_id != head["client_id"]:
        raise ReplyError(
            f"the plan is for client {head['client_id']}, and this node is client {client_id} now", code="other-client"
        )
    request = decode_request(content, head, held_parts)
    base_fits = can_follow(workspace.base, head["base_digest"], head["since_digest"])
    if request is None or not base_fits:
        return head, encode_note("need", parts=request is None, base=not base_fits), workspace
    return head, request, workspace


def _trained_privately(
    head: dict[str, Any], request: TrainRequest, context: Context, workspace: Workspace
) -> RecordDict:
    """As `_trained`; asked for the same again, the client sends the same bytes again."""
    config, place = workspace.config, ledger_place(context)
    ledger = place.open(request.client_id, request.run).ledger
    ledger.require_head(request.ledger)
    kept = KeptAnswer(ledger.path.with_name(f"{ledger.path.name}.answer"))
    digest = request_digest(head, plan_config(config))
    if (before := kept.find(digest, ledger)) is not None:
        return before
    released: list[RecordDict] = []

    def release(reply: TrainedReply, attempt: Attempt) -> None:
        released.append(encode_reply(reply, config.seed))
        try:
            kept.keep(digest, attempt.name, released[-1])
        except OSError as error:
            logger.warning("the answer cannot be kept (%s): if it is asked for again, it counts again", error)
        attempt.release()

    store = _store(request, context, config)
    (found,) = answer(workspace, [request], lambda one: place.open(one.client_id, one.run, release), store)
    return released[-1] if isinstance(found, TrainedReply) else _note(found)


def _store(request: TrainRequest, context: Context, config: RunConfig) -> ClientStore:
    """What the client keeps of the request's run.

    Raises:
        ReplyError: the request lets it keep parts, and the run's rule does not.
    """
    keeps = request.plan.kept or config.clients_keep
    if request.plan.kept and Claim.PERSONAL not in load_aggregator(config.strategy.name, config.strategy.fields).claims:
        raise ReplyError(
            f"the request lets this client keep {min(request.plan.kept)!r}, and by strategy {config.strategy.name!r} "
            "no client keeps anything: correct the rule's claims, or what it sends",
            code="kept-unasked",
        )
    return ledger_place(context).store(request.run) if keeps else NOTHING_KEPT


def _no_account(_request: object) -> Any:
    raise AssertionError("only private clients keep account")


def ledger_place(context: Context) -> LedgerPlace:
    """Where a client's ledger is: by its node's own config, or by the run's."""
    facts, folder = context.node_config, str(context.run_config.get("ledger-dir", ""))
    own = str(facts.get("ledger", ""))
    cap = Budget(float(facts["epsilon"]), float(facts["delta"])) if "epsilon" in facts else None
    return LedgerPlace(Path(own) if own else None, Path(folder) if folder else None, cap=cap)


def _note(found: Failure | Exception) -> RecordDict:
    """A reply in plain words instead of Flower's traceback, so that the server can name the client and the cure.

    Raises:
        Exception: what nobody foresaw.
    """
    if isinstance(found, FedloraError):  # it would end a simulation; other nodes have memory of their own
        return encode_note("error", error=str(found))
    if isinstance(found, Exception):
        raise found
    return encode_note("spent" if found.kind == "spent" else "error", error=found.why)


def _require_disclosed(content: RecordDict, config: RunConfig) -> None:
    """Raise `PrivacyError` for a note of a private client that says more than it may."""
    if config.privacy is not None:
        Disclosure(config.privacy.unit).require_reply(decode_head(content))
