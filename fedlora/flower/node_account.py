"""A private client's ledger in one run, and the last answer that it released.

A client finds its ledger in this order:

- node config `ledger`: a file of its own, as a real node has. An attempt is released before the reply leaves, and
  counts for ever. The run config cannot replace it.
- run config `ledger-dir`: a folder with a file for each client, as simulations have. With `session`, which `run_local`
  adds, clients and server end together, nothing leaves them in the middle of a round, and a round that a killed run
  has to repeat counts once.

A server that was killed asks for its last round again after a resume. A client that releases what it sends keeps its
last answer beside its ledger: for the same plan of the same run it sends the same bytes again, so that nothing new
becomes known and nothing is spent twice. For any other plan it trains, which is a new attempt and counts, whatever the
server calls its run and round.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fedlora.config import RunConfig
from fedlora.errors import PrivacyError, ReplyError, RunDirError
from fedlora.files import write_atomically
from fedlora.privacy.ledger import Ledger
from fedlora.state_io import pack, unpack

logger = logging.getLogger(__name__)

PLAN_TABLES = (
    "seed", "model", "adapter", "task", "data", "partition", "clients", "train", "strategy", "wire", "privacy"
)  # fmt: skip
"""The parts of a config that decide what a plan asks for, beside the plan itself."""
_RUN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class KeptAnswer:
    """The last answer of a client, in one file beside its ledger.

    Args:
        path: of the file.
    """

    path: Path

    def find(self, plan: str, ledger: Ledger) -> RecordDict | None:
        """The answer to a plan, with a line in the ledger that it is sent; None if it has to be computed.

        Args:
            plan: its digest (`ReceivedPlan.digest`).
            ledger: in which the attempt that made the answer must count.

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
            plan: digest of the plan that is answered.
            attempt: `Attempt.name` of the one that made the answer.
            content: the answer.
        """
        tensors, meta = _packed(content)
        write_atomically(self.path, pack(tensors, {**meta, "plan": plan, "attempt": attempt}))


@dataclass(frozen=True)
class Account:
    """A client's ledger in one run.

    Args:
        ledger: the file.
        run: id of the run's directory, by which the ledger knows it.
        kept: the last answer; None where one process is client and server, which releases nothing in a round.
    """

    ledger: Ledger
    run: str
    kept: KeptAnswer | None = None


def account_of(context: Context, client_id: int, run: object) -> Account:
    """Where this client keeps account.

    Args:
        context: of the client.
        client_id: its number.
        run: what the plan says to be the id of the run.

    Raises:
        PrivacyError: nowhere.
        ReplyError: the plan names no run.
    """
    if not (isinstance(run, str) and _RUN.fullmatch(run)):
        raise ReplyError("the plan does not name its run, without which nothing can be put down in a privacy ledger")
    own, folder = str(context.node_config.get("ledger", "")), str(context.run_config.get("ledger-dir", ""))
    session = str(context.run_config.get("session", ""))
    if not own and not folder:
        raise PrivacyError(
            "this node has no privacy ledger, and trains nothing without one: start it with --node-config "
            "'ledger=\"/where/it/is/kept.jsonl\"' (a simulation: --run-config 'ledger-dir=\"...\"')"
        )
    path = Path(own) if own else ledger_path(Path(folder), client_id)
    if session and not own:
        return Account(Ledger(path, session=session), run)
    return Account(Ledger(path), run, KeptAnswer(path.with_name(f"{path.name}.answer")))


def ledger_path(folder: Path, client_id: int) -> Path:
    """The ledger of a simulated client."""
    return folder / f"client-{client_id}.jsonl"


def plan_config(config: RunConfig) -> str:
    """Digest of what a plan depends on in a config, such as the learning rate."""
    return config.digest(*PLAN_TABLES)


def _packed(content: RecordDict) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The records of an update as named bytes and JSON."""
    arrays = cast("ArrayRecord", content["update"])
    bodies = {name: np.frombuffer(bytearray(array.data), np.uint8) for name, array in arrays.items()}
    tensors = {f"body/{name}": torch.from_numpy(body) for name, body in bodies.items()}
    meta = {
        "reply": dict(cast("ConfigRecord", content["reply"])),
        "arrays": {name: [array.dtype, list(array.shape), array.stype] for name, array in arrays.items()},
        "metrics": dict(cast("MetricRecord", content["metrics"])),
    }
    return tensors, meta


def _unpacked(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> RecordDict:
    arrays = ArrayRecord()
    for name, (dtype, shape, stype) in meta["arrays"].items():
        arrays[name] = Array(dtype, tuple(shape), stype, tensors[f"body/{name}"].numpy().tobytes())
    reply, metrics = ConfigRecord(meta["reply"]), MetricRecord(meta["metrics"])
    return RecordDict({"reply": reply, "update": arrays, "metrics": metrics})
