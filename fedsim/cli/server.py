"""`fedsim server`: the coordinator."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.arguments import import_from_here
from fedsim.cli.settings import settings_of
from fedsim.imports import uncollected

LEVELS = {-1: "error", 1: "debug", 2: "debug"}


def server(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="server.toml; flags win over it.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Database, objects, runs.  [default: fedsim-state]")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="For clients.  [default: 127.0.0.1:8470]")
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="For metrics.  [default: 127.0.0.1:8471]")
    ] = None,
    http_token: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Token that /metrics asks for.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate of the coordinator.")] = None,
    cert_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask clients for certificates of this authority.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text; on loopback alone.")] = False,
    insecure_beyond_loopback: Annotated[
        bool, typer.Option("--insecure-beyond-loopback", help="Lift that limit.")
    ] = False,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Let keys in without a token; on loopback alone.")
    ] = False,
    log_format: Annotated[str | None, typer.Option(help="auto, json or text.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Run the coordinator of a federation, until Ctrl-C or SIGTERM.

    The first signal lets transfers end and exits with 0, the second stops at once. Started again on the
    same state folder it goes on where it was.
    """
    # Before grpc is loaded: children are spawned, never forked.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    with uncollected(keep=True):
        import asyncio

        from fedsim.server.coordinator import serve
        from fedsim.server.settings import load_settings

    settings = settings_of(context)
    flags: dict[str, object] = {
        "server.state": None if state is None else str(state),
        "server.listen": listen,
        "server.http": http,
        "server.http_token": None if http_token is None else str(http_token),
        "server.cert": None if cert is None else str(cert),
        "server.cert_key": None if cert_key is None else str(cert_key),
        "server.client_ca": None if client_ca is None else str(client_ca),
        "server.insecure": insecure or None,
        "server.insecure_beyond_loopback": insecure_beyond_loopback or None,
        "server.allow_anonymous": allow_anonymous or None,
        "server.log_format": log_format,
        "server.log_level": log_level or LEVELS.get(max(-1, min(settings.verbosity, 2))),
    }
    import_from_here()
    code = asyncio.run(serve(load_settings(config, flags=flags, environ=os.environ)))
    if code:
        sys.exit(code)
