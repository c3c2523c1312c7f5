"""`fedlora spectrum`: what an adapter does to the weights, layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlora.cli._common import Adapter, Overrides, app
from fedlora.cli.compare import Form
from fedlora.errors import ConfigError


@app.command()
def spectrum(
    adapter: Adapter,
    top: Annotated[
        int, typer.Option("--top", min=1, metavar="N", help="Look at so many of the new weight's singular vectors.")
    ] = 10,
    epsilon: Annotated[
        float, typer.Option("--epsilon", metavar="COSINE", help="One with no cosine above this to an old one is new.")
    ] = 0.5,
    overrides: Overrides = None,
    form: Form = "text",
) -> None:
    """Show each layer's update: its size, its effective rank, and the new singular vectors that it brings."""
    import pandas as pd

    from fedlora.compare import render_table, require_format
    from fedlora.evaluation.pretrained_adapter import find_adapter, load_for
    from fedlora.model import changed_weights
    from fedlora.spectrum import spectrum as look

    require_format(form)
    if not 0 < epsilon < 1:
        raise ConfigError(
            f"--epsilon {epsilon:g} is not a cosine between 0 and 1: give one such as 0.5", code="out-of-range"
        )
    source = find_adapter(adapter, overrides or [])
    model, _ = load_for(source, None)
    rows = []
    for name, before, after in changed_weights(model.model):
        found = look(before, after - before, top=top, epsilon=epsilon)
        size, rank = found.size, found.effective_rank
        shown = [repr(size), repr(rank)] if form == "csv" else [f"{size:.3g}", f"{rank:.2f}"]
        rows.append([name, *shown, str(found.intruders)])
    if not rows:
        raise ConfigError(
            f"{str(adapter)!r} changes no linear layer, so that it has no spectrum: name another adapter",
            code="no-linear-change",
        )
    header = ["layer", "|D| / |W0|", "effective rank", f"new of the first {top}"]
    typer.echo(render_table(pd.DataFrame(rows, columns=header), form), nl=False)
