"""An adapter that somebody trained already: found, held against the federation's model, and read.

A run begins with one by `adapter.start`, and a federation measures one without training. What a run left says by hashes
what it was trained with (`fedlora.provenance`), and starts on that alone. Another program's says no more than the name
of its base, which is compared as far as that goes; the rest is told as not known.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.adapter import AdapterState
from fedlora.assets import Checkpoint, public_name
from fedlora.errors import ModelError, RunDirError, looks_like_path
from fedlora.hashing import tensors_digest
from fedlora.model.adapter_files import read_adapter
from fedlora.model.base_model import Base
from fedlora.model.fingerprint import fingerprint
from fedlora.model.pair_shapes import alpha_of
from fedlora.provenance import MODEL, Provenance, in_words, said_of_adapter
from fedlora.runs.rundir import require_provenance
from fedlora.sanitize import clean_text
from fedlora.training.workspace import Workspace


@dataclass(frozen=True)
class Start:
    """The adapter that a run begins with.

    Args:
        adapter: its values.
        digest: of its tensors and scales; the same wherever the folder lies.
        notes: what is to be said once: where it is from, and what is not known of it.
    """

    adapter: AdapterState
    digest: str
    notes: tuple[str, ...]


def adapter_folder(path: Path) -> Path:
    """The folder with adapter_config.json, given it or a run's.

    Raises:
        RunDirError: there is none.
    """
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder.absolute()
    raise RunDirError(
        f"{str(path)!r} is neither a finished run nor an adapter: name a folder with adapter_config.json",
        code="not-an-adapter",
    )


def read_start(workspace: Workspace) -> Start | None:
    """The adapter that `adapter.start` names; None: the method draws one.

    Raises:
        ModelError: the method starts from a draw of its own; or see `read_given`; or it is of another rank or scale.
        RunDirError: there is no adapter, or it is in the folder of the run itself; or see `read_given`.
    """
    config = workspace.config.adapter
    if config.start is None:
        return None
    if workspace.base.method.start != "kaiming":
        raise ModelError(
            f"adapter.method {config.method!r} says how A and B are drawn, and adapter.start brings its own: set "
            "adapter.method = 'lora', or remove adapter.start",
            code="two-starts",
        )
    folder, run = adapter_folder(Path(config.start)), workspace.config
    if (own := (Path(run.output) / run.name).resolve()) in folder.resolve().parents:
        raise RunDirError(
            f"adapter.start is in the run's own folder, {str(own)!r}, which the run would replace: set another name "
            "with --set name=...",
            code="start-in-run",
        )
    adapter, notes = read_given(workspace, folder)
    _require_same_shapes(workspace.base, adapter, folder)
    scales = {name: pair.scale for name, pair in adapter.pairs.items()}
    digest = hashlib.sha256(f"{tensors_digest(adapter.tensors())} {json.dumps(scales, sort_keys=True)}".encode())
    return Start(adapter, digest.hexdigest(), (f"the run begins with the adapter in {str(folder)!r}", *notes))


def pins_of(workspace: Workspace, start: Start | None) -> Provenance:
    """What a run stands on that begins now."""
    return replace(workspace.pins, start=None if start is None else start.digest)


def read_given(workspace: Workspace, folder: Path) -> tuple[AdapterState, tuple[str, ...]]:
    """An adapter of any ranks, and what is not known of it, one line each.

    Args:
        workspace: whose model it is for.
        folder: with the adapter in PEFT's format.

    Raises:
        ModelError: it is not for the model; see `fedlora.model.adapter_files.read_adapter`.
        RunDirError: it was trained on another base, tokenizer or classes.
    """
    facts, made, found = said_of_adapter(folder), Provenance.of_adapter(folder), workspace.pins.only(MODEL)
    theirs, own = facts.get("quantize"), workspace.config.model.quantize
    if made.base is not None and theirs != own:
        raise ModelError(
            f"the adapter in {str(folder)!r} was trained with model.quantize = {_say(theirs)}, and here it is "
            f"{_say(own)}: " + ("remove it" if theirs is None else f"set model.quantize = {theirs!r}"),
            code="quantized-otherwise",
        )
    cure = "name the model that it was trained on in model.name, and the same classes in their order"
    require_provenance(made, found, f"the adapter in {str(folder)!r}", cure)
    notes = [] if made.base is not None else list(_compare_base(workspace, folder))
    if unknown := [part for part in MODEL if part != "base" and part in found.known and part not in made.known]:
        notes.append(
            f"the adapter in {str(folder)!r} has no hashes of what it was trained with: whether {in_words(unknown)} "
            "are the same is not known" + ("" if made.base is not None else ", nor how its base was quantised")
        )
    task, own_task = _adapter_config(folder).get("task_type"), workspace.base.task_type
    if isinstance(task, str) and own_task is not None and task != own_task:
        notes.append(
            f"the adapter in {str(folder)!r} was trained for another task: its task_type is {clean_text(task)!r}, and "
            f"here it is {own_task!r}"
        )
    return read_adapter(workspace.base, folder), tuple(notes)


def _compare_base(workspace: Workspace, folder: Path) -> tuple[str, ...]:
    """What is not known of the base of an adapter that has no hash of it.

    Raises:
        ModelError: it names another base.
    """
    model, own = workspace.config.model, public_name(workspace.config.model)[0]
    theirs = str(_adapter_config(folder).get("base_model_name_or_path") or "")
    if theirs and Path(theirs).expanduser().is_dir():
        checkpoint = Checkpoint(str(Path(theirs).expanduser()), trust_remote_code=model.trust_remote_code)
        if fingerprint(checkpoint, quantize=model.quantize) == workspace.base.weights_digest:
            return ()
    elif theirs.casefold() in {own.casefold(), model.name.casefold()}:
        return _compare_revision(workspace, folder)
    elif not theirs:
        return (f"the adapter in {str(folder)!r} does not name its base: whether it is {own!r} is not known",)
    elif _is_path(theirs) or _is_path(own) or Path(theirs).name.casefold() == Path(own).name.casefold():
        return (
            f"the adapter in {str(folder)!r} names {clean_text(theirs)!r} as its base: whether that is {own!r} is not "
            "known",
        )
    raise ModelError(
        f"the adapter in {str(folder)!r} was trained on {clean_text(theirs)!r}, and model.name is {model.name!r}: name "
        f"that model, or, if these are the same weights, write {own!r} as base_model_name_or_path in its "
        "adapter_config.json",
        code="other-base",
    )


def _compare_revision(workspace: Workspace, folder: Path) -> tuple[str, ...]:
    """What is not known of the revision of a base that has the name of ours.

    Raises:
        ModelError: it names another revision.
    """
    name, own = public_name(workspace.config.model)
    theirs = _adapter_config(folder).get("revision")
    if not isinstance(theirs, str) or not own or {theirs, own} & {"", "main"}:  # a branch: no fixed revision
        return (f"whether the adapter in {str(folder)!r} was trained on this revision of {name!r} is not known",)
    if theirs == own:
        return ()
    raise ModelError(
        f"the adapter in {str(folder)!r} was trained on revision {clean_text(theirs)!r} of {name!r}, and here it is "
        f"{own!r}: name that revision, or, if these are the same weights, write {own!r} as revision in its "
        "adapter_config.json",
        code="other-base",
    )


def _require_same_shapes(base: Base, adapter: AdapterState, folder: Path) -> None:
    """Raise `ModelError` where an adapter has another rank or scale than the config says."""
    for name, wanted in base.layout().items():
        pair, root = adapter.pairs[name], base.method.root_scale
        if pair.rank != wanted.rank or not math.isclose(pair.scale, wanted.scale, rel_tol=1e-6):
            theirs, own = (f"rank {s.rank} and alpha {alpha_of(s.scale, s.rank, root):g}" for s in (pair.shape, wanted))
            alike = len({(pair.rank, pair.scale) for pair in adapter.pairs.values()}) == 1
            raise ModelError(
                f"the adapter in {str(folder)!r} has {theirs} at {name!r}, and the config gives {own}: set "
                + (
                    f"adapter.rank = {pair.rank} and adapter.alpha = {alpha_of(pair.scale, pair.rank, root):g}"
                    if alike
                    else "adapter.rank, alpha, rank_pattern and alpha_pattern as in its adapter_config.json"
                ),
                code="shape-mismatch",
            )


def _adapter_config(folder: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError):  # `read_adapter` says so
        return {}
    return facts if isinstance(facts, dict) else {}


def _is_path(name: str) -> bool:
    return looks_like_path(name) or Path(name).is_absolute()


def _say(value: object) -> str:
    return "none" if value is None else repr(value)
