"""What was measured of each test example, kept with the run: runs are then compared by example.

The file has those of one round, whose model is kept. Where `[selection]` keeps the best round, what the last one
measured waits in a file beside it, and takes the other's place if that round is the best: after a kill in between, a
resume finds it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.errors import RunDirError
from fedlora.files import sync_folder, write_atomically
from fedlora.state_io import pack, unpack

FILE, WAITING = "outcomes.safetensors", "outcomes-waiting.safetensors"


def write_outcomes(
    run: Path, number: int, test: str, measures: Mapping[str, np.ndarray], *, waiting: bool = False
) -> None:
    """Keep a round's outcomes.

    Args:
        run: its folder.
        number: of the round.
        test: names the test examples; two runs with the same name were tested on the same ones in the same order.
        measures: the task's, [n, ...] by name; kept in single precision.
        waiting: not in the place of those that are there, until `keep_waiting` says so.
    """
    tensors = {name: torch.from_numpy(np.asarray(values, dtype=np.float32)) for name, values in measures.items()}
    write_atomically(run / (WAITING if waiting else FILE), pack(tensors, {"round": number, "test": test}))


def keep_waiting(run: Path, number: int) -> None:
    """Put the outcomes that wait into the place of those kept before, if they are of this round.

    Raises:
        RunDirError: the file is damaged.
    """
    found = _read(run / WAITING)
    if found is not None and found[1]["round"] == number:
        (run / WAITING).replace(run / FILE)
        sync_folder(run)


def drop_waiting(run: Path) -> None:
    """Forget outcomes that wait, of a run that is over."""
    (run / WAITING).unlink(missing_ok=True)


def read_outcomes(run: Path, number: int) -> tuple[str, dict[str, np.ndarray]] | None:
    """A round's outcomes, as "test" and "measures" in double precision; None where those of this round are not kept.

    Raises:
        RunDirError: the file is damaged.
    """
    found = _read(run / FILE)
    if found is None or found[1]["round"] != number:
        return None
    tensors, meta = found
    return str(meta["test"]), {name: value.double().numpy() for name, value in tensors.items()}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """A file's tensors and its "round" and "test"; None where there is no file."""
    try:
        tensors, meta = unpack(path.read_bytes())
        return tensors, {key: meta[key] for key in ("round", "test")}
    except FileNotFoundError:
        return None
    except (RunDirError, KeyError) as error:
        raise RunDirError(f"{str(path)!r} is damaged ({error}); remove it", code="file-damaged") from None
