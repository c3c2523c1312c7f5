"""`fedlora node`: what a site decides about its own machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._common import App, app

node = App(help="What a site decides about its own machine.", no_args_is_help=True)
app.add_typer(node, name="node")

Site = Annotated[Path, typer.Argument(metavar="SITE", help="The folder with the site's policy.toml.")]


Digest = Annotated[str, typer.Argument(metavar="HASH", help="Hash of a run's config, or its beginning.")]


@node.command("show")
def show(
    folder: Site,
    digest: Annotated[
        str | None, typer.Argument(metavar="[HASH]", help="A run's config to show instead.", show_default=False)
    ] = None,
) -> None:
    """Show the policy as the worker reads it, the runs that may run and those that wait; or one run's config."""
    from fedlora.site.approvals import Approvals
    from fedlora.site.policy import load_policy

    approvals = Approvals(folder)
    if digest is not None:
        typer.echo(approvals.text(digest), nl=False)
        return
    for key, value in load_policy(folder).model_dump(mode="json", exclude_none=True).items():
        typer.echo(f"{key} = {json.dumps(value)}")
    for what, found in (("approved", approvals.approved()), ("waits", approvals.waiting())):
        for one in found:
            typer.echo(f"{what} {one}")


@node.command("approve")
def approve(folder: Site, digest: Digest) -> None:
    """Let a run that waits go on, by the hash of its config: read it first."""
    from fedlora.site.approvals import Approvals

    typer.echo(f"approved {Approvals(folder).approve(digest)}")


@node.command("export")
def export(
    folder: Site,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The run's adapter, from the coordinator.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    run: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Of the run (run-id in its folder), if several are kept.", show_default=False),
    ] = None,
) -> None:
    """Write this node's own model of a run whose rule makes one for each client: it is here alone."""
    from fedlora.errors import ExportError
    from fedlora.site.own_adapter import write_own_adapter

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{str(out)!r} already exists: name a new or empty folder", code="path-taken")
    number = write_own_adapter(folder, adapter, out, run)
    typer.echo(f"this node's own adapter is in {out}, with what it kept of round {number}")


@node.command("log")
def log(
    folder: Site,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only say whether each line is as it was written, and the head.")
    ] = False,
    head: Annotated[
        str | None,
        typer.Option(
            "--head", metavar="HASH", help="An earlier head, which the log must still have.", show_default=False
        ),
    ] = None,
) -> None:
    """Print the audit log: each request and answer, with what was sent; ends with 1 where a line was tampered with."""
    from fedlora.site.audit_log import read_log

    chain = read_log(folder, head)
    if not verify:
        for record in chain.records:
            facts = {key: value for key, value in record.items() if key not in ("line", "time", "event", "hash")}
            said = " ".join(f"{key}={json.dumps(value)}" for key, value in facts.items())
            typer.echo(f"{record['line']} {record.get('time', '-')} {record.get('event')} {said}")
        return
    if chain.torn is not None:
        typer.echo(
            f"the last line was cut short by a crash or a full disk ({len(chain.torn)} bytes): nothing that was "
            "written whole is lost, and the worker records it when it starts"
        )
    typer.echo(f"{len(chain.records)} lines, each as it was written; head {chain.head or '-'}")
