"""What a client answered last, for a server that asks for the same again because the reply was lost on the way.

A private client keeps what it released beside its ledger (see `fedlora.federation.client_ledger`): it must never send a
second noisy answer for one step. Any other client would train to the same bytes; a process that goes on living, as a
worker does, keeps its last answer in memory instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.errors import RunDirError
from fedlora.files import write_atomically
from fedlora.flower.arrays import from_array
from fedlora.flower.messages import BUFFER, update_content
from fedlora.privacy.ledger import Ledger
from fedlora.state_io import pack, unpack

logger = logging.getLogger(__name__)


class LastAnswer:
    """The last answer of a client that is not private, in this process's memory."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._content: RecordDict | None = None

    def find(self, key: tuple[object, ...]) -> RecordDict | None:
        """The answer under this key, if it is the last."""
        return self._content if key == self._key else None

    def keep(self, key: tuple[object, ...], content: RecordDict) -> None:
        """Replace what was kept.

        Args:
            key: Run, node and `fedlora.flower.messages.request_digest` of the request, and a weak reference to the
                workspace: all that the answer depends on.
            content: The answer.
        """
        self._key, self._content = key, content


@dataclass(frozen=True)
class KeptAnswer:
    """The last answer of a client, in one file beside its ledger.

    Args:
        path: The file.
    """

    path: Path

    def find(self, plan: str, ledger: Ledger) -> RecordDict | None:
        """The answer to a plan, with a line in the ledger that it is sent; None if it has to be computed.

        Args:
            plan: Digest of the request (`fedlora.flower.messages.request_digest`).
            ledger: The client's ledger, which must count the attempt that produced the answer.

        Raises:
            PrivacyError: the ledger is damaged or in use.
        """
        try:
            tensors, meta = unpack(self.path.read_bytes())
            if meta["plan"] != plan:
                return None
            content = _unpacked(tensors, meta)
            attempt = str(meta["attempt"])
        except FileNotFoundError:
            return None
        except (RunDirError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("the kept answer %s cannot be read (%s): what is asked again counts again", self.path, error)
            return None
        return content if ledger.reissue(attempt) else None

    def keep(self, plan: str, attempt: str, content: RecordDict) -> None:
        """Replace what was kept; on the disk when it returns. Call it before the attempt is released.

        Args:
            plan: Digest of the request that is answered.
            attempt: `Attempt.name` of the attempt that produced the answer.
            content: The answer.
        """
        tensors, meta = _packed(content)
        write_atomically(self.path, pack(tensors, {**meta, "plan": plan, "attempt": attempt}))


def _packed(content: RecordDict) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The records of an update as named bytes and JSON."""
    buffer = from_array(cast("ArrayRecord", content["update"])[BUFFER])
    tensors = {BUFFER: torch.from_numpy(np.frombuffer(bytearray(buffer), np.uint8))}
    meta = {
        "reply": dict(cast("ConfigRecord", content["reply"])),
        "metrics": dict(cast("MetricRecord", content["metrics"])),
    }
    return tensors, meta


def _unpacked(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> RecordDict:
    buffer = tensors[BUFFER].numpy().tobytes()
    return update_content(ConfigRecord(meta["reply"]), buffer, MetricRecord(meta["metrics"]))
