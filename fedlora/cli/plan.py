"""`fedlora plan`: what a run will take, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._common import Config, Overrides, app, open_console, plain_table


@app.command()
def plan(
    config_path: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="SIZE", help="Plan for a GPU of so much memory, such as 24GB; default: here."),
    ] = None,
) -> None:
    """Show what a run takes: weights, adapters, activations, and whether a training step fits.

    It reads the model's config and no weights.
    """
    import torch

    from fedlora.config import load_config
    from fedlora.federation.given_adapter import adapter_folder
    from fedlora.memory import total_bytes
    from fedlora.model import choose_dtype, resolve_device
    from fedlora.model.placement import placement
    from fedlora.simulation.plan import make_plan, read_size

    console = open_console()
    config = load_config(config_path, overrides or [])
    if gpu is None:
        device = resolve_device(config.runtime.device)
        placement(config, device)
        devices = torch.cuda.device_count() if config.runtime.device_map is not None else 1
        memory, dtype = devices * total_bytes(device), str(choose_dtype(config)).removeprefix("torch.")
    else:
        device, memory, dtype = torch.device("cuda"), read_size(gpu), "bfloat16"
    found = make_plan(config, memory, dtype, device.type)
    table = plain_table(show_header=False)
    for line in found.lines():
        table.add_row(*line)
    if config.adapter.start is not None:
        table.add_row("begins with", f"the adapter in {adapter_folder(Path(config.adapter.start))}")
    console.print(table)
    console.out(found.verdict)
