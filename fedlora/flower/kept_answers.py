"""The last answer that a private client released, kept beside its ledger; see `fedlora.federation.client_ledger`."""

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
