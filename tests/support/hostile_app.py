"""What a coordinator's app may try on a node, started in the SuperExec's place: python hostile_app.py FACTS.

FACTS is a JSON file: "socket", "worker" (its process), "files" (what the app must not read), "folders" (where it must
not write), "config" (TOML of a run that the policy allows), "open" (of one that it does not), "marker" (a file that
exists only if code of the app ran in the worker), "home" (the app's own folder) and "request" (a frame, made by
`fedlora.node_worker.frames.pack`, with the content of a request to train). Prints a JSON object, attempt -> outcome;
whatever bytes came back are in home/loot.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import tomli_w
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import fedlora
from fedlora import __version__
from fedlora.flower.arrays import to_array
from fedlora.flower.messages import decode_head, encode_note
from fedlora.hashing import code_digest
from fedlora.node_worker.frames import pack, unpack
from fedlora.node_worker.socket import METHOD, UNLIMITED

FACTS: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
HOME = Path(FACTS["home"])
OUTCOMES: dict[str, Any] = {}
TRAIN = unpack(Path(FACTS["request"]).read_bytes())[1]["content"]


def loot(data: object) -> None:
    with (HOME / "loot").open("ab") as file:
        file.write(data if isinstance(data, bytes) else repr(data).encode())


def attempt(name: str, act: Callable[[], Any]) -> None:
    try:
        found = act()
        loot(found)
        OUTCOMES[name] = found if isinstance(found, str | dict) else f"got {found!r}"
    except Exception as error:
        OUTCOMES[name] = f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------------------------------------ this machine


def files() -> None:
    for path in FACTS["files"]:
        attempt(f"read {path}", lambda path=path: Path(path).read_bytes())
    for path in FACTS["folders"]:
        attempt(f"write in {path}", lambda path=path: (Path(path) / "evil.py").write_text("raise SystemExit"))
        attempt(f"list {path}", lambda path=path: sorted(os.listdir(path)))
    package = Path(fedlora.__file__).parent
    attempt("write in fedlora", lambda: (package / "evil.py").write_text("raise SystemExit"))
    attempt("list fedlora", lambda: sorted(os.listdir(package)))
    path, other = FACTS["socket"], f"{FACTS['socket']}.other"
    attempt("replace the socket", lambda: os.rename(path, other))
    attempt("remove the socket", lambda: os.unlink(path))
    attempt("take the lock", lambda: os.open(f"{path}.lock", os.O_RDWR))
    pid = FACTS["worker"]
    for name in ("environ", "mem", "root", "cwd", "fd", "maps"):
        attempt(f"look at the worker's {name}", lambda name=name: looked(Path(f"/proc/{pid}/{name}")))
    attempt("kill the worker", lambda: os.kill(pid, signal.SIGKILL))
    attempt("become root", lambda: os.setuid(0))


def looked(path: Path) -> object:
    if path.name in ("root", "cwd"):
        return os.listdir(path)
    return os.listdir(path) if path.is_dir() else path.open("rb").read(1)


# ------------------------------------------------------------------------------------------------ the socket


def head(config: str = FACTS["config"], **changed: Any) -> dict[str, Any]:
    said = {
        "fedlora": __version__,
        "code": code_digest(),
        "folder": str(HOME),
        "threads": "1",
        "type": "train",
        "run_id": 7,
        "node_id": 9,
        "node_config": {},
        "run_config": {"toml": config},
    }
    return {**said, **changed}


def ask(frame: bytes, method: str = METHOD) -> bytes:
    with grpc.insecure_channel(f"unix:{FACTS['socket']}", options=UNLIMITED) as channel:
        try:
            answer: bytes = channel.unary_unary(method)(frame, timeout=300, wait_for_ready=True)
        except grpc.RpcError as error:
            loot(error.details())
            raise RuntimeError(f"{error.code().name} {error.details()}") from None
    loot(answer)
    return answer


def answered(config: str = FACTS["config"], content: RecordDict = TRAIN, **changed: Any) -> dict[str, Any]:
    """The head of the answer, and the names of all that came with it."""
    found = unpack(ask(pack(head(config, **changed), content=content, state=RecordDict())))[1]["content"]
    figures = sorted(name for record in found.metric_records.values() for name in record)
    return {**decode_head(found), "records": sorted(found), "figures": figures}


def asked_with(**changed: Any) -> Callable[[], Any]:
    """A request to train with other keys in the run's config: table__key=value, or table=the whole."""
    tree = tomllib.loads(FACTS["config"])
    for name, value in changed.items():
        table, _, key = name.partition("__")
        if key:
            tree[table][key] = value
        else:
            tree[table] = value
    return lambda: answered(tomli_w.dumps(tree))


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {FACTS['marker']}",)


def requests() -> None:
    question = RecordDict({"hello": ConfigRecord({"fedlora": __version__})})
    attempt("hello", lambda: answered(content=question, type="query.hello"))
    attempt("a private round", answered)
    attempt("a run without privacy", lambda: answered(FACTS["open"]))
    attempt("evaluate without privacy", lambda: answered(FACTS["open"], type="evaluate"))
    attempt("a larger epsilon", asked_with(privacy__epsilon=1000.0))
    attempt("a larger delta", asked_with(privacy__delta=0.01))
    attempt("another column", asked_with(data__text="diagnosis"))
    said = json.loads(str(TRAIN.config_records["plan"]["json"]))
    parts = RecordDict({**TRAIN, "plan": ConfigRecord({"json": json.dumps({**said, "parts": ["test"]})})})
    attempt("evaluate", lambda: answered(content=parts, type="evaluate"))
    attempt("another message", lambda: answered(type="query.secret"))
    attempt("a message of nothing known", lambda: answered(type=""))


def paths() -> None:
    (HOME / "theirs.csv").write_text("text,label\na,positive\n")
    theirs = {"partition-id": 1, "data": f"{HOME}/theirs.csv", "ledger": f"{HOME}/ledger.jsonl", "worker": "/x"}
    attempt("facts of another node", lambda: answered(node_config=theirs))
    more = {"toml": FACTS["config"], "ledger-dir": str(HOME), "set": "privacy.epsilon=1000", "config": "/etc/passwd"}
    attempt("another ledger", lambda: answered(run_config=more))
    for number, path in enumerate(("/etc", FACTS["files"][0], "../..", str(HOME), "~root", ".")):
        attempt(f"a model at path {number}", asked_with(model__name=path))
        attempt(f"data at path {number}", asked_with(data__source=path, partition={"name": "iid"}))
    attempt("data of its own", asked_with(data__own=FACTS["files"][0]))


def code() -> None:
    (HOME / "evil.py").write_text(f"import pathlib; pathlib.Path({FACTS['marker']!r}).touch()\n")
    (HOME / "sitecustomize.py").write_text((HOME / "evil.py").read_text())
    os.chdir(HOME)
    evil = {"name": "evil:Mine"}
    for table in ("task", "strategy", "partition"):
        attempt(f"{table} by name", asked_with(**{table: evil}))
    attempt("a rule within a rule", asked_with(strategy={"name": "krum", "inner": evil}))
    attempt("a source by name", asked_with(data__source="evil:Mine", partition={"name": "iid"}))
    attempt("a program of this machine", asked_with(task={"name": "os:system"}))
    attempt("code of the model's", asked_with(model__trust_remote_code=True))


def rubbish() -> None:
    attempt("a pickle", lambda: ask(pickle.dumps(Evil())))
    arrays = {"numpy.ndarray": pickle.dumps(Evil()), "fedlora.buffer.v1": pickle.dumps(Evil())}
    for stype, data in arrays.items():
        evil = RecordDict({**TRAIN, "arrays": ArrayRecord({"adapter": Array("uint8", (len(data),), stype, data)})})
        attempt(f"a pickle as {stype}", lambda evil=evil: answered(content=evil))
    plain = RecordDict(
        {"arrays": ArrayRecord({"x.lora_A.weight": Array("object", (1,), "numpy.ndarray", arrays["numpy.ndarray"])})}
    )
    attempt("a pickle as a plain array", lambda: answered(content=plain))
    whole = pack(head(), content=TRAIN, state=RecordDict())
    attempt("half a frame", lambda: ask(whole[: len(whole) // 2]))
    attempt("a frame of nothing", lambda: ask(b""))
    attempt("a deep frame", lambda: ask((100_008).to_bytes(8, "little") + b"[" * 100_008))
    attempt("a frame that announces all memory", lambda: ask((1 << 62).to_bytes(8, "little") + b"{}"))
    attempt("a huge frame", lambda: ask(b"\0" * (8 << 20)))
    attempt(
        "a frame of other types", lambda: ask(pack(head(run_id="x", run_config=[1]), content=TRAIN, state=RecordDict()))
    )
    attempt("a config that is no text", lambda: answered(run_config={"toml": 7}))
    attempt("a long config", lambda: answered("x" * (1 << 20)))
    attempt("another method", lambda: ask(whole, "/fedlora.Worker/Policy"))
    attempt("a note as a request", lambda: answered(content=encode_note("hello", client_id=0)))
    head_of = json.loads(str(TRAIN.config_records["plan"]["json"]))
    for key, value in (("layout", {"x": [1]}), ("round", "1"), ("buffers", 7), ("merges", [{}]), ("run", "../../etc")):
        changed = ConfigRecord({"json": json.dumps({**head_of, key: value})})
        attempt(
            f"a request with another {key}",
            lambda changed=changed: answered(content=RecordDict({**TRAIN, "plan": changed})),
        )
    short = RecordDict({**TRAIN, "arrays": ArrayRecord({"adapter": to_array(b"1234")})})
    attempt("a request with another buffer", lambda: answered(content=short))


def many_connections() -> None:
    """As many as this process may open, all silent; whoever comes then is answered."""
    held = []
    with contextlib.suppress(OSError):
        for _ in range(200):
            held.append(socket.socket(socket.AF_UNIX))
            held[-1].connect(FACTS["socket"])
    attempt("beside silent connections", answered)
    for one in held:
        one.close()


if __name__ == "__main__":
    for part in (files, requests, paths, code, rubbish, many_connections):
        part()
    print(json.dumps(OUTCOMES))
