"""The worker's process: one request at a time, on the main thread; the health service beside it."""

from __future__ import annotations

import logging
import os
import queue
import signal
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from filelock import FileLock, Timeout
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora import __version__
from fedlora.errors import WorkerError
from fedlora.flower import client_app
from fedlora.flower.task_identity import task_identity
from fedlora.hashing import code_digest
from fedlora.node_worker.frames import pack, unpack
from fedlora.node_worker.gated_app import GatedApp
from fedlora.node_worker.socket import (
    ERROR_CODE,
    METHOD,
    SERVICE,
    UNLIMITED,
    VARIABLE,
    make_folder,
    socket_mode,
)
from fedlora.training.workspace import close_workspace

logger = logging.getLogger(__name__)
MOST_AT_ONCE = 8
"""Calls that a gate has open at once; each may hold a message of the largest size that its policy allows."""
BROKEN = 70
"""Exit status after an unexpected error: what the process holds may be half changed, so a fresh one takes over."""
_SERVING, _STOPPING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class _Job:
    frame: bytes
    answer: futures.Future[bytes]


class Worker:
    """Serves one socket.

    Args:
        path: Path of the socket.
        device: Device for all computation, in place of the one in a message's config; None: the config's.
        app: The ClientApp that answers the messages; a `GatedApp` takes nothing from who asks but the message.

    Raises:
        WorkerError: the socket's folder is accessible to other users, or a worker is running there already.
    """

    def __init__(self, path: Path, device: str | None = None, app: ClientApp = client_app.app) -> None:
        self._path, self._device, self._app = path.absolute(), device, app
        self._stopping = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = os.environ.get("OMP_NUM_THREADS")
        self._gate = app if isinstance(app, GatedApp) else None
        make_folder(self._path, for_a_group=self._gate is not None)
        self._lock = FileLock(f"{self._path}.lock", mode=0o600, thread_local=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise WorkerError(
                f"a worker serves {str(self._path)!r} already: stop it, or name another socket", code="socket-in-use"
            ) from None
        self._path.unlink(missing_ok=True)  # of one that was killed: nobody else holds the lock
        os.environ.pop(VARIABLE, None)  # it does not ask itself
        # Requests wait in their threads; the health service must never wait behind them.
        pool = futures.ThreadPoolExecutor(max_workers=64)
        options, most = UNLIMITED, None
        if self._gate is not None:  # whoever asks is not trusted
            options, most = (UNLIMITED[0], (UNLIMITED[1][0], self._gate.policy.message_mb << 20)), MOST_AT_ONCE
        self._server = grpc.server(pool, options=options, maximum_concurrent_rpcs=most)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        service, method = METHOD.strip("/").split("/")
        handler = grpc.unary_unary_rpc_method_handler(self._enqueue)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            self._server.add_insecure_port(f"unix:{self._path}")
            os.chmod(self._path, socket_mode(self._path.parent))
        except (RuntimeError, OSError) as error:
            self._lock.release()
            raise WorkerError(
                f"socket {str(self._path)!r} cannot be opened: {error}", code="socket-not-opened"
            ) from None

    def serve(self, ready: Callable[[str], object] = logger.info) -> int:
        """Answer until `stop`.

        Args:
            ready: Called once, with a line, when the worker can accept messages.

        Returns:
            The status with which to exit.
        """
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, _SERVING)
        ready(f"fedlora {__version__} serves {self._path}")
        status = 0
        try:
            while status == 0 and not self._stopping:
                if (job := self._jobs.get()) is not None:
                    status = self._do(job)
        finally:
            for name in ("", SERVICE):
                self._health.set(name, _STOPPING)
            while not self._jobs.empty():
                if (left := self._jobs.get()) is not None:
                    left.answer.cancel()
            self._server.stop(grace=5.0).wait()
            self._path.unlink(missing_ok=True)
            self._lock.release()
        return status

    def stop(self, *_: object) -> None:
        """End `serve` when the present request is answered; a signal handler."""
        self._stopping = True
        self._jobs.put(None)

    def _enqueue(self, frame: bytes, call: grpc.ServicerContext) -> bytes:
        job = _Job(frame, futures.Future())
        call.add_callback(job.answer.cancel)  # who asked is gone: not begun, it is never done
        self._jobs.put(job)
        try:
            return job.answer.result()
        except futures.CancelledError:
            call.abort(grpc.StatusCode.UNAVAILABLE, "the worker is being stopped")
        except WorkerError as error:
            call.set_trailing_metadata(((ERROR_CODE, error.code),))
            call.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception as error:
            call.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        raise AssertionError("abort raises")

    def _do(self, job: _Job) -> int:
        if not job.answer.set_running_or_notify_cancel():
            return 0
        try:
            job.answer.set_result(self._answer(job.frame))
        except WorkerError as error:
            job.answer.set_exception(error)
        except Exception as error:
            logger.exception("a request failed; a fresh process has to take over")
            job.answer.set_exception(error)
            return BROKEN
        return 0

    def _answer(self, frame: bytes) -> bytes:
        try:
            head, message, context = _request(frame)
        except WorkerError as error:
            if self._gate is not None:
                self._gate.refuse(len(frame), error)
            raise
        if self._gate is None:
            self._enter(head["folder"], head["threads"])
            if self._device is not None:
                context.node_config.pop("device", None)
                context.run_config["set"] = f"runtime.device={self._device}"
        with task_identity(context.run_id, context.node_id):
            reply = self._app(message, context)
        return pack({}, content=reply.content, state=context.state)

    def _enter(self, folder: str, threads: str | None) -> None:
        """Take the app's place: its folder, for relative names of files, and its number of threads."""
        try:
            os.chdir(folder)
        except OSError as error:
            raise WorkerError(
                f"the worker cannot enter the app's folder {folder!r} ({error.strerror})", code="folder-not-entered"
            ) from None
        if threads != self._threads:
            close_workspace()  # it was opened with another number
            self._threads = threads
            os.environ.pop("OMP_NUM_THREADS", None)
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads


def _request(frame: bytes) -> tuple[dict[str, Any], Message, Context]:
    """What a node's process asks.

    Raises:
        WorkerError: it is none of `fedlora.node_worker.client.ask`'s frames, or of another fedlora.
    """
    try:
        head, contents = unpack(frame)
        _ = head["folder"], head["threads"]
        if (theirs := (head["fedlora"], head["code"])) != (__version__, code_digest()):
            raise WorkerError(
                f"the worker runs fedlora {__version__} (source {code_digest()}), the app fedlora {theirs[0]} "
                f"(source {theirs[1]}): restart the worker with the app's",
                code="other-version",
            )
        run_id, node_id = int(head["run_id"]), int(head["node_id"])
        context = Context(run_id, node_id, dict(head["node_config"]), contents["state"], dict(head["run_config"]))
        with task_identity(run_id, node_id):
            return head, Message(contents["content"], node_id, str(head["type"])), context
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise WorkerError(f"the worker got no request: {type(error).__name__}", code="no-request") from None


def run(
    path: Path, device: str | None = None, site: Path | None = None, ready: Callable[[str], object] = logger.info
) -> int:
    """Serve until SIGTERM or SIGINT; the status with which to exit.

    Args:
        path: Path of the socket.
        device: See `Worker`.
        site: Folder of a site (`fedlora.site`) whose gate the worker is; relative paths are relative to it. None: it
            helps a node's process, and takes everything from there.
        ready: See `Worker.serve`.

    Raises:
        ConfigError: a file of the site is missing or wrong.
        WorkerError: see `Worker`.
    """
    path = path.absolute()
    if site is None:
        worker = Worker(path, device)
    else:
        gate = GatedApp(site, device)
        os.chdir(gate.site)
        worker = Worker(path, app=gate)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, worker.stop)
    return worker.serve(ready)
