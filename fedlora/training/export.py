"""A run's adapter or merged model, written and then checked: loaded without us, it gives the trained model's logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.adapter import AdapterState
from fedlora.aggregators import BaseUpdate, GlobalState
from fedlora.errors import ExportError
from fedlora.memory import free_bytes
from fedlora.model import (
    Base,
    Reference,
    put_in_place,
    save_adapter,
    save_merged,
    unquantised,
    verify_adapter,
    verify_merged,
)
from fedlora.model.gguf_file import GGUF
from fedlora.model.model_card import NOTHING_SAID, Origin
from fedlora.runs.rundir import unverified
from fedlora.tasks import Examples, Task
from fedlora.training.workspace import Workspace, close_workspace, open_workspace

EXAMPLES = 8
"""So many are compared, of as many lengths as there are: in one padded batch, and the shortest and longest alone."""
EXACT = 1e-6
"""Relative error of an exported adapter up to which it is what the run trained; above, its rank was cut."""


def export_adapter(
    workspace: Workspace,
    state: GlobalState,
    adapter: AdapterState,
    error: float,
    folder: Path,
    facts: Mapping[str, Any],
    origin: Origin = NOTHING_SAID,
) -> float:
    """Write an adapter, load it with plain transformers and PEFT, and put it in place if its logits are the run's.

    Where `adapter.export_rank` cut the adapter it differs from what was trained by the error that is stated, and is
    compared with the cut adapter on the pristine base.

    Args:
        workspace: the run's. If the device has no room for a second base, its own is given up.
        state: the run's last one.
        adapter: `equivalent_adapter` of the state.
        error: its relative error.
        folder: where the adapter goes. Until it is verified, and if it is not, it stays in `unverified(folder)`.
        facts: are written into fedlora.json, with the task and the names of its classes.
        origin: for the model card.

    Returns:
        The largest difference of the logits, as a share of the largest.

    Raises:
        ExportError: the logits differ, or the adapter cannot be loaded.
        ModelError: the adapter does not fit the model.
    """
    base = workspace.base
    served = (state.adapter, state.base_updates) if error <= EXACT else (adapter, ())
    reference = reference_of(base, workspace.task, workspace.data.probes, *served)
    base.rebase(0, ())
    names = {"class_names": list(workspace.data.label_names)} if workspace.data.label_names else {}
    known = {"task": workspace.config.task.model_dump(mode="json"), **names, **facts, "relative_error": repr(error)}
    save_adapter(base, adapter, unverified(folder), known, origin)
    return _verify(workspace, folder, lambda: verify_adapter(unverified(folder), base.recipe, reference, base.device))


def export_merged(
    workspace: Workspace, state: GlobalState, folder: Path, origin: Origin = NOTHING_SAID, *, gguf: bool = False
) -> tuple[float, float | None]:
    """Write a whole model, load it with plain transformers, and put it in place; see `export_adapter`.

    What was trained on a quantised base is merged into the whole weights, since quantised ones take no addition.

    Args:
        workspace: the run's. If its base is quantised, it is given up for one that is not.
        state: the run's last one.
        folder: where the model goes.
        origin: for the model card.
        gguf: whether it is written as one GGUF file.

    Returns:
        The largest difference of the logits from those of the base that was merged into, with the adapter beside it;
        and that base's from the quantised one's, which the run trained on: None if it was not quantised.
    """
    reference = trained = _reference(workspace, state)
    if workspace.config.model.quantize is not None:
        workspace.base.discard()
        workspace = open_workspace(unquantised(workspace.config))
        reference = _reference(workspace, state)
    base, fresh, file = workspace.base, unverified(folder), GGUF if gguf else None
    save_merged(base, state.adapter, state.base_updates, fresh, origin, gguf=gguf)
    difference = _verify(workspace, folder, lambda: verify_merged(fresh, base.recipe, reference, base.device, file))
    return difference, None if reference is trained else trained.apart(reference)


def _reference(workspace: Workspace, state: GlobalState) -> Reference:
    return reference_of(workspace.base, workspace.task, workspace.data.probes, state.adapter, state.base_updates)


def reference_of(
    base: Base, task: Task, examples: Examples, adapter: AdapterState, base_updates: tuple[BaseUpdate, ...] = ()
) -> Reference:
    """What the model says to some examples, with an adapter and a base at the updates' version.

    The base is left at that version, with the adapter written.
    """
    base.rebase(0, ())  # the version held may come from another log
    base.rebase(base_updates[-1].version if base_updates else 0, base_updates)
    base.write(adapter, frozenset())
    base.train_mode(False)
    by_length = np.argsort(examples.lengths, kind="stable")
    chosen = by_length[np.unique(np.linspace(0, len(by_length) - 1, EXAMPLES).round().astype(np.int64))]
    batches = [chosen, chosen[:1], chosen[-1:]]
    return Reference.of(base.model, [task.plain_inputs(examples, rows) for rows in batches], base.device)


def _verify(workspace: Workspace, folder: Path, verify: Callable[[], float]) -> float:
    base, kept = workspace.base, unverified(folder)
    if free_bytes(base.device) < 2 * base.weight_bytes:  # as much again, and what is computed
        base.discard()
        close_workspace()
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
    try:
        difference = verify()
    except ExportError as error:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier round, if it is there
        raise ExportError(
            f"the export could not be verified: {error}; it is kept in {str(kept)!r}", code=error.code
        ) from error
    put_in_place(kept, folder)
    return difference
