"""Arguments that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.imports import uncollected

if TYPE_CHECKING:
    from fedsim.config import Loaded

FILE = Path("fedsim.toml")

ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="TOML file; without one ./fedsim.toml, or else the defaults."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Replace one value; may be repeated."),
]
Preset = Annotated[
    str | None, typer.Option(help="Start from a published setting; see docs/configuration.md.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder, name or beginning of a name of a run.")]


def load(
    file: Path | None,
    *,
    preset: str | None = None,
    sets: list[str] | None = None,
    flags: dict[str, tuple[str, object]] | None = None,
) -> Loaded:
    """The configuration that a command line means; keys whose flag was not given are left out."""
    with uncollected(keep=True):
        from fedsim.config import load_config
    import_from_here()
    if file is None and FILE.is_file():
        file = FILE
    given = {key: pair for key, pair in (flags or {}).items() if pair[1] is not None}
    return load_config(file, preset=preset, sets=sets or [], environ=os.environ, flags=given)


def import_from_here() -> None:
    """Let a model named by ``target`` be imported from the current folder, as with ``python -m``."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
