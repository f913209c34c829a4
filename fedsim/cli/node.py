"""`fedsim node`: who may take part in a federation.

With ``--connect`` the coordinator is asked, by a key that administers it. With ``--state`` the commands work
on the state folder of a coordinator that is not running: whoever owns the folder needs no key, so nobody is
locked out for good.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsim.cli import output
from fedsim.cli.node_local import opened
from fedsim.cli.operate import Ca, Connect, Insecure, OwnKey, target_of
from fedsim.cli.settings import Command, settings_of
from fedsim.printable import printable

app = typer.Typer(rich_markup_mode=None)

Row = Mapping[str, Any]  # Any: JSON

State = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="State folder of a coordinator that is not running, instead of --connect."
    ),
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="server.toml of that coordinator, instead of --state.")
]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="Name or identifier.")]


@app.command("invite", cls=Command)
def invite(
    context: typer.Context,
    role: Annotated[str, typer.Option(help="client, viewer, operator or admin.")] = "client",
    name: Annotated[str, typer.Option(help="That the node gets; without one it chooses.")] = "",
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="That the node gets; may be repeated.")
    ] = None,
    valid: Annotated[str, typer.Option(metavar="TIME", help="For how long, such as 24h or 7d.")] = "24h",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the bundle there, with mode 0600.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="How the node reaches the coordinator; needed with --state."),
    ] = None,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    state: State = None,
    config: Config = None,
) -> None:
    """Make an enrolment bundle for one node: address, identity and authority of the coordinator, and a token.

    The token works once. Hand the bundle over like a password.
    """
    import tomli_w

    from fedsim.client.settings import labels_of
    from fedsim.identity import write_new_secret
    from fedsim.units import parse_seconds

    settings = settings_of(context)
    labels = labels_of(label or [])
    try:
        seconds = parse_seconds(valid)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--valid") from error
    _free(out)
    if _local(connect, state, config):
        if server is None:
            raise typer.BadParameter(
                "a state folder does not know how the coordinator is reached", param_hint="--server"
            )
        address = _address(server)
        with opened(state, config) as local:
            token = local.nodes.invite(role, seconds, labels, name, by="local")
            server_id = local.key.public
    else:
        from fedsim.client.operator import connect as call

        with call(target_of(connect), ca=ca, key=key, insecure=insecure) as operator:
            made = operator.invite(role, valid_seconds=seconds, labels=labels, name=name)
            token, server_id = made.token, made.server_id
            address = _address(server or operator.connection.address)
            ca = None if operator.connection.insecure else operator.connection.ca
    bundle = {"server": address, "server_id": server_id.hex(), "ca": _authority(ca), "token": token}
    text = tomli_w.dumps(bundle, multiline_strings=True)
    what = {"role": role, "name": name, "labels": labels, "valid_seconds": seconds}
    if out is None:
        output.result(settings, {**what, **bundle}, [text.rstrip()])
        return
    write_new_secret(out, text.encode())
    opens = "fedsim client --bundle" if role == "client" else "fedsim connect NAME --bundle"
    lines = [
        f"{out}: an invitation for one {role}, for {valid}",
        f"Next: {opens} {out.name}, where it belongs",
    ]
    output.result(settings, {**what, "bundle": out}, lines)


@app.command("ls", cls=Command)
def ls(
    context: typer.Context,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    state: State = None,
    config: Config = None,
) -> None:
    """List every key that the coordinator knows."""
    if _local(connect, state, config):
        with opened(state, config) as local:
            rows = [_row(node) for node in local.nodes.list()]
    else:
        from fedsim.client.operator import connect as call

        with call(target_of(connect), ca=ca, key=key, insecure=insecure) as operator:
            rows = [node.as_data() for node in operator.nodes()]
    header = ["name", "node", "role", "state", "online", "device", "last seen", "labels"]
    lines = output.columns(header, [_cells(row) for row in rows]) if rows else ["nobody is known yet"]
    waiting = [row["node_id"] for row in rows if row["state"] == "pending"]
    if waiting:
        lines += ["", f"Next: fedsim node approve {waiting[0]}"]
    output.result(settings_of(context), {"nodes": rows}, lines)


@app.command("approve", cls=Command)
def approve(
    context: typer.Context,
    node: NodeName,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    state: State = None,
    config: Config = None,
) -> None:
    """Let a node take part that waits for it. Compare the fingerprint with its owner first."""
    if _local(connect, state, config):
        with opened(state, config) as local:
            row = _row(local.nodes.approve(node, by="local"))
    else:
        from fedsim.client.operator import connect as call

        with call(target_of(connect), ca=ca, key=key, insecure=insecure) as operator:
            row = operator.approve(node).as_data()
    _tell(context, row)


@app.command("revoke", cls=Command)
def revoke(
    context: typer.Context,
    node: NodeName,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    state: State = None,
    config: Config = None,
) -> None:
    """Shut a node out, at once and for good; its answers of the open round are dropped."""
    if _local(connect, state, config):
        with opened(state, config) as local:
            row = _row(local.nodes.revoke(node, by="local"))
    else:
        from fedsim.client.operator import connect as call

        with call(target_of(connect), ca=ca, key=key, insecure=insecure) as operator:
            row = operator.revoke(node).as_data()
    _tell(context, row)


@app.command("label", cls=Command)
def label(
    context: typer.Context,
    node: NodeName,
    labels: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="To be set.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="To be removed; may be repeated.")
    ] = None,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    state: State = None,
    config: Config = None,
) -> None:
    """Set and remove labels, by which runs select their clients: fedsim run --nodes "site = a and gpu"."""
    from fedsim.client.settings import labels_of

    given = labels_of(labels or [])
    if not given and not remove:
        raise typer.BadParameter("give KEY=VALUE or --remove KEY", param_hint="KEY=VALUE")
    if _local(connect, state, config):
        with opened(state, config) as local:
            row = _row(local.nodes.label(node, given, remove or (), by="local"))
    else:
        from fedsim.client.operator import connect as call

        with call(target_of(connect), ca=ca, key=key, insecure=insecure) as operator:
            row = operator.label(node, given, remove or ()).as_data()
    _tell(context, row)


def _local(connect: str | None, state: Path | None, config: Path | None) -> bool:
    """Whether the command works on a folder; --connect may come from the environment and counts less."""
    if state is not None and config is not None:
        raise typer.BadParameter("give --state or --config, not both", param_hint="--state")
    return state is not None or config is not None


def _free(out: Path | None) -> None:
    """Refuse a file that is there before an invitation is made for it."""
    from fedsim.identity import exists_already

    if out is not None and (out.exists() or out.is_symlink()):
        raise exists_already(out)


def _address(text: str) -> str:
    from fedsim.connections import parse_address

    try:
        return str(parse_address(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--server") from error


def _authority(ca: Path | None) -> str:
    """The certificates to trust, as a text for the bundle."""
    if ca is None:
        return ""
    from cryptography.hazmat.primitives.serialization import Encoding

    from fedsim.certificate_files import load_authorities, parse

    content = load_authorities(ca)
    # Written anew: a private key that lies in the same file stays where it is.
    return b"".join(c.public_bytes(Encoding.PEM) for c in parse(content, ca)).decode()


def _row(node: Any) -> Row:  # Any: Node, whose module is not loaded for --help
    names = ("node_id", "name", "state", "role", "last_seen", "build", "device", "fingerprint")
    return {**{name: getattr(node, name) for name in names}, "labels": dict(node.labels), "online": False}


def _cells(row: Row) -> Sequence[str]:
    seen = row["last_seen"]
    ago = time.strftime("%Y-%m-%d %H:%M", time.localtime(seen)) if seen else "never"
    return [
        printable(row["name"], longest=64),
        row["node_id"],
        row["role"],
        row["state"],
        "yes" if row["online"] else "no",
        printable(row["device"], longest=32) or "-",
        ago,
        printable(_labels(row["labels"]), longest=200),
    ]


def _labels(labels: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items())) or "-"


def _tell(context: typer.Context, row: Row) -> None:
    names = ("name", "node_id", "state", "role", "fingerprint")
    shown = {name: printable(str(row[name]), longest=200) for name in names}
    output.result(settings_of(context), row, output.pairs({**shown, "labels": _labels(row["labels"])}))
