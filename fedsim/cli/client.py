"""`fedsim client`: take part in the federations of a coordinator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.arguments import import_from_here
from fedsim.cli.logs import log_to_stderr
from fedsim.cli.settings import settings_of


def client(
    context: typer.Context,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Coordinator.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="File of fedsim node invite: address, identity, authority, token.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="client.toml; flags win over it.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder of this client.  [default: fedsim-client]")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Authority that signed the coordinator's certificate.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="Certificate of this client, for mTLS.")] = None,
    cert_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    key: Annotated[
        Path | None, typer.Option(help="Key of this client; made when missing.  [default: STATE/node.key]")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with a one-time enrolment token.")] = None,
    name: Annotated[str | None, typer.Option(help="Name to be known by.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Label to be chosen by; may be repeated.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="File or folder with this client's examples.")] = None,
    data_function: Annotated[
        str | None, typer.Option(metavar="PKG.MOD:FN", help="Function that returns the examples.")
    ] = None,
    copy: Annotated[Path | None, typer.Option(help="Local copy of the run's own data set.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0 or auto.  [default: auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a tensor operation.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What the owner allows.  [default: STATE/policy.toml]")
    ] = None,
    max_retries: Annotated[
        int | None, typer.Option(help="Give up after so many failed tries in a row.  [default: never]")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text; for loopback alone.")] = False,
    insecure_beyond_loopback: Annotated[
        bool, typer.Option("--insecure-beyond-loopback", help="Lift that limit.")
    ] = False,
) -> None:
    """Take part in the federations of a coordinator, until Ctrl-C.

    The client trains on its own examples what its policy file allows. It comes back by itself after a
    broken link or a restart of the coordinator, and hands in what it had finished.
    """
    from fedsim.client.main import run_client
    from fedsim.client.settings import client_settings, labels_of

    settings = settings_of(context)
    flags = {
        "server": server, "bundle": bundle, "state": state, "ca": ca, "cert": cert, "cert_key": cert_key,
        "key": key, "token_file": token_file, "name": name, "labels": labels_of(label) if label else None,
        "data": data, "data_function": data_function, "copy": copy, "device": device, "threads": threads,
        "policy": policy, "max_retries": max_retries, "insecure": insecure or None,
        "insecure_beyond_loopback": insecure_beyond_loopback or None,
    }  # fmt: skip
    import_from_here()
    # A client is a service: what it does in a few words belongs to its output.
    with log_to_stderr(replace(settings, verbosity=settings.verbosity + 1)):
        run_client(client_settings({k: v for k, v in flags.items() if v is not None}, config))
