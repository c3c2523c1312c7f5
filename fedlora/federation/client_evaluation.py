"""What a client reports of a state: sums over the examples that it keeps apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.errors import ReplyError
from fedlora.federation.client_pool import SHARED, Failure, Sums
from fedlora.federation.client_store import ClientStore
from fedlora.federation.client_training import own_model_of, start_of
from fedlora.federation.protocol import TrainRequest
from fedlora.training.evaluate import evaluate
from fedlora.training.workspace import Workspace


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
    owns = config.train.personal is not None and bool(request.plan.trains)
    keeps, personal = owns or bool(request.plan.kept), request.plan.adapter
    try:
        if keeps:
            personal = own_model_of(request, store) if owns else start_of(request, store, config)[0]
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
