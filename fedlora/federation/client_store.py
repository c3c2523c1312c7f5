"""What clients keep from round to round: a file for each client and round, with the client and never with the server.

The server names the round whose file a client goes on from: the last one of which it used the client's update
(`fedlora.federation.protocol.TrainRequest.kept_round`). So a client that was away, a reply that was lost, a server that
was killed and a run that is replayed all come to the same bytes. A file's name also says from which file its round
began; those two are all that a request of this run can still name, a resumed server's included, and others are removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from fedlora.errors import ReplyError, RunDirError
from fedlora.files import write_atomically
from fedlora.state_io import pack, unpack

OPTIMIZER, RESIDUAL = "optimizer/", "residual/"
"""Begin the names of what is the optimiser's, and of what a client has still to send (`[wire] error_feedback`)."""


@final
@dataclass(frozen=True)
class ClientStore:
    """What some clients keep of one run.

    Args:
        folder: Where, with a folder for each client; None: nowhere.
    """

    folder: Path | None = None
    _read: dict[tuple[int, int], dict[str, Tensor]] | None = field(default=None, compare=False, repr=False)

    def reading_once(self) -> ClientStore:
        """The same store, which reads a file once and holds what it read for as long as it is there itself."""
        return ClientStore(self.folder, {})

    def rounds(self, client_id: int) -> list[int]:
        """The rounds of which a client keeps something, in ascending order."""
        return sorted({int(file.name[:6]) for file in self._of(client_id).glob("[0-9]*-*.safetensors")})

    def load(self, client_id: int, number: int) -> dict[str, Tensor]:
        """What a client kept of a round, by name; nothing of round 0.

        Raises:
            ReplyError: there is no place for it, or the file is lost or damaged.
        """
        folder = self._of(client_id)
        if not number:
            return {}
        if self._read is not None and (client_id, number) in self._read:
            return self._read[client_id, number]
        found = sorted(folder.glob(f"{number:06d}-*.safetensors"))
        try:
            tensors = unpack(found[-1].read_bytes())[0]
        except (IndexError, OSError, RunDirError) as error:
            why = "is damaged" if isinstance(error, RunDirError) else "is not there"
            raise ReplyError(
                f"what client {client_id} kept of round {number} {why}: put its store back, or start a new run",
                code="kept-part-lost",
            ) from None
        if self._read is not None:
            self._read[client_id, number] = tensors
        return tensors

    def save(self, client_id: int, number: int, tensors: Mapping[str, Tensor], since: int) -> None:
        """Keep tensors of a round.

        Args:
            client_id: Whose.
            number: Of the round.
            tensors: By name.
            since: The round whose tensors the client went on from; 0: none.
        """
        folder = self._of(client_id)
        path = folder / f"{number:06d}-{since:06d}.safetensors"
        write_atomically(path, pack(tensors, {}))
        files = {file: tuple(map(int, file.stem.split("-"))) for file in folder.glob("[0-9]*-*.safetensors")}
        before = {origin for of, origin in files.values() if of == since}
        for file, (of, _) in files.items():
            if file != path and (of == number or (of < number and of not in {since, *before})):
                file.unlink(missing_ok=True)

    def _of(self, client_id: int) -> Path:
        if self.folder is None:
            raise ReplyError(
                "clients of this run keep something from round to round, and this node has no place for it: start it "
                "with --node-config 'ledger=\"/where/it/is/kept.jsonl\"', beside which it is kept (a simulation: "
                "--run-config 'ledger-dir=\"...\"')",
                code="no-client-store",
            )
        return self.folder / f"client-{client_id}"


def last_used(lines: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Client -> the last round of which the server used its update, by a run's lines of metrics."""
    used: dict[int, int] = {}
    for line in lines:
        if not line.get("lost") and not line.get("rule", {}).get("dropped"):
            used.update(dict.fromkeys(line.get("answered", ()), line["round"]))
    return used


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under a prefix of their own."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def divided(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What a client kept of its adapter, of its optimiser (`FlatOptimizer.state_of`), and of what it did not send."""
    parts: dict[str, dict[str, Tensor]] = {"": {}, OPTIMIZER: {}, RESIDUAL: {}}
    for name, value in tensors.items():
        prefix = next((prefix for prefix in (OPTIMIZER, RESIDUAL) if name.startswith(prefix)), "")
        parts[prefix][name.removeprefix(prefix)] = value
    return parts[""], parts[OPTIMIZER], parts[RESIDUAL]


def kept_differs(client_id: int, name: str, value: Tensor) -> ReplyError:
    """The error of a kept tensor that does not fit what the client is asked to keep."""
    return ReplyError(
        f"client {client_id} kept {name!r} {tuple(value.shape)} in an earlier round, and is asked to keep "
        "something else: let its rank and its model be those with which it began",
        code="kept-part-differs",
    )


NOTHING_KEPT = ClientStore()
"""Of clients that keep nothing."""
