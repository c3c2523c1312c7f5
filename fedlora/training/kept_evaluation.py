"""What the base model reaches on the test set before any training, kept in the cache by all that it depends on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from fedlora.aggregators import GlobalState
from fedlora.errors import RunDirError
from fedlora.files import cache_dir, write_atomically
from fedlora.hashing import code_digest, digest_of, tensors_digest
from fedlora.probes import machine
from fedlora.provenance import MODEL
from fedlora.runs.environment import version_of
from fedlora.state_io import flatten_adapter, pack, unpack
from fedlora.tasks._base import Task
from fedlora.training.evaluate import Measures
from fedlora.training.workspace import Workspace

MOST = 256
"""Evaluations that are kept; the oldest make way."""


def kept_measures(
    workspace: Workspace, state: GlobalState, base_digest: str, threads: int, measure: Callable[[], Measures]
) -> Measures:
    """What was measured of the pristine base with an untrained adapter, now or at an earlier time, to the same bits.

    Nothing is kept of a private run, nor where code that is not fedlora's decides the result.

    Args:
        workspace: with the server's test examples.
        state: before any training, which the base holds.
        base_digest: identity of the base weights of the state's version.
        threads: of the processes that measure.
        measure: does it.
    """
    config = workspace.config
    if config.privacy is not None or config.model.trust_remote_code or not measured_by_us(workspace.task):
        return measure()
    path = cache_dir() / "evaluations" / f"{_key(workspace, state, base_digest, threads)}.safetensors"
    with suppress(OSError, RunDirError):
        tensors, meta = unpack(path.read_bytes())
        return {name: tensors[name].numpy() for name in meta["names"]}
    measures = measure()
    tensors = {name: torch.from_numpy(values) for name, values in measures.items()}
    with suppress(OSError):  # a cache that cannot be written saves no time, and harms nobody
        write_atomically(path, pack(tensors, {"names": list(measures)}))
        for old in sorted(path.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime)[:-MOST]:
            old.unlink()
    return measures


def measured_by_us(task: Task) -> bool:
    """Whether no class of a task is of another package, a class around it (`evaluation.metric`) aside."""
    return all(kind.__module__.partition(".")[0] in ("fedlora", "abc", "builtins") for kind in type(task).__mro__)


def _key(workspace: Workspace, state: GlobalState, base_digest: str, threads: int) -> str:
    config = workspace.config
    tensors, layout = flatten_adapter(state.adapter)
    return digest_of(
        {
            "provenance": workspace.provenance.only((*MODEL, "test_data")).known,
            "state": [tensors_digest(tensors), layout, base_digest],
            "config": {name: getattr(config, name).model_dump(mode="json") for name in ("model", "adapter", "task")},
            "machine": {**machine(), **workspace.machine.facts, "threads": threads},
            "speedups": workspace.speedups.settled,
            "coupled": workspace.base.coupled,
            "versions": {name: version_of(name) for name in ("numpy", "peft", "transformers", "tokenizers")},
            "code": code_digest(),
        }
    )
