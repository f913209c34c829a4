"""`fedsim keys` and `fedsim certs`: who somebody is, and certificates for a trial."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli import output
from fedsim.cli.settings import Command, settings_of

app = typer.Typer(rich_markup_mode=None)
certs = typer.Typer(rich_markup_mode=None)


@app.command("new", cls=Command)
def new(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To be made, with mode 0600.")],
) -> None:
    """Make a key for a client or an operator; nothing is ever overwritten."""
    from fedsim.identity import Key

    key = Key.new()
    key.save(file)
    _tell(context, file, key.public)


@app.command("show", cls=Command)
def show(
    context: typer.Context, file: Annotated[Path, typer.Argument(metavar="FILE", help="A private key.")]
) -> None:
    """Show the public half of a key: identifier, fingerprint, and the key itself."""
    from fedsim.identity import Key

    _tell(context, file, Key.load(file).public)


def _tell(context: typer.Context, file: Path, public: bytes) -> None:
    from fedsim.identity import fingerprint_of, node_id_of

    found = {"node": node_id_of(public), "fingerprint": fingerprint_of(public), "public": public.hex()}
    data = {**found, "file": file}
    output.result(settings_of(context), data, output.pairs(data))


@certs.command("dev", cls=Command)
def dev(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of the authority and what it issues.")],
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name or IP address of the coordinator; may be repeated. Default: localhost."),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(help="Name of a client that needs a certificate (mTLS); may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="For which the certificates are valid.")] = 30,
) -> None:
    """Make a development authority and a certificate for the coordinator; run it again to renew that one."""
    from fedsim.server import certificates

    names = name or ["localhost", "127.0.0.1", "::1"]
    ca = certificates.make_ca(folder)
    server = certificates.issue(folder, names, days)
    clients = [certificates.issue_client(folder, one, days) for one in client or ()]
    data = {
        "ca": ca,
        "cert": server,
        "cert_key": server.with_suffix(".key"),
        "names": names,
        "clients": clients,
    }
    lines = [
        f"{ca}      for clients and operators: --ca",
        f"{server}  for the coordinator: --cert, with {server.with_suffix('.key').name}: --cert-key",
        *(
            f"{path}  for a client: --cert, with {path.with_suffix('.key').name}: --cert-key"
            for path in clients
        ),
        "",
        f"Made out to {', '.join(names)} for {days} days.",
        f"{certificates.CA_KEY} stays here: whoever has it can be any coordinator.",
    ]
    output.result(settings_of(context), data, lines)
