"""`fedsim doctor`: is everything in place, here and on the way to the coordinator?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli import output
from fedsim.cli.settings import Settings, settings_of

if TYPE_CHECKING:
    from fedsim.cli.doctor_checks import Finding

_MARKS = {"ok": "ok  ", "warning": "note", "failed": "FAIL", "skipped": "skip"}
_COLOURS = {"ok": "32", "warning": "33", "failed": "1;31", "skipped": "2"}


def doctor(
    context: typer.Context,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Coordinator to reach; or the name of a connection."),
    ] = None,
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificates to trust.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text; on loopback alone.")] = False,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="State folder of a coordinator or a client.")
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A certificate whose dates and names to check.")
    ] = None,
) -> None:
    """Check this machine; with options also the way to a coordinator, a state folder, a certificate.

    Each finding says what is wrong and how to repair it. The exit code is 0 where nothing has failed.
    """
    from fedsim.cli.doctor_checks import FAILED
    from fedsim.errors import EnvironmentProblem

    settings = settings_of(context)
    findings = []
    for finding in _findings(server, ca, insecure, state, cert):
        findings.append(finding)
        if settings.format == "text" and not (settings.quiet and finding.state == "ok"):
            for line in _lines(settings, finding):
                output.write(sys.stdout, line)
    data = {"checks": [finding._asdict() for finding in findings]}
    failed = [finding.check for finding in findings if finding.state == FAILED]
    if failed:
        settings.result |= data
        raise EnvironmentProblem(
            f"{len(failed)} of {len(findings)} checks failed",
            code="FS-SEC-012",
            where=", ".join(dict.fromkeys(failed)),
            hint="repair what is printed above, then run fedsim doctor again",
        )
    if settings.format != "text":
        output.document(settings, "ok", data)


def _findings(
    server: str | None, ca: Path | None, insecure: bool, state: Path | None, cert: Path | None
) -> Iterator[Finding]:
    from fedsim.cli import doctor_checks, doctor_server

    yield doctor_checks.versions()
    yield doctor_checks.clock()
    yield doctor_checks.disk(state or Path())
    if cert is not None:
        yield doctor_checks.certificate(cert)
    if state is not None:
        yield from doctor_checks.state_folder(state)
    if server is not None:
        from fedsim.connections import connection_of

        yield from doctor_server.server(connection_of(server, ca=ca, insecure=insecure))


def _lines(settings: Settings, finding: Finding) -> list[str]:
    from fedsim.printable import printable

    mark = _MARKS[finding.state]
    if output.colours(settings, sys.stdout):
        mark = f"\x1b[{_COLOURS[finding.state]}m{mark}\x1b[0m"
    lines = [f"{mark}  {finding.check}: {printable(finding.text, longest=2_000)}"]
    if finding.repair:
        lines.append(f"      repair: {finding.repair}")
    return lines
