"""Calls to a SuperLink that stumbles: they are repeated, with back-off and a bound.

What Flower 1.41 does by itself, read in its source and seen with injected errors (tests/e2e/test_stumbles.py):

- Connection errors and HTTP 502, 503 and 504 are repeated for ever (`flwr.supercore.retry.http_retry`), but no error
  whose text has "ssl" or "tls" in it, as that of a TLS connection that breaks has.
- Any other status is final, and a SuperLink says 500 for whatever it did not foresee: "database is locked" above all.
  A SuperNode that gets one in pull-messages ends its loop and stays as a process; in push-messages or push-object it
  drops the reply; in its heartbeat it goes on without heartbeats, and is taken for offline a minute later. A SuperExec
  ends, and a ServerApp raises.

Repeating does nothing twice. A message is known by its id, a hash of its content, and a SuperLink stores it once;
`get-nodes`, `pull-object`, `confirm-message-received` and heartbeats can be repeated as they are.

- `push-messages` of a node whose answer was lost may find that the server has fetched the announcement meanwhile. Then
  Flower sends no objects, the SuperLink gives the upload up after 180 s, and the server asks for the reply again.
- `push-object` says "not stored" where the database was locked, where the push has taken too long, and where an earlier
  try was carried out and its answer lost. It is repeated too, and after such a try "not stored" means that it is there.
- `pull-messages` hands a message out once: one whose answer was lost on the way is asked for again by the server
  (`fedlora.flower.flower_clients`).
- `acquire-task` and `pull-task-input` hand out a task once. Where their answer is lost the task runs out after a while,
  and is one that failed: a node's reply is an error, a server's run ends, and can be resumed.

`install` replaces a private method of flwr's HTTP client, which all of its programs use; this is the only place.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.protobuf.client import ProtobufClient

from fedlora.sanitize import clean_text

if TYPE_CHECKING:
    from flwr.serverapp import Grid

logger = logging.getLogger("flwr")

BOUND_S = 120.0
"""For how long a call is repeated that the SuperLink answers with an error of its own."""
UNREACHED_S = 600.0
"""For how long the server's app waits for a SuperLink that is gone: Flower gives up the run after a minute."""
PAUSE_S = (0.5, 10.0)
"""First and longest pause between two tries; it doubles, and each is drawn between half of it and all of it."""
PASSING = frozenset({500, 502, 503, 504})
"""Statuses that may be gone at the next try."""
REFUSALS = 3
"""How often an object is pushed that the SuperLink says not to have stored."""
LASTING = re.compile(r"certificate|wrong_version|alert|unknown ca", re.IGNORECASE)
"""TLS errors that will be there at the next try too."""

_Send = Callable[..., httpx.Response]


def install(reached: Path | None = None) -> None:
    """Make the calls of this process patient; a second time it changes nothing.

    Args:
        reached: File that is touched whenever the SuperLink answers a node; None: no file.
    """
    if not hasattr(ProtobufClient._send, "__wrapped__"):
        ProtobufClient._send = patient(ProtobufClient._send, reached=reached)  # type: ignore[method-assign]


def bound(grid: Grid) -> None:
    """Let a server's app give up after `UNREACHED_S` without a connection: Flower would try for ever."""
    from flwr.superlink.grid.http_grid import HttpGrid

    if isinstance(grid, HttpGrid):
        grid._retry_invoker.max_time = UNREACHED_S


def in_words(error: Exception) -> str | None:
    """The line for a call that was repeated in vain; None for any other error."""
    if not isinstance(error, httpx.HTTPError):
        return None
    why = clean_text(str(error).partition("\n")[0], 200)
    return f"the SuperLink cannot be reached, or answers with errors ({why}): see its log, then go on with resume=true"


def patient(
    send: _Send,
    *,
    reached: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> _Send:
    """`ProtobufClient._send` that repeats what may come through at the next try.

    After `BOUND_S` the answer or the error is handed on, and Flower does what it does. Connection errors that Flower
    repeats by itself are handed on at once.

    Args:
        send: What is repeated.
        reached: See `install`.
        clock: Seconds, as `time.monotonic`.
        sleep: As `time.sleep`.
    """
    draw = random.Random()
    unsure: set[tuple[str, str] | None] = set()  # objects of which nobody knows whether they are stored

    @functools.wraps(send)
    def again(self: ProtobufClient, context: Any, **how: Any) -> httpx.Response:
        end, pause, refused = clock() + BOUND_S, PAUSE_S[0], 0
        request, headers, pushed = context.request, httpx.Headers(context.request.headers), _pushed(context.message)
        while True:
            # A new one for each try: Flower's interceptors add headers, of which a node's signature carries the time.
            parts = {"headers": headers, "content": request.content, "extensions": request.extensions}
            context = replace(context, request=httpx.Request(request.method, request.url, **parts))
            try:
                response = send(self, context, **how)
            except httpx.TransportError as error:
                unsure.add(pushed)
                if clock() >= end or not _only_broken(error):
                    raise
                what = str(error)
            else:
                if response.status_code in PASSING:
                    unsure.add(pushed)
                    what = f"HTTP {response.status_code}"
                elif pushed is None or response.status_code != 200 or _says_stored(response):
                    unsure.discard(pushed)
                    _touch(reached, response)
                    return response
                else:
                    refused, what = refused + 1, "not stored"
                    if refused == REFUSALS:
                        return _stored(response) if pushed in unsure else response
                if clock() >= end:
                    return response
            if pause == PAUSE_S[0]:
                logger.warning("%s: %s; trying again for up to %g s", request.url.path, what, BOUND_S)
            sleep(draw.uniform(pause / 2, pause))
            pause = min(2 * pause, PAUSE_S[1])

    return again


def _pushed(message: object) -> tuple[str, str] | None:
    """Session and id of the object that a request pushes; None for any other request."""
    return (message.session_id, message.object_id) if isinstance(message, PushObjectRequest) else None


def _says_stored(response: httpx.Response) -> bool:
    return PushObjectResponse.FromString(response.content).stored


def _stored(response: httpx.Response) -> httpx.Response:
    content = PushObjectResponse(stored=True).SerializeToString()
    return httpx.Response(200, content=content, request=response.request)


def _touch(reached: Path | None, response: httpx.Response) -> None:
    if reached is not None and response.status_code < 400:
        with contextlib.suppress(OSError):  # a full disk is no reason to end
            reached.touch()


def _only_broken(error: httpx.TransportError) -> bool:
    """Whether a TLS connection broke: Flower takes every error that speaks of TLS for one that lasts."""
    text = str(error)
    return re.search("ssl|tls", text, re.IGNORECASE) is not None and LASTING.search(text) is None
