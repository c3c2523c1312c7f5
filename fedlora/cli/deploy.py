"""`fedlora deploy`: a federation on many machines, by Flower's own programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.cli._common import App, Config, Overrides, app
from fedlora.errors import DeployError, nearest

if TYPE_CHECKING:
    from fedlora.deploy import NodePlan

deploy = App(help="A federation on many machines, by Flower's own programs.", no_args_is_help=True)
app.add_typer(deploy, name="deploy")

Folder = Annotated[Path, typer.Argument(metavar="DIR", show_default=False)]


def _each(metavar: str, text: str) -> typer.models.OptionInfo:
    return typer.Option(metavar=metavar, help=text, show_default=False)


@deploy.command("init")
def init(
    folder: Folder,
    config_path: Config,
    nodes: Annotated[
        list[str], typer.Option("--node", metavar="NAME", help="A node; client k is the k-th. Repeatable.")
    ],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="HOST", help="Name or address of the coordinator; the first is what nodes use."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="That nodes connect to.")] = 8443,
    control_port: Annotated[
        int, typer.Option("--control-port", min=1, max=65535, help="Of the SuperLink, on the coordinator's loopback.")
    ] = 8000,
    data: Annotated[list[str] | None, _each("NAME=PATH", "A node's own data file, on its machine. Repeatable.")] = None,
    device: Annotated[list[str] | None, _each("NAME=DEVICE", "What a node trains on. Repeatable.")] = None,
    rank: Annotated[list[str] | None, _each("NAME=RANK", "Rank of a node's adapter. Repeatable.")] = None,
    ledger: Annotated[
        list[str] | None, _each("NAME=PATH", "A node's privacy ledger, on its machine. Repeatable.")
    ] = None,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier federation, its keys too.")
    ] = False,
) -> None:
    """Write certificates, keys, secrets and configs: a folder for the coordinator, and one to hand to each node."""
    from fedlora.config import load_config
    from fedlora.deploy import FederationPlan, NodePlan, write_project

    given = {"data": data, "device": device, "rank": rank, "ledger": ledger}
    table = {what: _by_node(what, values or [], nodes) for what, values in given.items()}
    plan = FederationPlan(
        hosts=tuple(hosts or ["localhost"]),
        nodes=tuple(_node(NodePlan(name), table) for name in nodes),
        port=port,
        control_port=control_port,
    )
    if overwrite and folder.exists():
        typer.echo(f"replacing {folder}")
    write_project(folder, load_config(config_path, overrides or []), plan, overwrite=overwrite)
    typer.echo(f"{folder}: nodes connect to {plan.public}; what to do now is in {folder / 'README.md'}")


@deploy.command("up")
def up(
    folder: Folder,
    show: Annotated[bool, typer.Option("--print", help="Print the commands instead of running them.")] = False,
) -> None:
    """Run Flower's programs for a coordinator's or a node's folder, until Ctrl-C."""
    import fedlora.deploy

    if show:
        typer.echo(fedlora.deploy.script(folder), nl=False)
    else:
        fedlora.deploy.up(folder, typer.echo)


@deploy.command("sign")
def sign(
    folder: Folder,
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="Your Ed25519 key, as ssh-keygen -t ed25519 makes it.")
    ],
    days: Annotated[int, typer.Option(min=0, max=3650, help="How long the signature is valid.")] = 90,
) -> None:
    """Sign the app's run.toml as it is, so that sites which name your key in their policy let it run."""
    import datetime

    from fedlora.deploy.signing import RUN, app_of, read_app, write_signature
    from fedlora.flower.app_config import by_itself
    from fedlora.hashing import code_digest
    from fedlora.site.approvals import config_hash
    from fedlora.site.signatures import Statement, public_line, read_key, sign

    app, private = app_of(folder), read_key(key)
    until = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=days)
    statement = Statement(config_hash(by_itself(read_app(app / RUN)[0])), code_digest(), until)
    write_signature(app, sign(statement, private))
    typer.echo(f"signed until {until}: config {statement.config}, fedlora {statement.code}")
    typer.echo(f"sites that trust this key have in policy.toml: signers = ['NAME {public_line(private)}']")


@deploy.command("doctor")
def doctor(
    folder: Folder,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FILE", help="On a node: a run.toml, of which to say what would fail here."),
    ] = None,
) -> None:
    """Say what is wrong with a coordinator's or a node's folder and connections, and what of a run would fail there."""
    from fedlora.deploy.doctor import examine
    from fedlora.deploy.run_checks import Run
    from fedlora.deploy.signing import read_app
    from fedlora.flower.app_config import by_itself
    from fedlora.flower.node_list import registered_nodes
    from fedlora.hashing import code_digest

    def read(file: Path) -> Run:
        config, signature = read_app(file)
        return Run(by_itself(config), signature, code_digest())

    faults = 0
    for finding in examine(folder, registered_nodes, read, run):
        typer.echo(finding)
        faults += bool(finding.cure)
    if faults:
        raise DeployError(f"{faults} fault{'s' if faults > 1 else ''} found: see the lines above", code="faults-found")


def _by_node(what: str, values: list[str], nodes: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator or not text:
            raise DeployError(f"--{what} {value!r} must have the form NAME={what.upper()}", code="not-key-value")
        if name not in nodes:
            raise DeployError(
                f"--{what} {value!r}: there is no node {name!r}; {nearest(name, nodes)}", code="no-such-node"
            )
        found[name] = text
    return found


def _node(node: NodePlan, table: dict[str, dict[str, str]]) -> NodePlan:
    changes: dict[str, str | int] = {what: values[node.name] for what, values in table.items() if node.name in values}
    if "rank" in changes:
        if not str(changes["rank"]).isdecimal() or int(changes["rank"]) < 1:
            raise DeployError(
                f"--rank {node.name}={changes['rank']}: the rank must be a whole number from 1", code="bad-value"
            )
        changes["rank"] = int(changes["rank"])
    return replace(node, **changes)  # type: ignore[arg-type]
