"""A local stand-in of the part of the Hugging Face hub's HTTP API that an upload uses, large files included."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Hub:
    """What was uploaded.

    Attributes:
        url: Of the server.
        repos: Name -> path -> content.
        private: Names of the repositories that were made private.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if method == "PUT":  # the address of a large file, which carries its own permission
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/validate-yaml":
            ok = "license:" in json.loads(body)["content"]
            return (200, {"errors": [], "warnings": []}) if ok else (400, {"errors": [{"message": "no license"}]})
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if name.startswith("taken/"):
                return 403, {"error": "You don't have the rights to create a model under the namespace"}
            self.repos.setdefault(name, {})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.private.add(name)
            return 200, {"url": f"{self.url}/{name}"}
        name = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.url}/large/{one['oid']}", "header": {}}}
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    assert value["encoding"] == "base64"
                    self.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content = self.large[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    self.repos[name][value["path"]] = content
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}"}
        return 200, {}


@contextmanager
def hub() -> Iterator[Hub]:
    """One that listens while it lasts."""
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            status, content = found.answer(self.command, self.path, self.headers, body)
            said = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = _any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
