"""`fedlora export`: a run's adapter or whole model, for use without fedlora."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import app, open_workspace
from fedlora.errors import RunDirError, looks_like_path

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora.aggregators import GlobalState
    from fedlora.runs.rundir import RunDir
    from fedlora.training import Workspace


class Form(StrEnum):
    """What is written."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    vllm = "vllm"


WHOLE = (Form.merged, Form.gguf)


@app.command()
def export(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="An adapter for PEFT or for vLLM, or a whole model with it: transformers' files, or GGUF.",
        ),
    ] = Form.peft,
    client: Annotated[
        int | None,
        typer.Option(help="A simulated client's own model, where the rule makes one for each.", show_default=False),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="By what others find the base model, where the run had it in a folder: owner/name."
        ),
    ] = "",
) -> None:
    """Write a run's adapter, or the whole model with it, for use without fedlora."""
    from fedlora.provenance import MODEL
    from fedlora.runs.rundir import RunDir

    run_dir = RunDir.open(run_path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunDirError(f"{str(out)!r} already exists: name a new or empty folder", code="path-taken")
    state = run_dir.kept_checkpoint()
    number = run_dir.kept_round
    like = "checked when the run ended"
    if client is not None and state is not None:
        state = _of_client(run_dir, state, client)
    if form is Form.peft and client is None and not base and run_dir.finished and run_dir.adapter_dir.is_dir():
        import shutil

        shutil.copytree(run_dir.adapter_dir, out, dirs_exist_ok=True)
    elif state is not None:
        workspace = open_workspace(run_dir.config)
        run_dir.require(workspace.pins.only(MODEL), "put back what it was made with")
        number, like = state.round, _write_model(run_dir, workspace, state, out, form, base)
    elif run_dir.finished:
        raise RunDirError(
            f"the checkpoints of {str(run_path)!r} were removed: only its shared adapter can be exported, as it is",
            code="checkpoints-removed",
        )
    else:
        raise RunDirError(
            f"{str(run_path)!r} has no checkpoint yet: continue it with fedlora run --resume {run_path}",
            code="no-checkpoint",
        )
    what = ("model" if form in WHOLE else "adapter") + ("" if client is None else f" of client {client}")
    typer.echo(f"the {what} of round {number} is in {out} ({like})")
    if form not in WHOLE and (path := base_folder(out)) is not None:
        typer.echo(
            f"note: it names its base model by the folder {path!r}: for others, give the name by which they find "
            "it (--base)",
            err=True,
        )


def base_folder(adapter: Path) -> str | None:
    """The folder by which an adapter names its base model; None: by another name."""
    try:
        base = str(json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError):
        return None
    return base if looks_like_path(base) or Path(base).is_absolute() else None


def _of_client(run_dir: RunDir, state: GlobalState, client: int) -> GlobalState:
    """The state with a simulated client's own values of what it keeps."""
    from dataclasses import replace

    from fedlora.federation.client_store import ClientStore, divided, last_used

    lines = (line for line in run_dir.read_metrics() if line["round"] <= state.round)
    number = last_used(lines).get(client, 0)
    kept: dict[str, Tensor] = {}
    if number and (run_dir.clients_dir / f"client-{client}").is_dir():
        kept, *_ = divided(ClientStore(run_dir.clients_dir).load(client, number))
    if not kept:
        raise RunDirError(
            f"{str(run_dir.path)!r} has no model of client {client}'s own: either it has not trained, or the rule lets "
            "clients keep nothing, or the clients were nodes, which keep theirs: export without --client",
            code="no-model-of-client",
        )
    return replace(state, adapter=state.adapter.with_tensors(kept))


def _write_model(run_dir: RunDir, workspace: Workspace, state: GlobalState, out: Path, form: Form, base: str) -> str:
    """Write what was asked for, and say what its check found."""
    from dataclasses import replace

    from fedlora.aggregators import equivalent_adapter
    from fedlora.model.vllm import for_vllm
    from fedlora.provenance import MODEL
    from fedlora.training.export import export_adapter, export_merged
    from fedlora.training.origin import origin_of

    said = "loaded without fedlora its logits differ by at most {:.1g}"
    record = next((line for line in run_dir.read_metrics() if line["round"] == state.round), {})
    claim = (run_dir.read_json("result.json") or {}).get("privacy") or {}
    began = run_dir.provenance.start
    origin = replace(origin_of(run_dir.config, record, claim.get("statement"), began), base=base)
    if form in WHOLE:
        difference, moved = export_merged(workspace, state, out, origin, gguf=form is Form.gguf)
        if moved is None:
            return said.format(difference)
        quantize = workspace.config.model.quantize
        return (
            f"{said.format(difference)}; it is merged into the whole weights, and the {quantize} ones that the run "
            f"trained on gave logits that differ by up to {moved:.1g} of the largest: evaluate it before you use it"
        )
    adapter, error = equivalent_adapter(state, workspace.config.adapter.export_rank or sys.maxsize)
    facts = {"rounds": str(state.round), "provenance": replace(workspace.pins.only(MODEL), start=began).known}
    if form is Form.vllm:
        adapter = for_vllm(workspace.base, adapter)
    return said.format(export_adapter(workspace, state, adapter, error, out, facts, origin))
