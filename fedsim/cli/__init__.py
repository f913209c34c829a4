"""The command line: `fedsim`, one file per group of commands.

Nothing heavy is imported before a command needs it, so that ``fedsim --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import typer

from fedsim.cli import (
    client,
    config,
    data,
    demo,
    doctor,
    keys,
    node,
    operate,
    plugins,
    run,
    runs,
    server,
    state,
    sweep,
    up,
)
from fedsim.cli.output import fail, internal, out_of_memory
from fedsim.cli.settings import Command, Group, Settings, peek
from fedsim.errors import ConfigError, EnvironmentProblem, FedsimError, Interrupted

STOPPED = 130
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def _version(wanted: bool) -> None:
    if wanted:
        from fedsim import __version__

        print(f"fedsim {__version__}")
        raise typer.Exit


def make_app() -> typer.Typer:
    """The whole command line."""
    app = typer.Typer(
        name="fedsim",
        cls=Group,
        help="Federated learning: simulate federations, look after their runs.",
        epilog="fedsim demo is a good start; fedsim COMMAND --help tells more.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: bool = typer.Option(
            False, "--version", help="Print the version.", callback=_version, is_eager=True
        ),
    ) -> None:
        if context.invoked_subcommand is None:
            print(context.get_help())

    for name, function in (
        ("demo", demo.demo),
        ("run", run.run),
        ("resume", run.resume),
        ("ls", runs.ls),
        ("show", runs.show),
        ("compare", runs.compare),
        ("report", runs.report),
        ("verify", runs.verify),
        ("export", runs.export),
        ("tune", run.tune),
        ("sweep", sweep.sweep),
        ("up", up.up),
        ("server", server.server),
        ("client", client.client),
        ("connect", operate.connect),
        ("watch", operate.watch),
        ("logs", operate.logs),
        ("pause", operate.pause),
        ("continue", operate.go_on),
        ("stop", operate.stop),
        ("drain", operate.drain),
        ("health", operate.health),
        ("doctor", doctor.doctor),
        ("explain", config.explain_code),
    ):
        app.command(name, cls=Command)(function)
    for module, name, text in (
        (node, "node", "Who may take part in a federation: invite, list, approve, revoke, label."),
        (keys, "keys", "Keys of clients and operators."),
        (state, "state", "The state folder of a coordinator: back up, restore, collect for support."),
        (plugins, "plugins", "What can be named in a configuration: strategies, models, data sets …"),
        (data, "data", "Data sets and how they are divided among clients."),
        (config, "config", "Configurations: print, check, look up a key."),
    ):
        app.add_typer(module.app, name=name, help=text, cls=Group)
    app.add_typer(keys.certs, name="certs", help="Certificates for development and trials.", cls=Group)
    return app


def call(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is printed in its one form."""
    settings = peek(arguments)
    try:
        command = typer.main.get_command(make_app())
        code = command.main(list(arguments), prog_name="fedsim", standalone_mode=False, obj=settings)
    except FedsimError as error:
        return fail(settings, error)
    except click.ClickException as error:
        return fail(settings, _usage(error))
    except (KeyboardInterrupt, click.Abort):
        return _stopped(settings)
    except MemoryError as error:
        return fail(settings, out_of_memory(error))
    except OSError as error:
        if error.errno not in _REFUSED:
            return internal(settings, error)
        return fail(settings, _refused(error))
    except Exception as error:  # the last stop: everything that nobody expected
        if type(error).__name__ == "OutOfMemoryError":
            return fail(settings, out_of_memory(error))
        return internal(settings, error)
    if code == STOPPED:  # typer answers Ctrl-C by this code and without a word
        return _stopped(settings)
    return code if isinstance(code, int) else 0


def _stopped(settings: Settings) -> int:
    path = settings.result.get("path")
    error = Interrupted(
        "stopped at once",
        code="FS-INT-002",
        where=path,
        why="what was committed before stays",
        hint=f"go on from the last checkpoint with fedsim resume {Path(path).name}" if path else None,
    )
    fail(settings, error, exit_code=STOPPED)
    return STOPPED


def _usage(error: click.ClickException) -> ConfigError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = "fedsim" if context is None else context.command_path
    return ConfigError(
        error.format_message().rstrip("."),
        code="FS-CFG-020",
        where=f"command line: {path}",
        hint=f"{path} --help lists the arguments and options",
    )


def _refused(error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        "a file cannot be written or read",
        code="FS-ENV-004",
        where=str(error.filename or "unknown file"),
        why=error.strerror,
        hint="check the space on the disk and the permissions",
    )


def main() -> None:
    """Entry point of the program ``fedsim``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as by ``>&-``
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    sys.exit(call(sys.argv[1:]))
