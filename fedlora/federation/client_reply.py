"""What a client sends of what it trained, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.adapter import AdapterState
from fedlora.config import RunConfig
from fedlora.federation.client_pool import Failure
from fedlora.federation.client_store import OPTIMIZER, RESIDUAL, ClientStore, divided, kept_differs, named
from fedlora.federation.protocol import TrainedReply, TrainRequest, update_head
from fedlora.privacy.disclosure import Disclosure
from fedlora.training.job import TrainResult

Answer = TrainedReply | Failure | Exception
"""What comes of one client: a reply, a failure in words that may leave it, or an exception that nobody foresaw."""


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
                raise kept_differs(request.client_id, name, before)
            sent[name] = sent[name] + before
    received = request.as_received(sent, seed)
    return sent, residual | {name: value - received[name] for name, value in sent.items()}
