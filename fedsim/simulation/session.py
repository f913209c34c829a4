"""One run with its folder: records, checkpoints, the best model, early stop, resume."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsim.config import Config, load_config
from fedsim.errors import ConfigError, RunFailed
from fedsim.metrics import METRICS, SMALLER_IS_BETTER
from fedsim.runs.folder import RunFolder
from fedsim.simulation.run import Record, Simulation
from fedsim.simulation.saving import load_run, save_run

log = logging.getLogger(__name__)


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


@dataclass(slots=True)
class Progress:
    """What the session remembers between records; plain JSON in a checkpoint."""

    metric: str
    larger: bool
    best: dict[str, Any] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    rounds_since_best: int = 0

    def improved(self, record: Record, names: tuple[str, ...]) -> bool:
        """Take a record in; whether it holds a new best value."""
        values = {n: record[n] for n in names if n in record}
        if not values:
            return False
        self.final = values
        value = values.get(self.metric)
        if value is None or not math.isfinite(value):
            self.rounds_since_best += 1
            return False
        old = self.best.get("value")
        if old is None or (value > old if self.larger else value < old):
            self.best = {"metric": self.metric, "value": value, "round": record["round"]}
            self.rounds_since_best = 0
            return True
        self.rounds_since_best += 1
        return False


def progress_of(sim: Simulation) -> Progress:
    """By ``[evaluation] best = "accuracy:max"``, or the task's own metric.

    Raises:
        ConfigError: a metric that is not computed, or a direction other than max and min.
    """
    rule, names = sim.config.evaluation.best, sim.evaluator.names
    if rule is None:
        metric = names[0]
        return Progress(metric, metric not in SMALLER_IS_BETTER)
    metric, _, direction = rule.partition(":")
    if metric not in names or direction not in ("", "max", "min"):
        raise ConfigError(
            f"the best model cannot be chosen by {rule!r}",
            code="FS-CFG-072",
            where="[evaluation] best",
            why=f"metrics of this run: {', '.join(names)}; direction max or min",
            hint=f'write best = "{names[0]}:max"',
        )
    larger = direction == "max" if direction else metric not in SMALLER_IS_BETTER
    return Progress(metric, larger)


def target_of(config: Config) -> Callable[[Record], bool]:
    """Whether a record meets ``[evaluation] target = "accuracy >= 0.97"``.

    Raises:
        ConfigError: a target of another form.
    """
    text = config.evaluation.target
    if text is None:
        return lambda record: False
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*([-+.\deE]+)\s*", text)
    if match is None or match[1] not in METRICS:
        raise ConfigError(
            f"the target {text!r} is not understood",
            code="FS-CFG-073",
            where="[evaluation] target",
            hint='write target = "accuracy >= 0.97" or "loss <= 0.1"',
        )
    metric, sign, bound = match[1], match[2], float(match[3])

    def met(record: Record) -> bool:
        value = record.get(metric)
        if value is None:
            return False
        return bool(value >= bound if sign == ">=" else value <= bound)

    return met


def execute(
    sim: Simulation,
    folder: RunFolder,
    *,
    on_record: Callable[[Record], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> Outcome:
    """Run to the end, to the target, to a failure, or until `stop`; always leaves it resumable.

    Args:
        on_record: called after a record and its client lines are on disk.
        stop: asked after every round.
        progress: of a resumed run, from `resume`.

    Raises:
        EnvironmentProblem: the folder cannot be written; what was committed before stays.
    """
    began = time.perf_counter()
    progress = progress or progress_of(sim)
    met = target_of(sim.config)
    outcome, error = "ok", None
    every = sim.config.output.checkpoint_every
    patience = sim.config.evaluation.early_stop
    try:
        for record in sim:
            folder.append_record(record)
            if sim.config.output.clients and sim.last_clients is not None:
                folder.append_clients(sim.last_clients)
            if progress.improved(record, sim.evaluator.names):
                folder.save_model(sim.model_tensors(), "best")
            log.info(_line(record))
            on_record(record)
            done = record["round"]
            if record["outcome"] == "failed":
                continue
            if met(record):
                outcome = "target"
            elif patience is not None and progress.rounds_since_best >= patience:
                outcome = "early_stop"
            elif stop() and done < sim.config.run.rounds:
                outcome = "interrupted"
            if outcome != "ok":
                break
            if every and done and done % every == 0 and done < sim.config.run.rounds:
                folder.save_model(sim.model_tensors(), f"round-{done:05d}")
                _checkpoint(sim, folder, progress, done)
    except RunFailed as failure:
        outcome, error = "failed", failure
    done = sim.federation.state.round_index
    folder.save_model(sim.model_tensors(), "final")
    _checkpoint(sim, folder, progress, done)
    seconds = time.perf_counter() - began
    return Outcome(outcome, done, progress.final, progress.best, seconds, error)


def checkpoint_path(folder: RunFolder) -> Path:
    return folder.state_folder / "run.safetensors"


def resume(folder: RunFolder, *, rounds: int | None = None) -> tuple[Simulation, Progress]:
    """A simulation ready to go on after the folder's last checkpoint, and what it knew.

    Args:
        rounds: new total, to extend a run.

    Raises:
        RunFailed: there is no checkpoint, or it does not fit.
        ConfigError: the run was made from Python objects that a file cannot name.
    """
    sets = [] if rounds is None else [f"run.rounds={rounds}"]
    config = load_config(folder.path / "config.toml", preset=None, sets=sets, environ={}).config
    sim = Simulation(config, state_folder=folder.state_folder)
    path = checkpoint_path(folder)
    if not path.exists():
        folder.truncate(-1)
        return sim, progress_of(sim)
    progress = replace(progress_of(sim), **load_run(sim, path))
    folder.truncate(sim.federation.state.round_index)
    return sim, progress


def _checkpoint(sim: Simulation, folder: RunFolder, progress: Progress, done: int) -> None:
    saved = {
        "best": progress.best,
        "final": progress.final,
        "rounds_since_best": progress.rounds_since_best,
    }
    save_run(sim, checkpoint_path(folder), saved)
    folder.write_latest(done)


def _line(record: Record) -> str:
    """Fields of a round for the log."""
    shown = {k: v for k, v in record.items() if k not in ("time", "bytes_down", "bytes_up")}
    shown["seconds"] = round(record["time"]["seconds"], 3)
    return " ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
