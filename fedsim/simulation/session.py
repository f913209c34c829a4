"""One run with its folder: records, checkpoints, the best model, early stop, resume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fedsim.build import build_data
from fedsim.config import load_config, to_toml
from fedsim.errors import ConfigError, EnvironmentProblem, RunFailed
from fedsim.federated_run import Record
from fedsim.progress import Progress, progress_of, target_of
from fedsim.runs.folder import CONFIG, RunFolder
from fedsim.runs.log import line_of
from fedsim.simulation.baselines import pooled
from fedsim.simulation.replay import JOURNAL, Replay, read_journal
from fedsim.simulation.run import Simulation
from fedsim.simulation.saving import load_run, save_run
from fedsim.storage import write_atomically

log = logging.getLogger(__name__)

REMOTE = "remote"  # the engine of runs on a coordinator


class Session(NamedTuple):
    """What goes on with a run.

    Args:
        command: for the manifest.
        rounds: new total, None for that of before.
    """

    command: Sequence[str]
    rounds: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Args:
        outcome: ``ok``, ``target``, ``early_stop``, ``interrupted`` or ``failed``.
        rounds: completed.
        final: metrics of the last evaluation; best: {"metric", "value", "round"}, {} before any.
        seconds: wall time of this session.
        error: why it failed.
    """

    outcome: str
    rounds: int
    final: dict[str, float]
    best: dict[str, Any]
    seconds: float
    error: RunFailed | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """What the manifest and ``--format json`` say."""
        found = {
            "outcome": self.outcome,
            "rounds": self.rounds,
            "final": self.final,
            "best": self.best,
            "seconds": self.seconds,
        }
        if self.error is not None:
            found["error"] = {"code": self.error.code, "what": self.error.what, "why": self.error.why}
        return found


def execute(
    sim: Simulation,
    folder: RunFolder,
    *,
    on_record: Callable[[Record], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    session: Session | None = None,
) -> Outcome:
    """Run to the end, to the target, to a failure, or until `stop`, and complete the folder.

    Whatever happens, the run can be resumed. One process at a time works in a folder.

    Args:
        on_record: called after a record and its client lines are on disk.
        stop: asked after every round.
        progress: of a resumed run, from `resume`.
        session: that goes on with it.

    Raises:
        ConfigError: ``[evaluation] best`` or ``target`` cannot be understood; FS-CFG-023, the session asks
            for fewer rounds than there are.
        EnvironmentProblem: the folder cannot be written or another process works in it; what was
            committed before stays.
    """
    current = progress or progress_of(sim.config, sim.evaluator.names)
    met = target_of(sim.config)
    fedsim_log = logging.getLogger("fedsim")
    with folder.locked():
        handler = folder.log_handler()
        fedsim_log.addHandler(handler)
        try:
            if progress is not None:
                # Only now is the folder ours: another process may have gone on since `resume` looked.
                current = _take_up(sim, folder)
            if session is not None:
                _begin(session, sim, folder)
            outcome = _rounds(sim, folder, current, met, on_record, stop)
            folder.finish(outcome.summary)
            _draw(sim, folder)
        finally:
            sim.engine.crew.close()
            fedsim_log.removeHandler(handler)
            handler.close()
    return outcome


def _rounds(
    sim: Simulation,
    folder: RunFolder,
    progress: Progress,
    met: Callable[[Record], bool],
    on_record: Callable[[Record], None],
    stop: Callable[[], bool],
) -> Outcome:
    began = time.perf_counter()
    outcome, error = "ok", None
    every = sim.config.output.checkpoint_every
    patience = sim.config.evaluation.early_stop
    try:
        for record in sim:
            folder.append_record(record)
            if sim.config.output.clients and (lines := sim.last_lines) is not None:
                folder.append_clients(lines)
            if progress.improved(record, sim.evaluator.names):
                folder.save_model(sim.model_tensors(copy=False), "best")
            log.info(line_of(record))
            on_record(record)
            done = record["round"]
            if record["outcome"] == "failed":
                continue
            if met(record):
                outcome = "target"
            elif patience is not None and progress.rounds_since_best >= patience:
                outcome = "early_stop"
            elif stop() and not sim.finished:
                outcome = "interrupted"
            if outcome != "ok":
                break
            if every and done and done % every == 0 and not sim.finished:
                folder.save_model(sim.model_tensors(copy=False), f"round-{done:05d}")
                _checkpoint(sim, folder, progress, done)
    except RunFailed as failure:
        outcome, error = "failed", failure
    done = sim.federation.state.round_index
    if outcome == "ok" and done and (nothing := _nothing_counted(sim, done)):
        outcome, error = "failed", nothing
    folder.save_model(sim.model_tensors(copy=False), "final")
    _checkpoint(sim, folder, progress, done)
    seconds = time.perf_counter() - began
    return Outcome(outcome, done, progress.final, progress.best, seconds, error)


def _draw(sim: Simulation, folder: RunFolder) -> None:
    """Report and pictures as ``[output]`` asks for them."""
    if sim.config.output.report:
        from fedsim.runs.report import write_report

        write_report(folder, data=sim.data, client_evaluation=sim.client_evaluation)
    elif sim.config.output.plots:
        from fedsim.runs.plots import draw

        draw(folder, data=sim.data, client_evaluation=sim.client_evaluation)
        folder.digest_files()


def checkpoint_path(folder: RunFolder) -> Path:
    return folder.state_folder / "run.safetensors"


def _nothing_counted(sim: Simulation, done: int) -> RunFailed | None:
    """Why the model of a run that came to its end is the one that it began with; None where it is not."""
    if not sim.federation.state.version:
        return RunFailed(
            f"all {done} rounds failed and were skipped",
            code="FS-RUN-006",
            where="[round] on_failed = 'skip'",
            why="the model is the one that the run began with",
            hint="clients.jsonl names each client and reason",
        )
    if sim.states.version_of.any():
        return None
    return RunFailed(
        f"in {done} rounds no answer of any client counted",
        code="FS-RUN-006",
        where="[availability], [devices] and [membership]",
        why="nobody was there or answered; the model is the one that the run began with",
        hint="raise the probability, or choose other devices; clients.jsonl names who was lost",
    )


def resume(folder: RunFolder, *, rounds: int | None = None, **objects: Any) -> tuple[Simulation, Progress]:
    """A simulation ready to go on after the folder's last checkpoint, and what it knew.

    Args:
        rounds: new total, to extend a run.
        objects: the Python objects that the run was made of (model, data, strategy, client …).

    Raises:
        EnvironmentProblem: another process works in the folder.
        RunFailed: the checkpoint is damaged or does not fit.
        ConfigError: the run was made of Python objects and they are not given; FS-CFG-023, it has more
            rounds than `rounds`.
    """
    with folder.locked():  # nothing of a run that another process writes may be cut back
        pass
    facts = folder.manifest["facts"]
    if facts.get("engine") == REMOTE:
        raise ConfigError(
            "this run belongs to a coordinator",
            code="FS-CFG-134",
            where=str(folder.path),
            why="its state lies in the coordinator's ledger, not in the run folder",
            hint="fedsim server takes it up again by itself; where it is paused, stopped or failed, "
            f"fedsim continue {facts.get('run_id', 'RUN')} --connect NAME goes on with it",
        )
    sim = again(folder, sets=[] if rounds is None else [f"run.rounds={rounds}"], **objects)
    sim.keep_state_in(folder.state_folder)
    progress = progress_of(sim.config, sim.evaluator.names)
    path = checkpoint_path(folder)
    if path.exists():
        progress = replace(progress, **load_run(sim, path))
    _check_rounds(rounds, sim)
    return sim, progress


def _take_up(sim: Simulation, folder: RunFolder) -> Progress:
    """Go back to the folder's checkpoint, and cut the line files back to it; under the lock."""
    progress = progress_of(sim.config, sim.evaluator.names)
    path = checkpoint_path(folder)
    if not path.exists():
        folder.truncate(-1)
        return progress
    progress = replace(progress, **load_run(sim, path))
    folder.truncate(sim.federation.state.round_index)
    return progress


def _begin(session: Session, sim: Simulation, folder: RunFolder) -> None:
    """Note that the run goes on, and to how many rounds; under the lock."""
    path = folder.path / CONFIG
    rounds = load_config(path).config.run.rounds
    if session.rounds is None and rounds != sim.config.run.rounds:
        raise EnvironmentProblem(
            f"another process has extended the run to {rounds} rounds meanwhile",
            code="FS-ENV-025",
            where=str(folder.path),
            hint="resume it again",
        )
    _check_rounds(session.rounds, sim)
    folder.add_session(session.command)
    if rounds != sim.config.run.rounds:
        write_atomically(path, to_toml(sim.config).encode())


def _check_rounds(rounds: int | None, sim: Simulation) -> None:
    done = sim.federation.state.round_index
    if rounds is not None and rounds < done:
        raise ConfigError(
            f"the run has completed {done} rounds already",
            code="FS-CFG-023",
            where=f"--rounds {rounds}",
            hint=f"give at least {done}",
        )


def again(folder: RunFolder, *, sets: Sequence[str] = (), **objects: Any) -> Simulation:
    """The simulation of a run folder, from its start; of a coordinator's run, the replay of its journal.

    Raises:
        ConfigError: the run was made of Python objects and they are not given.
    """
    facts = folder.manifest["facts"]
    loaded = load_config(folder.path / CONFIG, sets=sets)
    if facts.get("engine") == REMOTE:
        return Replay(loaded.config, read_journal(folder.path / JOURNAL))
    if facts.get("baseline") == "centralised" and "data" not in objects:
        objects["data"] = pooled(build_data(loaded.config))
    needed = set(facts.get("python_objects", ())) - set(objects)
    if needed:
        raise ConfigError(
            "this run was made of Python objects that its files cannot hold",
            code="FS-CFG-074",
            where=str(folder.path),
            why=f"given from Python: {', '.join(sorted(needed))}",
            hint="call fedsim.resume(path, ...) from the program that started it, with the same objects",
        )
    return Simulation(loaded.config, **objects)


def _checkpoint(sim: Simulation, folder: RunFolder, progress: Progress, done: int) -> None:
    saved = {
        "best": progress.best,
        "final": progress.final,
        "rounds_since_best": progress.rounds_since_best,
    }
    save_run(sim, checkpoint_path(folder), saved)
    folder.write_latest(done)
