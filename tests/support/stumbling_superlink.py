"""A SuperLink that stumbles: chosen calls of its API fail, in a real process of Flower's own.

`Stumbles` writes a module that every Python of the coordinator imports first; in the SuperLink's process it stands
before the API. Which calls fail, and how, is in a file that is read at each call, so that a test can change it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

OK = "ok"
KINDS = ("500", "503", "lost", "broken")
"""500 and 503: nothing was done. lost: the call was carried out, its answer is a 500. broken: carried out, and the
connection breaks in the middle of the answer."""

PATCH = """
import json, os, pathlib, sys, threading

if any("flower-superlink" in word for word in sys.orig_argv):
    import fastapi

    folder, counts, answer = pathlib.Path(os.environ["STUMBLES"]), {}, fastapi.FastAPI.__call__

    async def stumble(self, scope, receive, send):
        name = scope.get("path", "").removeprefix("/v1/")
        number, plan = json.loads((folder / "plan.json").read_text())
        todo, at = plan.get(name, []), counts.get((number, name), 0)
        counts[number, name] = at + 1
        kind = todo[at] if at < len(todo) and scope["type"] == "http" else "ok"
        if kind == "ok":
            return await answer(self, scope, receive, send)
        with (folder / "done.jsonl").open("a") as file:
            file.write(json.dumps([name, kind]) + "\\n")
        if kind in ("500", "503"):
            while (await receive()).get("more_body"):
                pass
            said = []
        else:
            said = []

            async def keep(part):
                said.append(part)

            await answer(self, scope, receive, keep)
        if kind == "broken":
            body = b"".join(part.get("body", b"") for part in said[1:])
            head = [(key, value) for key, value in said[0]["headers"] if key != b"content-length"]
            head += [(b"content-length", str(len(body) + 100).encode())]
            await send({**said[0], "headers": head})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            raise ConnectionError("broken on purpose")
        text = b\'{"detail":"database is locked"}\'
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 503 if kind == "503" else 500, "headers": head})
        await send({"type": "http.response.body", "body": text})

    fastapi.FastAPI.__call__ = stumble
"""


def every_second(*kinds: str, times: int = 1) -> list[str]:
    """A failure of each kind, so many times, each followed by a call that comes through."""
    return [word for kind in kinds * times for word in (kind, OK)]


class Stumbles:
    """What a SuperLink does wrong.

    Args:
        folder: An empty folder for the patch, the plan and the record of what was done.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._plans = folder, 0
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(PATCH)
        self.plan({})

    @property
    def prefix(self) -> tuple[str, ...]:
        """The words to begin the coordinator's command with."""
        path = os.pathsep.join([str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        return ("env", f"PYTHONPATH={path}", f"STUMBLES={self._folder}")

    def plan(self, calls: Mapping[str, Sequence[str]]) -> None:
        """From now on the next calls of a name, such as "fleet/pull-messages", are `OK` or fail in one of `KINDS`."""
        self._plans += 1
        new = self._folder / "plan.new"
        new.write_text(json.dumps([self._plans, calls]))
        new.replace(self._folder / "plan.json")

    def done(self) -> Counter[str]:
        """How many calls of each name failed so far."""
        path = self._folder / "done.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return Counter(json.loads(line)[0] for line in lines)
