"""checkpoints/ and merges/: the last states of a run, and its base updates, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from fedlora.aggregators import BaseUpdate, GlobalState
from fedlora.callbacks import Callback
from fedlora.errors import RunDirError
from fedlora.files import sync_folder, write_atomically
from fedlora.state_io import (
    flatten_base_update,
    flatten_state,
    pack,
    unflatten_base_update,
    unflatten_state,
    unpack,
)

KEPT = 2
"""The last one, and the one before it in case the last is lost to a bad disk."""
BEST = "best"
"""Folder beside them of the state that `[selection]` found best."""


@final
class Checkpoints(Callback):
    """The states of a run; as a callback, keeps each that the run reaches, and the best.

    Args:
        run: The run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._states, self._base_updates = run / "checkpoints", run / "merges"
        self._known: dict[str, BaseUpdate] = {}  # what is known to be in merges/, by file name

    @property
    def there(self) -> bool:
        """Whether there is any state."""
        return bool(self._list())

    @property
    def last_round(self) -> int:
        """Round of the newest state; 0 where there is none."""
        found = self._list()
        return int(found[-1].stem) if found else 0

    def state_reached(self, state: GlobalState) -> None:
        """Save it; its round's line of metrics is there."""
        self.save(state)

    def best_reached(self, state: GlobalState) -> None:
        """Keep it beside the last ones."""
        self.keep_best(state)

    def save(self, state: GlobalState) -> Path:
        """Write the state after a round; call it after that round's line of metrics is written.

        Base updates that are not on disk yet are written first, each to a file of its own; of the states the last two
        are kept, and of the base updates those that they name.
        """
        for update in state.base_updates:
            name = _file_name(update.since, update.version)
            if self._known.get(name) is not update:
                write_atomically(self._base_updates / name, pack(*flatten_base_update(update)))
                self._known[name] = update
        path = self._states / f"{state.round:06d}.safetensors"
        write_atomically(path, pack(*flatten_state(state, base_updates=False)))
        self._clean()
        return path

    def keep_best(self, state: GlobalState) -> None:
        """Keep a state that was saved, beyond the rounds that follow, in the place of the one kept before."""
        path = self._states / BEST / f"{state.round:06d}.safetensors"
        write_atomically(path, pack(*flatten_state(state, base_updates=False)))
        for other in path.parent.glob("*.safetensors"):
            if other.name != path.name:
                other.unlink()

    def best(self) -> GlobalState | None:
        """What `keep_best` kept last; None before the first time."""
        found = sorted((self._states / BEST).glob("*.safetensors"))
        if not found:
            return None
        tensors, meta = _read(found[-1], "the best round is lost: set selection.keep = 'last' and resume")
        return unflatten_state(tensors, meta, self._read_base_update)

    def latest(self) -> GlobalState | None:
        """The newest state, or None before the first one. Changes nothing.

        Raises:
            RunDirError: a file is damaged; the message says which one to remove.
        """
        found = self._list()
        if not found:
            return None
        tensors, meta = _read(found[-1], "remove it to go on from the checkpoint before it")
        return unflatten_state(tensors, meta, self._read_base_update)

    def _list(self) -> list[Path]:
        return sorted(path for path in self._states.glob("*.safetensors") if not path.name.startswith("."))

    def _read_base_update(self, since: int, version: int) -> BaseUpdate:
        name = _file_name(since, version)
        if name not in self._known:
            tensors, meta = _read(self._base_updates / name, "start the run again with --overwrite")
            self._known[name] = unflatten_base_update(tensors, meta)
        return self._known[name]

    def _clean(self) -> None:
        found = self._list()
        for path in found[:-KEPT]:
            path.unlink()
        sync_folder(self._states)
        if not self._base_updates.is_dir():
            return
        named: set[str] = set()
        for path in (*found[-KEPT:], *(self._states / BEST).glob("*.safetensors")):
            _, meta = _read(path, "remove it")
            named.update(_file_name(entry["since"], entry["version"]) for entry in meta["merges"])
        for path in self._base_updates.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()
                self._known.pop(path.name, None)


def _read(path: Path, cure: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return unpack(path.read_bytes())
    except FileNotFoundError:
        raise RunDirError(f"{str(path)!r} is missing: {cure}", code="file-missing") from None
    except RunDirError as error:
        raise RunDirError(f"{str(path)!r} is damaged ({error}): {cure}", code="file-damaged") from None


def _file_name(since: int, version: int) -> str:
    return f"{since:06d}-{version:06d}.safetensors"
