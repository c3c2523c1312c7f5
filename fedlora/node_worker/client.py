"""A node's process asks its worker; `WorkerError` means that nothing was done, or nothing of it left the worker."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import grpc
from flwr.app import Context, Message, RecordDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlora import __version__
from fedlora.errors import WorkerError
from fedlora.flower.app_config import config_of
from fedlora.hashing import code_digest
from fedlora.node_worker.frames import pack, unpack
from fedlora.node_worker.socket import ERROR_CODE, METHOD, SERVICE, UNLIMITED, require_own
from fedlora.registry import OWN_CLASS

HEALTH_TIMEOUT_S = 5.0
# A request is sent once: a second sending by gRPC itself could train twice.
OPTIONS = (*UNLIMITED, ("grpc.enable_retries", 0))
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.FAILED_PRECONDITION)
"""The worker died, is stopping, or cannot serve this app."""


def check(path: Path, *, gate: bool = False) -> None:
    """Ask the health service.

    Args:
        path: Path of the worker's socket.
        gate: See `fedlora.node_worker.socket.require_own`.

    Raises:
        WorkerError: nobody serves there, or somebody else's socket is there.
    """
    require_own(path, gate=gate)
    with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
        _check(channel, path)


def ask(path: Path, message: Message, context: Context, *, gate: bool = False) -> RecordDict:
    """The content of the worker's reply; the context's state is brought up to date.

    Args:
        path: Path of the worker's socket.
        message: The message to answer.
        context: The node's context, without the key that names the worker.
        gate: Whether the worker is the site's gate, which knows the node's own facts and code by itself.

    Raises:
        WorkerError: the worker is not there, died, or is of another fedlora: answer the message yourself.
        RuntimeError: it met an unexpected error, or did not answer before the message expired.
    """
    require_own(path, gate=gate)
    head = {
        "fedlora": __version__,
        "code": code_digest(),
        "folder": os.getcwd(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "type": message.metadata.message_type,
        "run_id": context.run_id,
        "node_id": context.node_id,
        "node_config": dict(context.node_config),
        "run_config": _run_config(context, gate),
    }
    request = pack(head, content=message.content, state=context.state)
    left = message.metadata.created_at + message.metadata.ttl - time.time()
    with grpc.insecure_channel(f"unix:{path}", options=OPTIONS) as channel:
        _check(channel, path)
        try:
            answer: bytes = channel.unary_unary(METHOD)(request, timeout=max(left, 1.0))
        except grpc.RpcError as error:
            if error.code() in GONE:
                gone = WorkerError(f"the worker at {str(path)!r} gave no answer: {error.details()}", code="no-answer")
                gone.code = dict(error.trailing_metadata() or ()).get(ERROR_CODE, gone.code)  # the worker's own
                raise gone from None
            raise RuntimeError(f"the worker failed: {error.details()}") from None
    _, contents = unpack(answer)
    for key in list(context.state):
        del context.state[key]
    context.state.update(contents["state"])
    return contents["content"]


def _check(channel: grpc.Channel, path: Path) -> None:
    try:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=HEALTH_TIMEOUT_S).status
    except grpc.RpcError as error:
        raise WorkerError(
            f"no worker answers at {str(path)!r} ({error.code().name.lower()})", code="no-answer"
        ) from None
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise WorkerError(f"the worker at {str(path)!r} is not serving: it is being stopped", code="worker-stopping")


def _run_config(context: Context, gate: bool) -> dict[str, bool | float | int | str]:
    """The run's config with its text in place of a file's name: the worker does not have the app's folder."""
    plain = Context(context.run_id, context.node_id, {}, RecordDict(), context.run_config)
    config = config_of(plain)
    own = (config.task.name, config.partition.name, config.data.source, config.evaluation.metric, config.train.loop)
    for name in own:
        if not gate and re.match(OWN_CLASS, name or ""):
            raise WorkerError(f"{name!r} is code of the app's own, which the worker does not have", code="foreign-code")
    others = {key: value for key, value in context.run_config.items() if key not in ("config", "set")}
    return {**others, "toml": config.to_toml()}
