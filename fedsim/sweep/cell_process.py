"""One cell in a process of its own: begun or resumed, told to stop, told about.

The process gets a pipe. It sends ``("round", round, metric, value)`` after every round and
``("ended", outcome, error)`` at the end; whatever it receives, and the end of the pipe when the sweep
has died, means: stop after this round.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from fedsim.config import config_from, to_toml
from fedsim.errors import FedsimError
from fedsim.progress import Progress
from fedsim.runs.folder import MANIFEST, RunFolder
from fedsim.runs.lines import Record
from fedsim.runs.manifest import Facts
from fedsim.simulation.run import Simulation
from fedsim.simulation.session import Session, execute, resume
from fedsim.storage import problem, write_atomically
from fedsim.sweep.state import STARTING, Place, fields


class Task(NamedTuple):
    """What a process needs to know of its cell; everything in it can be pickled.

    Args:
        sweep: folder of the sweep; cell: name of the cell.
        config: nested, as in a file.
        facts: for the manifest.
        command: the words that started the sweep.
    """

    sweep: str
    cell: str
    config: dict[str, Any]  # Any: whatever TOML holds
    facts: Facts
    command: list[str]


class _Stop:
    """Whether the process was asked to stop: by the pipe, by its end, or by SIGTERM."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._asked = False
        # Ctrl-C reaches every process of the terminal; the sweep alone decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __call__(self) -> bool:
        self._asked = self._asked or self._pipe.poll()
        return self._asked

    def tell(self, *message: object) -> None:
        """Send to the sweep; where it is gone, stop."""
        try:
            self._pipe.send(message)
        except OSError:
            self._asked = True


def work(task: Task, pipe: Connection) -> None:
    """Begin or resume the cell and carry on to its end; the target of its process.

    Whatever goes wrong is told through the pipe; the process itself ends quietly.
    """
    stop = _Stop(pipe)
    place = Place(Path(task.sweep))
    _redirect(place.printed(task.cell))
    try:
        outcome, error = _carry_on(task, place, stop)
    except FedsimError as failure:
        outcome, error = "failed", fields(failure)
    except Exception as failure:  # told as the bug that it is; the other cells go on
        traceback.print_exc()
        outcome, error = "failed", _unexpected(failure, place.printed(task.cell))
    stop.tell("ended", outcome, error)


def _carry_on(task: Task, place: Place, stop: _Stop) -> tuple[str, Mapping[str, Any] | None]:
    session: Session | None = None
    if place.exists(task.cell):
        folder = place.folder(task.cell)
        sim, progress = resume(folder)
        session = Session(task.command)
    else:
        config = config_from(task.config, {})
        if config.engine.workers is None:  # a cell is one process: others are at work beside it
            config = config_from(config, {"engine": {"workers": 1}})
        sim, progress = Simulation(config), None
        if stop():  # before anything was written
            return "interrupted", None
        folder = _begin(task, place, sim)
        sim.keep_state_in(folder.state_folder)
    return _rounds(sim, folder, progress, session, stop)


def _rounds(
    sim: Simulation, folder: RunFolder, progress: Progress | None, session: Session | None, stop: _Stop
) -> tuple[str, Mapping[str, Any] | None]:
    metric = sim.evaluator.names[0]

    def told(record: Record) -> None:
        stop.tell("round", int(record["round"]), metric, record.get(metric))

    outcome = execute(sim, folder, on_record=told, stop=stop, progress=progress, session=session)
    return outcome.outcome, None if outcome.error is None else fields(outcome.error)


def _begin(task: Task, place: Place, sim: Simulation) -> RunFolder:
    """The run folder of a new cell, under the name of the cell instead of the time.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022, nothing is left behind but a folder that the next call clears.
    """
    starting = place.cells / f"{STARTING}{secrets.token_hex(4)}"
    made = RunFolder.create(
        starting,
        str(sim.config.run.name),
        config_text=to_toml(sim.config),
        facts={**sim.facts, "baseline": None, **task.facts},
        command=task.command,
    )
    final = place.cells / task.cell
    document = made.manifest
    document["run"]["folder"] = task.cell
    write_atomically(made.path / MANIFEST, (json.dumps(document, indent=2) + "\n").encode())
    try:
        made.path.rename(final)
        starting.rmdir()
    except OSError as error:
        raise problem(error, final) from error
    return RunFolder(final)


def _redirect(path: Path) -> None:
    """Let what the process prints go to a file: the sweep's own output is for the table."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)
    log = logging.getLogger("fedsim")
    log.setLevel(logging.INFO)  # for the log in the run's folder
    log.addHandler(logging.NullHandler())


def _unexpected(failure: Exception, printed: Path) -> dict[str, Any]:
    memory = isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError"
    return {
        "code": "FS-ENV-003" if memory else "FS-BUG-001",
        "what": "the memory ran out" if memory else f"internal error: {type(failure).__name__}: {failure}",
        "where": str(printed),
        "why": str(failure).partition("\n")[0],
        "hint": "lower engine.block or client.batch_size"
        if memory
        else "report it together with the file named above",
    }
