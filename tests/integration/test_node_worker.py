"""A worker answers as the node's own process would, to the byte, and nobody else can be at either end of its socket."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from support.errors import raises
from support.tiny_federations import MakeConfig
from support.waiting import until

import fedlora
from fedlora.aggregators import load_aggregator
from fedlora.config import RunConfig
from fedlora.errors import WorkerError
from fedlora.federation.client_pool import ClientInfo, RoundRequest
from fedlora.federation.planner import Held, Planner
from fedlora.flower import client_app
from fedlora.flower.messages import RequestEncoder, decode_head
from fedlora.flower.task_identity import task_identity
from fedlora.hashing import code_digest
from fedlora.node_worker import client, server, supervisor
from fedlora.node_worker import node_app as node_app_module
from fedlora.node_worker.client import ask, check
from fedlora.node_worker.frames import pack, unpack
from fedlora.node_worker.node_app import app as node_app
from fedlora.node_worker.server import BROKEN, Worker
from fedlora.node_worker.socket import make_folder, named_by, require_own
from fedlora.node_worker.supervisor import supervise
from fedlora.privacy.ledger import Ledger
from fedlora.programs import Guard
from fedlora.training.workspace import open_workspace


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, closed to others, and thrown away: a socket's path has 100 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="fedlora-") as name:
        yield Path(name)


def plan(config: RunConfig, client_id: int = 0) -> RecordDict:
    """What the server sends to a client in round 1."""
    workspace, rule = open_workspace(config), load_aggregator(config.strategy.name)
    state = rule.init(workspace.base.initial_adapter(config.seed), seed=1)
    round_1 = RoundRequest(1, [client_id], state)
    planned = Planner(config, rule, workspace, run="ab" * 16).request(round_1, ClientInfo(client_id), Held())
    return RequestEncoder().encode(planned)


def message_of(content: RecordDict, kind: str = "train") -> Message:
    with task_identity(7, 9):
        return Message(content, 9, kind, ttl=600.0)


def context_of(config: RunConfig, **node: Any) -> Context:
    return Context(7, 9, {"partition-id": 0, "num-partitions": 4, **node}, RecordDict(), {"toml": config.to_toml()})


def as_bytes(content: RecordDict) -> bytes:
    """All of a reply but how long it took."""
    for record in content.metric_records.values():
        for name in [name for name in record if "seconds" in name]:
            del record[name]
    return pack({}, content=content)


class Serving:
    """A worker on a thread of this process."""

    def __init__(self, path: Path, **kwargs: Any) -> None:
        self.worker = Worker(path, **kwargs)
        self.status: int | None = None
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        self.status = self.worker.serve()

    def __enter__(self) -> Serving:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


def query_app(answer: Callable[[Message, Context], RecordDict]) -> ClientApp:
    app = ClientApp()

    @app.query("it")
    def it(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    return app


QUESTION = RecordDict({"q": ConfigRecord({"a": 1})})


# ------------------------------------------------------------------------------------------------ frames


def test_a_frame_gives_back_every_record() -> None:
    content = RecordDict(
        {
            "arrays": ArrayRecord(
                {"x": Array("float32", (2, 0), "s", b""), "y": Array("int8", (3,), "t", b"\0\xff\n")}
            ),
            "more": ArrayRecord({}),
            "config": ConfigRecord(
                {"s": "ä\ud800\n", "b": b"\0\xfe", "l": [b"a", b""], "i": 2**40, "f": 0.1, "t": True, "e": ["x"]}
            ),
            "metrics": MetricRecord({"i": 7, "f": 7.0, "l": [0.5, float("inf")]}),
        }
    )
    head, contents = unpack(pack({"n": [1, None]}, one=content, two=RecordDict()))
    assert head == {"n": [1, None]}
    assert contents["one"] == content
    assert list(contents["one"]) == list(content)
    assert type(contents["one"].metric_records["metrics"]["f"]) is float
    assert contents["two"] == RecordDict()


@pytest.mark.parametrize("cut", [0, 5, 30, -1])
def test_half_a_frame_is_none(cut: int) -> None:
    whole = pack({}, one=RecordDict({"a": ArrayRecord({"x": Array("float32", (1,), "s", b"1234")})}))
    with pytest.raises(ValueError, match=r"."):
        unpack(whole[:cut])


# ------------------------------------------------------------------------------------------------ the socket


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770])
def test_a_folder_that_others_can_enter_is_refused_at_both_ends(folder: Path, mode: int) -> None:
    path = folder / "in" / "w.sock"
    with Serving(path, app=query_app(lambda message, context: RecordDict())):
        check(path)
        path.parent.chmod(mode)
        with raises(WorkerError, "open-to-others", "chmod 700"):
            check(path)
    with raises(WorkerError, "open-to-others", "chmod 700"):
        Worker(path)


@pytest.mark.parametrize(("mode", "free"), [(0o777, False), (0o702, False), (0o1777, True), (0o755, True)])
def test_a_folder_that_others_could_replace_is_refused_at_both_ends(folder: Path, mode: int, free: bool) -> None:
    above = folder / "above"
    path = above / "in" / "w.sock"
    make_folder(path)
    with Serving(path, app=query_app(lambda message, context: RecordDict())):
        above.chmod(mode)
        for through in (path, folder / "link" / "in" / "w.sock"):
            if not (folder / "link").is_symlink():
                (folder / "link").symlink_to(above)
            if free:
                require_own(through)
                make_folder(through)
                continue
            for check_of in (require_own, make_folder):
                with raises(WorkerError, "open-to-others", "above", "chmod go-w"):
                    check_of(through)
    above.chmod(0o700)


def test_somebody_elses_folder_or_socket_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "w.sock"
    with Serving(path):
        require_own(path)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with raises(WorkerError, "other-owner", "folder"):
            require_own(path)
        with raises(WorkerError, "other-owner", "folder"):
            make_folder(path)
        real = Path.lstat
        owned = os.stat_result((0o40700, 0, 0, 0, 12345, 0, 0, 0, 0, 0))
        monkeypatch.setattr(Path, "lstat", lambda self: owned if self == folder else real(self))
        with raises(WorkerError, "other-owner", "socket"):
            require_own(path)


def test_what_is_no_socket_or_no_folder_is_refused(folder: Path) -> None:
    (folder / "file").touch()
    with raises(WorkerError, "not-a-socket"):
        require_own(folder / "file")
    with raises(WorkerError, "no-socket"):
        require_own(folder / "nothing")
    (folder / "link").symlink_to(folder)
    with raises(WorkerError, "not-a-folder"):
        make_folder(folder / "link" / "w.sock")
    with raises(WorkerError, "path-too-long", 100):
        make_folder(folder / ("x" * 100))


def test_the_folder_and_the_socket_are_the_users_alone(folder: Path) -> None:
    path = folder / "new" / "w.sock"
    with Serving(path):
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_one_worker_serves_a_socket_and_a_killed_ones_socket_is_taken_over(folder: Path) -> None:
    path = folder / "w.sock"
    with Serving(path), raises(WorkerError, "socket-in-use", path):
        Worker(path)
    path.touch()  # what a killed worker leaves
    with Serving(path):
        check(path)


def test_a_node_names_its_worker_in_its_config_or_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_by({"partition-id": 0}) is None
    monkeypatch.setenv("FEDLORA_WORKER", "/a/b.sock")
    assert named_by({}) == Path("/a/b.sock")
    assert named_by({"worker": "/c/d.sock"}) == Path("/c/d.sock")


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fedavg", "ffa", "flora"])
def test_the_workers_reply_is_that_of_the_nodes_own_process(
    tiny_config: MakeConfig, folder: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(node_app_module.logger, "warning", lambda text, *values: said.append(text % values))
    config = tiny_config(f"strategy.name={rule}", "wire.up=int8")
    path = folder / "w.sock"
    alone = node_app(message_of(plan(config)), context_of(config))
    with Serving(path):
        helped = node_app(message_of(plan(config)), context_of(config, worker=str(path)))
    assert not said
    fallen_back = node_app(message_of(plan(config)), context_of(config, worker=str(path)))
    assert said == [f"there is no worker's socket at '{path}' (No such file or directory); this process does the work"]
    assert decode_head(alone.content)["kind"] == "update"
    assert as_bytes(helped.content) == as_bytes(alone.content) == as_bytes(fallen_back.content)
    assert helped.metadata.message_type == alone.metadata.message_type
    assert helped.metadata.dst_node_id == alone.metadata.dst_node_id


def test_errors_of_fedlora_pass_through_as_notes(tiny_config: MakeConfig, folder: Path) -> None:
    config = tiny_config()
    path = folder / "w.sock"
    with Serving(path):
        reply = node_app(message_of(plan(config, client_id=1)), context_of(config, worker=str(path)))
    assert "the plan is for client 1" in decode_head(reply.content)["error"]


def test_the_nodes_state_goes_there_and_back(folder: Path, tiny_config: MakeConfig) -> None:
    def answer(message: Message, context: Context) -> RecordDict:
        context.state["seen"] = MetricRecord({"n": context.state.metric_records["seen"]["n"] + 1})
        context.state["new"] = ConfigRecord({"who": f"{context.run_id} {context.node_id} {dict(context.node_config)}"})
        del context.state["old"]
        return RecordDict()

    context = context_of(tiny_config())
    context.state.update({"seen": MetricRecord({"n": 1}), "old": ConfigRecord()})
    with Serving(folder / "w.sock", app=query_app(answer)):
        ask(folder / "w.sock", message_of(QUESTION, "query.it"), context)
    assert set(context.state) == {"seen", "new"}
    assert context.state.metric_records["seen"]["n"] == 2
    assert context.state.config_records["new"]["who"] == "7 9 {'partition-id': 0, 'num-partitions': 4}"


def test_a_worker_with_a_device_computes_there(folder: Path, tiny_config: MakeConfig) -> None:
    seen: list[tuple[str, bool]] = []

    def answer(message: Message, context: Context) -> RecordDict:
        seen.append((client_app.config_of(context).runtime.device, "device" in context.node_config))
        return RecordDict()

    for device in (None, "cuda:3"):
        with Serving(folder / "w.sock", app=query_app(answer), device=device):
            ask(folder / "w.sock", message_of(QUESTION, "query.it"), context_of(tiny_config("runtime.device=cpu")))
    assert seen == [("cpu", False), ("cuda:3", False)]


def test_a_config_file_of_the_apps_folder_reaches_the_worker_as_text(
    folder: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[RunConfig] = []

    def answer(message: Message, context: Context) -> RecordDict:
        read.append(client_app.config_of(context))
        return RecordDict()

    (folder / "mine.toml").write_text("seed = 5\n")
    monkeypatch.chdir(folder)
    context = Context(7, 9, {"partition-id": 0}, RecordDict(), {"config": "mine.toml", "set": "rounds=77", "x": True})
    with Serving(folder / "w.sock", app=query_app(answer)):
        ask(folder / "w.sock", message_of(QUESTION, "query.it"), context)
    assert (read[0].name, read[0].seed, read[0].rounds) == ("mine", 5, 77)


def test_a_worker_of_other_code_is_not_used(
    folder: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = query_app(lambda message, context: RecordDict())
    with Serving(folder / "w.sock", app=app):
        monkeypatch.setattr(client, "code_digest", lambda: "other")
        with raises(WorkerError, "other-version", "(source other)", "restart the worker"):
            ask(folder / "w.sock", message_of(QUESTION, "query.it"), context_of(tiny_config()))
        monkeypatch.undo()
        ask(folder / "w.sock", message_of(QUESTION, "query.it"), context_of(tiny_config()))


def test_an_unexpected_error_is_passed_on_and_ends_the_worker(folder: Path, tiny_config: MakeConfig) -> None:
    def answer(message: Message, context: Context) -> RecordDict:
        raise ZeroDivisionError("boom")

    with Serving(folder / "w.sock", app=query_app(answer)) as serving:
        with pytest.raises(RuntimeError, match="the worker failed: ZeroDivisionError: boom"):
            ask(folder / "w.sock", message_of(QUESTION, "query.it"), context_of(tiny_config()))
        serving.thread.join(30)
    assert serving.status == BROKEN
    with raises(WorkerError, "no-socket"):
        check(folder / "w.sock")


def test_requests_are_done_one_at_a_time_and_a_stopping_worker_begins_no_other(
    folder: Path, tiny_config: MakeConfig
) -> None:
    begun, may_end, done = threading.Event(), threading.Event(), []

    def answer(message: Message, context: Context) -> RecordDict:
        done.append(message.content.config_records["q"]["a"])
        begun.set()
        assert may_end.wait(30)
        return RecordDict()

    results: dict[int, object] = {}

    def request(number: int) -> None:
        content = RecordDict({"q": ConfigRecord({"a": number})})
        try:
            results[number] = ask(path, message_of(content, "query.it"), context_of(config))
        except WorkerError as error:
            results[number] = error

    path, config = folder / "w.sock", tiny_config()
    threads = [threading.Thread(target=request, args=(number,)) for number in (1, 2)]
    with Serving(path, app=query_app(answer)) as serving:
        threads[0].start()
        assert begun.wait(30)
        threads[1].start()
        until(lambda: not serving.worker._jobs.empty())
        check(path)  # the health service does not wait
        serving.worker.stop()
        may_end.set()
        for thread in threads:
            thread.join(30)
    assert done == [1]
    assert results[1] == RecordDict()
    assert isinstance(results[2], WorkerError)


@pytest.mark.slow
def test_the_nodes_app_imports_nothing_heavy() -> None:
    code = (
        "import sys, fedlora.node_worker.node_app, fedlora.node_worker.client, fedlora.node_worker.supervisor\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'opacus', 'datasets', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


@pytest.mark.slow
def test_the_digest_of_the_code_is_that_of_fedlora_alone(tmp_path: Path) -> None:
    """In any place, whatever else is installed beside it, and of every file of it."""
    assert len(code_digest()) == 16
    assert server.code_digest() == code_digest()
    code = "from fedlora.hashing import code_digest; print(code_digest())"
    shutil.copytree(Path(fedlora.__file__).parent, tmp_path / "fedlora", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "beside.py").write_text("1")

    def of_copy() -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert of_copy() == code_digest()
    (tmp_path / "fedlora" / "rng.py").write_text((tmp_path / "fedlora" / "rng.py").read_text() + "\n")
    assert of_copy() != code_digest()


# ------------------------------------------------------------------------------------------------ the supervisor


def test_a_supervisor_starts_again_what_died_and_waits_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "WAIT_S", (0.01, 0.02))
    said: list[str] = []
    script = (
        f"echo x >> {tmp_path}/lives; case $(wc -l < {tmp_path}/lives) in 1) kill -9 $$;; 4) exit 0;; *) exit 70;; esac"
    )
    assert supervise(["sh", "-c", script], said.append) == 0
    assert said == [
        "the worker was killed by signal 9; starting it again in 0.01 s",
        "the worker ended with status 70; starting it again in 0.02 s",
        "the worker ended with status 70; starting it again in 0.02 s",
    ]


def test_a_supervisor_does_not_repeat_a_mistake() -> None:
    said: list[str] = []
    assert supervise(["sh", "-c", "exit 1"], said.append) == 1
    assert not said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_supervisor_that_is_ended_asks_its_program_to_end(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    trap = f"trap 'echo told > {tmp_path}/told; kill $!; exit 0' TERM; sleep 30 & sleep 0.3"
    script = f"{trap}; kill -{int(number)} {os.getpid()}; wait"
    assert supervise(["sh", "-c", script], print) == 0
    assert (tmp_path / "told").exists()
    assert signal.getsignal(number) is before


@pytest.mark.slow
def test_the_command_line_says_whether_a_worker_serves(folder: Path) -> None:
    words = [sys.executable, "-m", "fedlora", "worker", "--check", "--socket", str(folder / "w.sock")]
    nobody = subprocess.run(words, capture_output=True, text=True)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr.startswith("error: there is no worker's socket")
    with Serving(folder / "w.sock"):
        somebody = subprocess.run(words, capture_output=True, text=True)
    assert (somebody.returncode, somebody.stdout) == (0, f"a worker serves {folder}/w.sock\n")


# ------------------------------------------------------------------------------------------------ real processes

ONE_MESSAGE = """
import logging, sys
from pathlib import Path
from flwr.app import Context, Message
from fedlora.flower.task_identity import task_identity
from fedlora.node_worker.node_app import app
from fedlora.node_worker.frames import pack, unpack

head, contents = unpack(Path(sys.argv[1]).read_bytes())
with task_identity(7, 9):
    message = Message(contents["content"], 9, "train", ttl=600.0)
    reply = app(message, Context(7, 9, head["node"], contents["state"], head["run"]))
Path(sys.argv[2]).write_bytes(pack({"torch": "torch" in sys.modules}, content=reply.content))
"""


class Node:
    """Starts a process for a message, as Flower does, and a worker beside it."""

    def __init__(self, folder: Path, config: RunConfig, **node: Any) -> None:
        self.folder, self.socket = folder, folder / "w.sock"
        content = plan(config)
        head = {
            "node": {"partition-id": 0, "num-partitions": 4, "worker": str(self.socket), **node},
            "run": {"toml": config.to_toml()},
        }
        (folder / "in").write_bytes(pack(head, content=content, state=RecordDict()))
        self.worker: subprocess.Popen[bytes] | None = None

    def start_worker(self, *words: str) -> None:
        command = [sys.executable, "-m", "fedlora", "worker", "--socket", self.socket, *words]
        self.worker = subprocess.Popen(command, start_new_session=True)
        self.guard = Guard()
        self.guard.watch(self.worker)
        self.wait()

    def wait(self) -> None:
        def serves() -> bool:
            try:
                check(self.socket)
            except WorkerError:
                return False
            return True

        until(serves)

    def begin(self) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", ONE_MESSAGE, str(self.folder / "in"), str(self.folder / "out")]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    def end(self, process: subprocess.Popen[str]) -> tuple[RecordDict, bool, str]:
        """The reply, whether this process did the work itself, and what it said."""
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        head, contents = unpack((self.folder / "out").read_bytes())
        return contents["content"], head["torch"], said

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.terminate()
            self.worker.wait(60)
            self.guard.close()


@pytest.mark.slow
def test_with_a_worker_without_and_after_its_death_the_bytes_are_the_same(
    tiny_config: MakeConfig, folder: Path
) -> None:
    node = Node(folder, tiny_config())
    try:
        node.start_worker("--supervise")
        first, itself, _ = node.end(node.begin())
        assert not itself
        again, itself, _ = node.end(node.begin())  # nothing of the first message is left in the worker
        assert not itself
        assert node.worker is not None
        before = pid_of_the_worker(node.socket)
        node.worker.send_signal(signal.SIGSTOP)  # the supervisor starts no other before the message was answered
        os.kill(before, signal.SIGKILL)
        alone, itself, said = node.end(node.begin())
        node.worker.send_signal(signal.SIGCONT)
        assert itself
        assert "this process does the work" in said
        node.wait()  # the supervisor started another
        assert pid_of_the_worker(node.socket) != before
        helped, itself, _ = node.end(node.begin())
        assert not itself
    finally:
        node.stop()
    assert len({as_bytes(content) for content in (first, again, alone, helped)}) == 1
    assert not node.socket.exists()


@pytest.mark.nightly
def test_a_worker_that_dies_in_the_middle_costs_no_second_charge(tiny_config: MakeConfig, folder: Path) -> None:
    config = tiny_config(
        *("server.weighting=uniform", "train.steps=400", "train.batch_size=20", "privacy.public_examples=40"),
        *("privacy.delta=1e-3", "privacy.max_grad_norm=0.5", "privacy.accountant=rdp", "privacy.noise_multiplier=9.0"),
    )
    path = folder / "ledger.jsonl"
    node = Node(folder, config, ledger=str(path))
    try:
        node.start_worker()
        process = node.begin()
        until(lambda: process.poll() is not None or (path.exists() and "started" in path.read_text()))
        assert process.poll() is None, node.end(process)
        assert node.worker is not None
        node.worker.kill()
        assert "released" not in path.read_text()
        reply, itself, said = node.end(process)
    finally:
        node.stop()
    assert decode_head(reply)["kind"] == "update"
    assert itself
    assert "this process does the work" in said
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert events == ["started", "void", "started", "released"]
    (entry,) = Ledger(path).entries()
    assert entry.steps == 400


def pid_of_the_worker(socket: Path) -> int:
    """Of the process that holds the socket's lock: the supervisor's child."""
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "FLOCK" in fields and int(fields[-3].split(":")[-1]) == socket.with_name("w.sock.lock").stat().st_ino:
            return int(fields[-4])
    raise AssertionError("nobody holds the lock")


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in this process changes its folder and environment."""
    monkeypatch.setenv("FEDLORA_WORKER", "")
    monkeypatch.chdir(Path.cwd())
    assert torch.get_num_threads() == 1
