"""A site's worker writes down what was asked and answered, answers nothing that it cannot write down, and takes runs
that were signed by whom its policy names."""

from __future__ import annotations

import datetime
import errno
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from integration.test_site_policy import (
    EXAMPLES,
    PRIVATE,
    ByNode,
    MakeConfig,
    MakeSite,
    ask,
    hello,
    own,
    refusal,
    request,
    site,
)
from integration.test_site_policy import train as train_one
from support.errors import raises
from torch import Tensor

from fedlora import hash_chain
from fedlora.callbacks import Callback
from fedlora.config import RunConfig
from fedlora.errors import DeployError, WorkerError
from fedlora.flower import client_app, messages
from fedlora.flower.messages import HeldParts, decode_head, decode_request, decode_request_head, payload_bytes
from fedlora.flower.server_app import serve
from fedlora.flower.task_identity import task_identity
from fedlora.flower.update_checks import check_update
from fedlora.hash_chain import read_chain
from fedlora.hashing import code_digest, tensors_digest
from fedlora.node_worker.gated_app import UNLOGGED, GatedApp
from fedlora.node_worker.server import Worker
from fedlora.node_worker.socket import METHOD
from fedlora.privacy.ledger import Ledger
from fedlora.runs.rundir import RunDir
from fedlora.site.approvals import config_hash
from fedlora.site.audit_log import AUDIT_LOG, read_log
from fedlora.site.signatures import Statement, public_line, sign
from fedlora.testing.loopback_grid import LoopbackGrid

__all__ = ["own", "site"]  # fixtures
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
TODAY = datetime.datetime.now(datetime.UTC).date()
DAY = datetime.timedelta(days=1)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [dict(record) for record in read_log(folder).records]


def error_of(content: RecordDict) -> str:
    head = decode_head(content)
    assert head["kind"] == "error", head
    return str(head["error"])


# ------------------------------------------------------------------------------------------------ what is written


def test_each_request_and_answer_is_a_line(own: MakeConfig, site: MakeSite) -> None:
    config, folder = own(), site()
    hello(folder, config)
    content = request(config)
    answer = ask(folder, config, "train", content)
    found = lines(folder)
    assert [line["event"] for line in found] == ["request", "answer"] * 2
    assert [line["type"] for line in found[::2]] == ["query.hello", "train"]
    assert [line["kind"] for line in found[1::2]] == ["hello", "update"]
    assert {line["config"] for line in found[::2]} == {config_hash(config)}
    assert {(line["model"], line["rule"], line["private"]) for line in found[1::2]} == {
        (config.model.name, "fedavg", "no")
    }
    asked, answered = found[2:]
    assert (asked["run"], asked["round"], asked["client_id"]) == ("ab" * 16, 1, 0)
    assert asked["bytes"] == payload_bytes(content)
    assert answered["request"] == asked["hash"]
    assert answered["bytes"] == payload_bytes(answer)
    assert answered["figures"]["num_examples"] == EXAMPLES
    sent = decode_request(content, decode_request_head(content), HeldParts())
    assert sent is not None
    tensors, _ = check_update(answer, sent)
    norm = math.sqrt(
        sum(float((t.double() - sent.starts[name].double()).square().sum()) for name, t in tensors.items())
    )
    assert answered["norm_of_change"] == norm > 0


def test_a_request_is_hashed_once_for_its_answer_and_its_line(
    own: MakeConfig, site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Any] = []

    def counted(tensors: Mapping[str, Tensor]) -> str:
        hashed.append(tensors)
        return tensors_digest(tensors)

    config, folder = own(), site()
    content = request(config)
    monkeypatch.setattr(messages, "tensors_digest", counted)
    ask(folder, config, "train", content)
    assert "norm_of_change" in lines(folder)[-1]
    assert len(hashed) == len(decode_request_head(content)["digests"])


@pytest.mark.slow
def test_what_a_private_run_spends_is_in_the_log(own: MakeConfig, site: MakeSite) -> None:
    config, folder = own(*PRIVATE), site()
    train_one(folder, config)
    train_one(folder, config, 2)
    ledger = Ledger(folder / "ledger.jsonl")
    answers = lines(folder)[1::2]
    assert [line["private"] for line in answers] == ["example"] * 2
    assert answers[0]["epsilon"] < answers[1]["epsilon"] == ledger.epsilon(1e-3, "rdp")
    assert answers[1]["ledger"] == ledger.head()
    assert answers[1]["figures"]["num_examples"] == 1
    assert "examples_seen" not in answers[1]["figures"]


def test_a_refusal_is_written_with_its_clause_and_the_reason(own: MakeConfig, site: MakeSite) -> None:
    folder = site(max_rounds=1)
    assert error_of(train_one(folder, own())) == refusal("max_rounds")
    (line,) = lines(folder)[1:]
    assert line["refused"] == "max_rounds"
    assert "the number of rounds is 2" in line["why"]
    assert "norm_of_change" not in line


def test_what_is_no_request_is_written_too(site: MakeSite, tmp_path: Path) -> None:
    folder = site()
    worker = Worker(tmp_path / "s" / "w.sock", app=GatedApp(folder))
    with raises(WorkerError, "no-request"):
        worker._answer(b"nonsense")
    asked, answered = lines(folder)
    assert (asked["bytes"], answered["refused"]) == (8, "no-request")
    worker._lock.release()


def test_a_message_above_the_policys_size_is_not_read(site: MakeSite, tmp_path: Path) -> None:
    folder = site(message_mb=1)
    worker = Worker(tmp_path / "s" / "w.sock", app=GatedApp(folder))
    thread = threading.Thread(target=worker.serve)
    thread.start()
    try:
        with grpc.insecure_channel(f"unix:{tmp_path}/s/w.sock") as channel:
            for size, said in ((1 << 20) + 1, "RESOURCE_EXHAUSTED"), (1 << 10, "FAILED_PRECONDITION"):
                with pytest.raises(grpc.RpcError) as error:
                    channel.unary_unary(METHOD)(b"x" * size, wait_for_ready=True, timeout=60)
                assert error.value.code().name == said
    finally:
        worker.stop()
        thread.join()
    assert [line.get("bytes") for line in lines(folder) if line["event"] == "request"] == [1 << 10]


def test_an_error_that_nobody_foresaw_is_written_too(
    own: MakeConfig, site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(message: Message, context: Context) -> Message:
        raise ZeroDivisionError

    folder = site()
    monkeypatch.setattr(client_app, "app", breaks)
    with pytest.raises(RuntimeError, match="see its own log"):
        train_one(folder, own())
    assert [line["event"] for line in lines(folder)] == ["request", "answer"]


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("room", [0, 1])
def test_nothing_is_answered_that_cannot_be_written_down(
    own: MakeConfig, site: MakeSite, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    folder, config, asked, written = site(), own(), list[str](), list[int]()
    real_write, real_app = os.write, client_app.app

    def full(fd: int, data: bytes) -> int:
        written.append(fd)
        if len(written) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(fd, data)

    def app(message: Message, context: Context) -> Message:
        asked.append(message.metadata.message_type)
        return real_app(message, context)

    content = request(config)
    monkeypatch.setattr(client_app, "app", app)
    with monkeypatch.context() as patch:
        patch.setattr(hash_chain.os, "write", full)
        refused = ask(folder, config, "train", content)
    assert error_of(refused) == UNLOGGED
    assert list(refused) == ["reply"]
    assert asked == ["train"] * room
    assert len(lines(folder)) == room
    assert decode_head(ask(folder, config, "train", content))["kind"] == "update"


# ------------------------------------------------------------------------------------------------ the ledger


@pytest.mark.slow
def test_a_site_notices_that_its_ledger_was_rolled_back_whoever_asks(own: MakeConfig, site: MakeSite) -> None:
    config, folder = own(*PRIVATE), site()
    path = folder / "ledger.jsonl"
    train_one(folder, config)
    older = path.read_bytes()
    train_one(folder, config, 2)
    newer = path.read_bytes()
    for content in (older, b""):
        path.write_bytes(content)
        for kind in (request(config, 2), request(config, 1)):
            assert "rolled back" in error_of(ask(folder, config, "train", kind))
        assert path.read_bytes() == content
    path.write_bytes(newer)
    assert decode_head(train_one(folder, config, 2))["kind"] == "update"


@pytest.mark.slow
def test_a_ledger_put_back_is_found_by_the_log_and_put_back_with_the_log_by_the_coordinator(
    own: MakeConfig, site: MakeSite
) -> None:
    fixed = [one for one in PRIVATE if not one.startswith("privacy.epsilon")]
    keys = (*fixed, "privacy.noise_multiplier=1.0", "evaluation.on=off", "data.test=", "partition.clients=3")
    config, sites = own(*keys, "server.node_timeout_s=1", "server.quorum=0.3"), [site(k) for k in range(3)]
    apps: dict[int, ClientApp] = {k: GatedApp(folder) for k, folder in enumerate(sites, start=2)}
    older: dict[Path, bytes] = {}

    class Copying(Callback):
        def round_ended(self, record: Mapping[str, Any]) -> None:
            if record["round"] == 1:
                paths = (sites[0] / "ledger.jsonl", sites[1] / "ledger.jsonl", sites[1] / AUDIT_LOG)
                older.update({path: path.read_bytes() for path in paths})

    client_app.held_parts = HeldParts()
    rundir = RunDir.create(config)
    with task_identity(1):
        serve(LoopbackGrid(ByNode(apps), [{}] * 3, {"toml": config.to_toml()}), config, rundir, Copying(), resume=False)
    for path, content in older.items():
        path.write_bytes(content)
    apps[3] = GatedApp(sites[1])  # a worker knows the head of its log for as long as it lives
    again = own(*keys, "server.node_timeout_s=1", "server.quorum=0.3", "rounds=3")
    with task_identity(2):
        grid = LoopbackGrid(ByNode(apps), [{}] * 3, {"toml": again.to_toml()})
        last = serve(grid, again, RunDir.open(rundir.path, again), resume=True).records[-1]
    assert last["answered"] == [2]
    # Who the second node is, a hello does not tell where no key is registered: it refuses the request.
    assert "rolled back" in next(iter(last["turned_away"].values()))
    assert "rolled back" in last["refused"]["1"]
    assert ["ledger_not_usable" in lines(folder)[-1] for folder in sites] == [True, False, False]


def test_a_worker_does_not_start_on_a_log_that_was_edited(own: MakeConfig, site: MakeSite) -> None:
    folder = site()
    train_one(folder, own())
    path = folder / AUDIT_LOG
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":2'))
    with raises(DeployError, "log-damaged", path, "line 1 "):
        GatedApp(folder)
    assert len(read_chain(path.read_bytes().replace(b'"round":2', b'"round":1')).records) == 2


# ------------------------------------------------------------------------------------------------ signers


def ask_signed(folder: Path, config: RunConfig, signature: str) -> str:
    """What is said to the run: "update", or the error."""
    with task_identity(7, 9):
        message = Message(request(config), 9, "train", ttl=600.0)
        context = Context(7, 9, {}, RecordDict(), {"toml": config.to_toml(), "signature": signature})
        head = decode_head(GatedApp(folder)(message, context).content)
    return str(head.get("error", head["kind"]))


def signed(config: RunConfig, until: datetime.date = TODAY, code: str = "") -> str:
    return sign(Statement(config_hash(config), code or code_digest(), until), KEY)


UNSIGNED: dict[str, tuple[str, Callable[[RunConfig], str], str]] = {
    "missing": ("", lambda config: "", "not signed"),
    "of another config": ("", lambda config: signed(config.model_copy(update={"seed": 9})), "another config"),
    "of the past": ("", lambda config: signed(config, TODAY - DAY), "valid until"),
    "of another fedlora": ("", lambda config: signed(config, code="0" * 16), "another fedlora"),
    "changed": ("", lambda config: signed(config)[:-8] + "AAAAAA==", "none of the signers"),
    "of an expired key": (f'valid-before="{TODAY:%Y%m%d}" ', signed, "is valid before"),
}


@pytest.mark.parametrize("name", UNSIGNED)
def test_a_run_without_a_signature_that_counts_is_refused(own: MakeConfig, site: MakeSite, name: str) -> None:
    option, signature, why = UNSIGNED[name]
    config, folder = own(), site(signers=[f"ada {option}{public_line(KEY)}"])
    assert ask_signed(folder, config, signature(config)) == refusal("signers")
    (line,) = lines(folder)[1:]
    assert line["refused"] == "signers"
    assert why in line["why"]


def test_a_signed_run_is_answered_and_its_signer_written_down(own: MakeConfig, site: MakeSite) -> None:
    config = own()
    folder = site(signers=[f'ada valid-before="{TODAY + DAY:%Y%m%d}" {public_line(KEY)}'])
    assert ask_signed(folder, config, signed(config)) == "update"
    assert lines(folder)[1]["signer"] == "ada"
    other = own("train.lr=0.02")
    assert ask_signed(folder, other, signed(config)) == refusal("signers")
