"""`fedsim state`: a coordinator's state folder saved, restored, and shown to those who help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli import output
from fedsim.cli.settings import Command, settings_of

app = typer.Typer(rich_markup_mode=None)

State = Annotated[Path, typer.Argument(metavar="STATE", help="State folder of the coordinator.")]


@app.command("backup", cls=Command)
def backup(
    context: typer.Context,
    state: State,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Tar file to write; it holds keys and updates.")
    ],
) -> None:
    """Save the state of a coordinator that is not running into one file."""
    from fedsim.server.backup import back_up

    count = back_up(state, file)
    lines = [
        f"{count} files and folders of {state} are in {file}",
        "It holds the coordinator's key and clients' updates: keep it like them.",
    ]
    output.result(settings_of(context), {"file": str(file), "files": count}, lines)


@app.command("restore", cls=Command)
def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What fedsim state backup wrote.")],
    state: State,
) -> None:
    """Unpack a backup into a new folder; the coordinator gets the next incarnation."""
    from fedsim.server.backup import restore as unpack

    incarnation = unpack(file, state)
    lines = [
        f"{state} is restored, incarnation {incarnation}",
        "Runs go on from where the backup was made; later rounds are trained again.",
        f"Next: fedsim doctor --state {state}, then fedsim server --state {state}",
    ]
    output.result(settings_of(context), {"state": str(state), "incarnation": incarnation}, lines)


@app.command("support", cls=Command)
def support(
    context: typer.Context,
    state: State,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, such as support.tar.gz.")],
) -> None:
    """Collect what helps to find a mistake, without keys, tokens, updates or models."""
    from fedsim.server.backup import support_bundle

    names = support_bundle(state, file)
    lines = [f"{len(names)} texts are in {file}; look through them before you send it:", *names]
    output.result(settings_of(context), {"file": str(file), "files": names}, lines)
