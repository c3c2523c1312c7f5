"""Through how many files an adapter goes in a round, from the rule's plan to the checkpoint on disk.

A station is a file of fedlora with a function that, in one round of a run in this process, makes an object that holds
an adapter, or hands one to another file as its result, or is given one that is written to disk meanwhile. The file that
defines adapters is none, nor are files that only look at one, for checks, digests and figures.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.tiny_federations import MakeConfig

import fedlora
from fedlora.adapter import AdapterState
from fedlora.callbacks import Callback
from fedlora.federation.server import FederatedServer
from fedlora.runs.rundir import RunDir
from fedlora.simulation.run import run_simulation

ROOT = Path(fedlora.__file__).parent
MOST = 16
SEEN = {
    "aggregators/fedavg.py",
    "federation/client.py",
    "federation/local_clients.py",
    "federation/planner.py",
    "federation/screen.py",
    "federation/server.py",
    "runs/checkpoints.py",
    "training/loop.py",
    "training/plain_loop.py",
}
"""Some that are stations for certain."""


def holds(value: Any) -> bool:
    """Whether there is an adapter in a value: itself, or in its fields or items."""
    if isinstance(value, AdapterState):
        return True
    if is_dataclass(value) and not isinstance(value, type):
        return any(holds(getattr(value, one.name, None)) for one in fields(value))
    if isinstance(value, Mapping):
        return any(map(holds, value.values()))
    return isinstance(value, list | tuple) and any(map(holds, value))


def file_of(frame: FrameType) -> str | None:
    """A frame's file, from fedlora's root on; None for any other, and for the one that defines adapters."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.name != "adapter.py" else None


def above(frame: FrameType) -> Iterator[FrameType]:
    """The frames of fedlora that led to one, the nearest first."""
    caller = frame.f_back
    while caller is not None:
        if file_of(caller) is not None:
            yield caller
        caller = caller.f_back


def is_given_an_adapter(frame: FrameType) -> bool:
    code = frame.f_code
    number = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    return any(holds(frame.f_locals.get(name)) for name in code.co_varnames[:number])


class Stations:
    """Notes the stations of what happens within: file -> functions."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = defaultdict(set)

    def __enter__(self) -> None:
        sys.setprofile(self._see)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, value: Any) -> None:
        code, here, caller = frame.f_code, file_of(frame), next(above(frame), None)
        if event == "call" and code.co_name == "write_atomically":
            if frame.f_locals["path"].parent.name == "checkpoints":
                for one in filter(is_given_an_adapter, above(frame)):
                    self._note(one)
        elif event == "return" and caller is not None:
            if code.co_filename == "<string>" and code.co_name == "__init__" and holds(frame.f_locals["self"]):
                self._note(caller)  # it makes a dataclass
            elif here is not None and here != file_of(caller) and holds(value):
                self._note(frame)

    def _note(self, frame: FrameType) -> None:
        self.found[str(file_of(frame))].add(frame.f_code.co_qualname)


@pytest.mark.slow
def test_an_adapter_passes_at_most_sixteen_files_from_plan_to_disk(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stations, real = Stations(), FederatedServer._round

    def watched(self: FederatedServer, *args: Any) -> Any:
        with stations:
            return real(self, *args)

    monkeypatch.setattr(FederatedServer, "_round", watched)
    config = tiny_config("rounds=1", "train.steps=2", "runtime.processes=1")
    run_simulation(config, RunDir.create(config), Callback())
    found = {name: sorted(functions) for name, functions in sorted(stations.found.items())}
    assert found.keys() >= SEEN
    assert len(found) <= MOST, "\n".join(f"{name}: {functions}" for name, functions in found.items())
