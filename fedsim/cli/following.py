"""A run on a coordinator, followed from here: its rounds shown, its files brought, its end told."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.cli import output
from fedsim.cli.settings import Settings
from fedsim.errors import Interrupted, RunFailed
from fedsim.printable import printable

if TYPE_CHECKING:
    from fedsim.client.operator import Operator
    from fedsim.client.operator_views import RemoteRun
    from fedsim.runs.folder import RunFolder

FETCHED = (
    "config.toml", "metrics.jsonl", "clients.jsonl", "rounds.csv", "journal.jsonl", "log.txt", "report.html",
    "checkpoints/best.safetensors", "checkpoints/final.safetensors", "manifest.json",
)  # fmt: skip
"""Files of a run that are brought here when it has ended; the manifest comes last and makes it a run."""
_FURTHER = re.compile(r"(checkpoints|plots)/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LONGEST_LINE = 16 * 1024


def follow(
    settings: Settings,
    operator: Operator,
    run: RemoteRun,
    *,
    target: str,
    seconds: float | None = None,
    alive: Callable[[], None] = lambda: None,
) -> RemoteRun:
    """Show a run until it is over; the run as it is then.

    Args:
        target: how the coordinator was named, for the texts.
        seconds: to wait at most.
        alive: called about once a second while nothing happens; raises to end the watching.

    Raises:
        Interrupted: Ctrl-C; only the watching ends.
        TimedOut: FS-SRV-027.
    """
    from fedsim.cli.view import view_for

    metric = _metric(run)
    view = view_for(settings, printable(run.name), rounds=run.rounds, metric=metric)
    try:
        with view:
            said = ""
            for event in operator.watch(run.run_id, seconds=seconds, tick=alive):
                if event.type == "round":
                    view.record(_shown(event.data))
                elif event.type == "state":
                    detail = printable(str(event.data.get("detail") or ""))
                    if detail and detail != said:
                        said = detail
                        output.note(settings, f"{printable(str(event.data.get('state')))}: {detail}")
    except KeyboardInterrupt:
        raise Interrupted(
            "watching has ended, the run goes on",
            code="FS-INT-003",
            where=f"run {run.run_id}",
            hint=f"fedsim watch {run.run_id} --connect {target} goes on; fedsim stop {run.run_id} ends it",
        ) from None
    return operator.get(run.run_id)


def print_logs(settings: Settings, operator: Operator, run: str, *, target: str, more: bool) -> None:
    """Print the lines of a run's log as they come; with json all of them in one document.

    Args:
        target: how the coordinator was named, for the texts.
        more: also the lines to come, until the run is over.

    Raises:
        Interrupted: Ctrl-C; only the watching ends.
    """
    lines = []
    try:
        for line in operator.logs(run, follow=more):
            if settings.format == "text":
                output.write(sys.stdout, printable(line, longest=_LONGEST_LINE))
            elif settings.format == "jsonl":
                output.event("log", {"line": line})
            else:
                lines.append(line)
    except KeyboardInterrupt:
        raise Interrupted(
            "watching has ended, the run goes on",
            code="FS-INT-003",
            where=f"run {run}",
            hint=f"fedsim logs {run} --follow --connect {target} shows its log again",
        ) from None
    if settings.format == "json":
        output.document(settings, "ok", {"run": run, "lines": lines})
    elif settings.format == "jsonl":
        output.document(settings, "ok", {"run": run})


def finish(settings: Settings, operator: Operator, run: RemoteRun, *, require: bool = False) -> None:
    """Bring the results of a run that has ended here, print the end block and, where it is one, the error."""
    from fedsim.cli.ending import end_block, run_data

    folder = fetch_folder(operator, run, settings.runs)
    data = {**run_data(folder), "run_id": run.run_id, "state": run.state}
    lines = end_block(folder, data, rounds=run.rounds)
    unmet = require and run.state != "target"
    if run.state != "failed" and not unmet:
        output.result(settings, data, lines)
        return
    settings.result = data
    for line in lines:
        output.say(settings, line)
    if run.state == "failed":
        error = data.get("error") or {}
        raise RunFailed(
            "the run on the coordinator failed",
            code="FS-SRV-026",
            where=f"run {run.run_id}, after {run.rounds_done} of {run.rounds} rounds",
            why=printable(run.detail or str(error.get("what") or "the coordinator gave no reason")),
            hint=f"its log: {folder.path / 'log.txt'}",
        )
    raise RunFailed(
        "the target was not reached",
        code="FS-RUN-010",
        where="[evaluation] target",
        why=f"after {run.rounds_done} rounds",
        hint="give the run more rounds, or change the settings",
    )


def fetch_folder(operator: Operator, run: RemoteRun, runs: Path) -> RunFolder:
    """Bring the files of a run into a folder below `runs` that has the same name as on the coordinator.

    Raises:
        CoordinatorRefused: FS-SRV-024, the run has no manifest yet.
        EnvironmentProblem: a file cannot be written.
    """
    from fedsim.client.operator_problems import CoordinatorRefused
    from fedsim.runs.folder import CHECKPOINTS, PLOTS, STATE, RunFolder
    from fedsim.runs.names import slug
    from fedsim.storage import problem

    path = runs / slug(run.folder or run.run_id)
    try:
        for part in (CHECKPOINTS, PLOTS, STATE):
            (path / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise problem(error, path) from error
    for name in FETCHED:
        try:
            operator.artifact(run.run_id, name, path / name)
        except CoordinatorRefused as refused:
            if refused.status != "NOT_FOUND" or name == FETCHED[-1]:
                raise
    folder = RunFolder(path)
    # What the manifest names besides; a coordinator must not choose where files are written here.
    for name in sorted(set(folder.manifest["files"]) - set(FETCHED)):
        if _FURTHER.fullmatch(name):
            operator.artifact(run.run_id, name, path / name)
    return folder


def _metric(run: RemoteRun) -> str:
    names = [n for n in ("accuracy", "perplexity", "loss") if n in run.record]
    return names[0] if names else "accuracy"


def _shown(record: Any) -> dict[str, Any]:
    """A record of the wire with everything that a view reads."""
    shown = {"outcome": "ok", **record}
    number = 0
    with suppress(TypeError, ValueError):
        number = int(shown.get("round") or 0)
    time = shown.get("time")
    return {
        **shown,
        "round": number,
        "time": {"seconds": 0.0, "rss_mb": 0.0, **(time if isinstance(time, dict) else {})},
    }
