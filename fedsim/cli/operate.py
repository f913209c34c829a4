"""What operators do with a coordinator: connect, run there, watch, pause and end runs, shut it down."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli import output
from fedsim.cli.following import finish, follow, print_logs
from fedsim.cli.settings import Settings, settings_of
from fedsim.errors import ConfigError
from fedsim.printable import printable

if TYPE_CHECKING:
    from fedsim.client.operator import Operator
    from fedsim.client.operator_views import RemoteRun
    from fedsim.config import Loaded

Connect = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        envvar="FEDSIM_CONNECT",
        show_envvar=True,
        help="Coordinator: an entry of connections.toml, or HOST:PORT.",
    ),
]
Ca = Annotated[Path | None, typer.Option(metavar="FILE", help="Certificates to trust.")]
OwnKey = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Your private key.")]
RemoteName = Annotated[str, typer.Argument(metavar="RUN", help="Identifier or name of a run there.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain text; on loopback alone.")]


def connect(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="How to call the coordinator from now on.")],
    bundle: Annotated[
        Path, typer.Option(metavar="FILE", help="From an admin's fedsim node invite --role operator.")
    ],
    key: OwnKey = None,
    insecure: Insecure = False,
) -> None:
    """Make a coordinator known here, and yourself known to it."""
    from fedsim.client.operator_enrol import enrol, read_bundle
    from fedsim.connections import home

    settings = settings_of(context)
    connection, state = enrol(home(), name, read_bundle(bundle), key=key, insecure=insecure)
    data = {"name": name, "address": connection.address, "key": str(connection.key), "state": state}
    lines = output.pairs(data)
    if state == "pending":
        lines.append("an admin has to approve this key: fedsim node approve")
    output.result(settings, data, [*lines, f"Next: fedsim watch --connect {name}"])


def watch(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run; without one all are listed.")
    ] = None,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.0, help="Exit with 4 where the run goes on after."),
    ] = None,
) -> None:
    """Follow a run on a coordinator until it ends; without RUN list the runs."""
    from fedsim.client.operator import connect as call

    settings = settings_of(context)
    target = target_of(connect)
    with call(target, ca=ca, key=key, insecure=insecure) as operator:
        if run is None:
            _list(settings, operator)
            return
        found = operator.get(run)
        found = follow(settings, operator, found, target=target, seconds=timeout)
        finish(settings, operator, found)


def stop(
    context: typer.Context,
    run: RemoteName,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the open round.")] = False,
) -> None:
    """Stop a run on a coordinator after its open round; what is committed stays."""
    from fedsim.client.operator import connect as call

    with call(target_of(connect), ca=ca, key=key, insecure=insecure) as operator:
        found = operator.stop(run, now=now)
    output.result(settings_of(context), found.as_data(), [_told(found)])


def pause(
    context: typer.Context,
    run: RemoteName,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
) -> None:
    """Halt a run on a coordinator at once, for fedsim continue to go on with in the middle of its round."""
    from fedsim.client.operator import connect as call

    target = target_of(connect)
    with call(target, ca=ca, key=key, insecure=insecure) as operator:
        found = operator.pause(run)
    paused = found.state == "paused"  # a run that is over stays what it is
    hint = [f"Next: fedsim continue {found.run_id} --connect {target}"] if paused else []
    output.result(settings_of(context), found.as_data(), [_told(found), *hint])


def go_on(
    context: typer.Context,
    run: RemoteName,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
) -> None:
    """Go on with a run on a coordinator that is paused, was stopped or has failed."""
    from fedsim.client.operator import connect as call

    target = target_of(connect)
    with call(target, ca=ca, key=key, insecure=insecure) as operator:
        found = operator.resume(run)
    hint = [] if found.over else [f"Next: fedsim watch {found.run_id} --connect {target}"]
    output.result(settings_of(context), found.as_data(), [_told(found), *hint])


def logs(
    context: typer.Context,
    run: RemoteName,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Also the lines to come, until the run is over.")
    ] = False,
) -> None:
    """Print the log of a run on a coordinator."""
    from fedsim.client.operator import connect as call

    target = target_of(connect)
    with call(target, ca=ca, key=key, insecure=insecure) as operator:
        print_logs(settings_of(context), operator, run, target=target, more=follow)


def drain(
    context: typer.Context,
    connect: Connect = None,
    ca: Ca = None,
    key: OwnKey = None,
    insecure: Insecure = False,
) -> None:
    """Shut a coordinator down in good order; started again it goes on with its runs. For an admin."""
    from fedsim.client.operator import connect as call

    target = target_of(connect)
    with call(target, ca=ca, key=key, insecure=insecure) as operator:
        operator.drain()
        where = str(operator.connection)
    data = {"connection": target, "draining": True}
    output.result(settings_of(context), data, [f"{where} drains: transfers end, then the process"])


def health(
    context: typer.Context,
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Coordinator; or a connection's name.")],
    ca: Ca = None,
    insecure: Insecure = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="To wait for an answer.")] = 10.0,
) -> None:
    """Ask whether a coordinator serves: exit 0 where it does, 3 where it does not."""
    from fedsim.client.health import check_health
    from fedsim.client.operator_problems import no_service
    from fedsim.connections import connection_of

    connection = connection_of(address, ca=ca, insecure=insecure)
    status = check_health(connection, seconds=timeout)
    if status != "SERVING":
        raise no_service(status, where=str(connection))
    output.result(settings_of(context), {"address": connection.address, "status": status}, [status])


def run_on_server(
    settings: Settings,
    loaded: Loaded,
    *,
    connect: str | None,
    ca: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
    nodes: str = "",
    run_key: str | None = None,
    detach: bool = False,
    require: bool = False,
) -> None:
    """``fedsim run --engine server``: submit a configuration, follow the run, bring its results here.

    Args:
        connect: entry of connections.toml or address; the only entry where it is None.
        nodes: label expression; every approved client without one.
        run_key: the same key and configuration is the same run.
        detach: return as soon as the coordinator has taken it.
        require: whether missing `[evaluation] target` is an error.

    Raises:
        CoordinatorProblem, CoordinatorRefused: see `fedsim.client.operator`.
        Interrupted: Ctrl-C; the run goes on.
        RunFailed: the outcome is failure.
    """
    from fedsim.client.operator import connect as call
    from fedsim.config import to_toml

    target = target_of(connect)
    config = loaded.config
    with call(target, ca=ca, key=key, insecure=insecure) as operator:
        run = operator.submit(to_toml(config), name=config.run.name or "", run_key=run_key, nodes=nodes)
        output.note(settings, f"{printable(run.name)}: run {run.run_id} on {operator.connection}")
        settings.result = {"run_id": run.run_id, "name": run.name}
        if detach:
            lines = [
                f"run {run.run_id} goes on without you",
                f"Next: fedsim watch {run.run_id} --connect {target}",
            ]
            output.result(settings, run.as_data(), lines)
            return
        ended = follow(settings, operator, run, target=target)
        finish(settings, operator, ended, require=require)


def target_of(connect: str | None) -> str:
    """The coordinator that is meant: `connect`, or the only one that is known.

    Raises:
        ConfigError: FS-CFG-128, none is named and there is not exactly one.
    """
    from fedsim.connections import FILE, home, read_connections

    if connect is not None:
        return connect
    known = read_connections(home(os.environ))
    if len(known) == 1:
        return next(iter(known))
    raise ConfigError(
        "no coordinator is named",
        code="FS-CFG-128",
        where="--connect",
        why=f"{home(os.environ) / FILE} knows {', '.join(known) or 'none'}",
        hint="give --connect NAME or --connect HOST:PORT, or set FEDSIM_CONNECT",
    )


def _told(run: RemoteRun) -> str:
    state = printable(f"{run.state} ({run.detail})" if run.detail else run.state)
    return f"{printable(run.name)} ({run.run_id}): {state}, {run.rounds_done} rounds done"


def _list(settings: Settings, operator: Operator) -> None:
    found = operator.list()
    rows = [
        [
            r.run_id,
            printable(r.name),
            r.state,
            f"{r.rounds_done}/{r.rounds}",
            f"{r.online}/{r.clients}",
            printable(r.detail),
        ]
        for r in found
    ]
    lines = output.columns(["run", "name", "state", "rounds", "online", "detail"], rows, right=(3, 4))
    hint = f"Next: fedsim watch {found[-1].run_id}" if found else "Next: fedsim run CONFIG --engine server"
    output.result(settings, {"runs": [r.as_data() for r in found]}, [*lines, hint])
