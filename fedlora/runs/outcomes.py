"""What the last evaluation measured of each test example, kept with the run: runs are then compared by example."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fedlora.errors import RunDirError
from fedlora.files import write_atomically
from fedlora.state_io import pack, unpack

FILE = "outcomes.safetensors"


def write_outcomes(run: Path, number: int, test: str, measures: Mapping[str, np.ndarray]) -> None:
    """Keep a round's outcomes.

    Args:
        run: its folder.
        number: of the round.
        test: names the test examples; two runs with the same name were tested on the same ones in the same order.
        measures: the task's, [n, ...] by name; kept in single precision.
    """
    tensors = {name: torch.from_numpy(np.asarray(values, dtype=np.float32)) for name, values in measures.items()}
    write_atomically(run / FILE, pack(tensors, {"round": number, "test": test}))


def read_outcomes(run: Path) -> tuple[str, dict[str, np.ndarray]] | None:
    """What `write_outcomes` kept, as "test" and "measures" in double precision; None where there is nothing.

    Raises:
        RunDirError: the file is damaged.
    """
    try:
        tensors, meta = unpack((run / FILE).read_bytes())
        return str(meta["test"]), {name: value.double().numpy() for name, value in tensors.items()}
    except FileNotFoundError:
        return None
    except (RunDirError, KeyError) as error:
        raise RunDirError(f"{str(run / FILE)!r} is damaged ({error}); remove it", code="file-damaged") from None
