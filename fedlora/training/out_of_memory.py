"""Memory that runs out in a training step: how the failed step is let go, and what cures it."""

from __future__ import annotations

import traceback

import torch

from fedlora.errors import TrainingError
from fedlora.sanitize import clean_text
from fedlora.unexpected import ran_out

OUT_OF_MEMORY = "out-of-memory"
"""Of the error that ends a run: without the client whose step does not fit, the rounds would be another experiment."""


def released(error: BaseException) -> None:
    """Let go of what an exception's frames hold, a step's whole graph; its traceback keeps the lines."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if ran_out(error):
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()


def too_large(error: BaseException, device: torch.device) -> TrainingError:
    """What is said where one client's step does not fit, row by row."""
    first = clean_text(str(error).split(". ")[0], 200)
    told = TrainingError(
        f"a training step of one client does not fit into the memory of {device}{f' ({first})' if first else ''}: "
        "lower train.batch_size or task.max_length, set train.micro_batch_size = 1 or train.gradient_checkpointing = "
        "true, or fewer clients at once by runtime.cohort",
        code=OUT_OF_MEMORY,
    )
    told.__cause__ = error
    return told
