"""The options that every command takes, before or after the command's own ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from typer.core import TyperCommand, TyperGroup, TyperOption

FORMATS = ("text", "json", "jsonl")


@dataclass(slots=True)
class Settings:
    """What the common options say; filled in while the command line is read.

    Args:
        verbosity: -1 with ``-q``, 0, 1 with ``-v``, 2 with ``-vv``.
        format: ``text``, ``json`` or ``jsonl``.
        color: whether colours are allowed at all; a pipe and NO_COLOR switch them off anyway.
        progress: whether a live view may be shown.
        runs: where run folders lie.
        traceback: whether an error shows where in the program it arose.
        result: of a command that ends with an error and has something to report all the same.
    """

    verbosity: int = 0
    format: str = "text"
    color: bool = True
    progress: bool = True
    runs: Path = Path("runs")
    traceback: bool = False
    result: dict[str, Any] = field(default_factory=dict)  # Any: JSON

    @property
    def quiet(self) -> bool:
        return self.verbosity < 0


def peek(arguments: Sequence[str]) -> Settings:
    """The options that matter to an error in the command line itself, where reading it fails."""
    settings = Settings(traceback="--traceback" in arguments, color="--no-color" not in arguments)
    for place, word in enumerate(arguments):
        name, equals, chosen = word.partition("=")
        if name == "--format":
            chosen = chosen if equals else "".join(arguments[place + 1 : place + 2])
            settings.format = chosen if chosen in FORMATS else settings.format
    return settings


def _sets(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        # An option that was not given keeps what another place of the command line said.
        source = context.get_parameter_source(parameter.name or "")
        if source is not click.core.ParameterSource.DEFAULT:
            setattr(settings_of(context), name, value)

    return store


def _verbosity(step: int) -> Callable[[click.Context, click.Parameter, int], None]:
    def store(context: click.Context, parameter: click.Parameter, value: int) -> None:
        if value:
            settings_of(context).verbosity = step * value

    return store


def settings_of(context: click.Context) -> Settings:
    """The settings of this call of the program."""
    settings = context.find_root().obj
    assert isinstance(settings, Settings)
    return settings


def options() -> list[click.Parameter]:
    """The common options, new for each command."""

    def option(*names: str, text: str, callback: Any, **more: Any) -> TyperOption:
        return TyperOption(
            param_decls=list(names), help=text, callback=callback, expose_value=False, is_eager=True, **more
        )

    return [
        option("-q", "--quiet", text="Only the result.", callback=_verbosity(-1), count=True, default=0),
        option(
            "-v",
            "--verbose",
            text="More on stderr; -vv for all.",
            callback=_verbosity(1),
            count=True,
            default=0,
        ),
        option(
            "--format",
            text="Form of the output; json puts exactly one document on stdout.",
            type=click.Choice(FORMATS),
            default="text",
            callback=_sets("format"),
        ),
        option(
            "--runs",
            text="Folder of the run folders.",
            type=click.Path(path_type=Path),
            default=Path("runs"),
            envvar="FEDSIM_RUNS",
            show_envvar=True,
            callback=_sets("runs"),
        ),
        option(
            "color", "--no-color", text="No colours (as NO_COLOR).", callback=_negated("color"), is_flag=True
        ),
        option(
            "progress", "--no-progress", text="No live view.", callback=_negated("progress"), is_flag=True
        ),
        option("--traceback", text="Show where an error arose.", callback=_sets("traceback"), is_flag=True),
    ]


def _negated(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def store(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            setattr(settings_of(context), name, False)

    return store


def _as_written(formatter: click.HelpFormatter) -> None:
    """typer escapes brackets for rich, which does not print this help, and shows the range of a count."""
    formatter.buffer = [piece.replace("\\[", "[").replace("  [x>=0]", "") for piece in formatter.buffer]


class Command(TyperCommand):
    """A command with the common options."""

    def __init__(self, *arguments: Any, params: list[click.Parameter] | None = None, **more: Any) -> None:
        super().__init__(*arguments, params=[*(params or []), *options()], **more)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help(ctx, formatter)
        _as_written(formatter)


class Group(TyperGroup):
    """A group of commands with the common options."""

    def __init__(self, *arguments: Any, params: list[click.Parameter] | None = None, **more: Any) -> None:
        super().__init__(*arguments, params=[*(params or []), *options()], **more)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help(ctx, formatter)
        _as_written(formatter)
