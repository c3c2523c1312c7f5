"""Calls to a SuperLink that stumbles are repeated; what cannot be mended by waiting is handed on at once."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesRequest, GetNodesResponse
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid.http_grid import HttpGrid
from google.protobuf.message import Message

from fedlora.flower import patience
from fedlora.flower.patience import BOUND_S, PAUSE_S, patient

Answer = int | bytes | Exception
REQUEST = httpx.Request("POST", "https://example.org/v1/fleet/pull-messages")
PULL: Message = PullMessagesRequest()
BROKEN = httpx.ReadError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1016)")
UNTRUSTED = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1016)")
NOBODY = httpx.ConnectError("[Errno 111] Connection refused")


class Link:
    """A SuperLink that gives these answers, and then the last one for ever; time passes in its sleeps alone."""

    def __init__(self, *answers: Answer, reached: Path | None = None) -> None:
        self.answers, self.asked, self.now, self.slept = answers, 0, 0.0, list[float]()
        self._call = patient(self._send, reached=reached, clock=lambda: self.now, sleep=self._sleep)

    def call(self, message: Message = PULL) -> httpx.Response:
        return self._call(None, ProtobufRequestContext("Call", message, REQUEST))

    def _send(self, _client: object, _context: object) -> httpx.Response:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        status, content = (200, answer) if isinstance(answer, bytes) else (answer, b"")
        return httpx.Response(status, content=content, request=REQUEST)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.mark.parametrize("failure", [500, 502, 503, 504, BROKEN], ids=str)
@pytest.mark.parametrize("times", [1, 10])
def test_a_call_is_repeated_until_it_comes_through(failure: Answer, times: int) -> None:
    link = Link(*[failure] * times, 200)
    assert link.call().status_code == 200
    assert link.asked == times + 1
    assert len(link.slept) == times
    assert all(PAUSE_S[0] / 2 <= pause <= PAUSE_S[1] for pause in link.slept)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 409, 413, 501])
def test_an_answer_that_is_no_stumble_is_handed_on_at_once(status: int) -> None:
    link = Link(status)
    assert link.call().status_code == status
    assert link.asked == 1


@pytest.mark.parametrize("error", [UNTRUSTED, NOBODY], ids=["untrusted", "nobody"])
def test_errors_that_last_and_those_that_flower_repeats_are_handed_on_at_once(error: Exception) -> None:
    link = Link(error)
    with pytest.raises(httpx.ConnectError, match=r"certificate|refused"):
        link.call()
    assert link.asked == 1


def test_patience_has_an_end() -> None:
    link = Link(500)
    assert link.call().status_code == 500
    assert BOUND_S <= link.now <= BOUND_S + PAUSE_S[1]
    broken = Link(BROKEN)
    with pytest.raises(httpx.ReadError, match="EOF"):
        broken.call()
    assert BOUND_S <= broken.now <= BOUND_S + PAUSE_S[1]


def test_only_an_answer_says_that_the_superlink_was_reached(tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    assert Link(401, reached=reached).call().status_code == 401
    assert not reached.exists()
    Link(500, 200, reached=reached).call()
    assert reached.exists()
    nowhere = tmp_path / "no" / "reached"  # a full disk does not end a node
    assert Link(200, reached=nowhere).call().status_code == 200


PUSHED, REFUSED = (PushObjectResponse(stored=stored).SerializeToString() for stored in (True, False))


@pytest.mark.parametrize(
    ("answers", "stored", "asked"),
    [
        ([PUSHED], True, 1),
        ([REFUSED, PUSHED], True, 2),  # the database was locked
        ([REFUSED] * 3, False, 3),  # it took too long
        ([500, *[REFUSED] * 3], True, 4),  # it was stored, and the answer lost
        ([500, PUSHED], True, 2),
    ],
)
def test_an_object_is_pushed_until_it_is_there(answers: list[int | bytes], stored: bool, asked: int) -> None:
    link = Link(*answers)
    request = PushObjectRequest(session_id="s", object_id="o")
    assert PushObjectResponse.FromString(link.call(request).content).stored is stored
    assert link.asked == asked


def test_an_object_whose_push_broke_off_is_there_when_it_cannot_be_pushed_again() -> None:
    """Flower repeats a push itself after a connection error: another call of the same object in the same session."""
    link, request = Link(NOBODY, REFUSED), PushObjectRequest(session_id="s", object_id="o")
    with pytest.raises(httpx.ConnectError):
        link.call(request)
    assert PushObjectResponse.FromString(link.call(request).content).stored
    other = PushObjectRequest(session_id="t", object_id="o")
    assert not PushObjectResponse.FromString(link.call(other).content).stored


def test_flowers_own_client_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method that `install` replaces is the one through which Flower's clients call, with their headers."""
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.path, request.headers["flwr-component-name"]))
        if len(asked) < 3:
            return httpx.Response(500, json={"detail": "database is locked"})
        return httpx.Response(200, content=GetNodesResponse(nodes=[NodeInfo(node_id=7)]).SerializeToString())

    monkeypatch.setattr(ProtobufClient, "_send", patient(ProtobufClient._send, sleep=lambda _: None))
    client = RuntimeHttpClient("https://example.org", interceptors=[RuntimeVersionHttpInterceptor("flwr-serverapp")])
    client._client = httpx.Client(transport=httpx.MockTransport(answer))
    assert [node.node_id for node in client.GetNodes(GetNodesRequest()).nodes] == [7]
    assert asked == [("/v1/runtime/get-nodes", "flwr-serverapp")] * 3


def test_a_servers_app_does_not_wait_for_ever_for_a_superlink_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "UNREACHED_S", 0.05)
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="x")
    patience.bound(grid)
    with pytest.raises(httpx.ConnectError) as caught:
        list(grid.get_nodes())
    line = patience.in_words(caught.value)
    assert line is not None
    assert "resume=true" in line
    assert patience.in_words(ValueError("x")) is None
