"""`fedsim.simulate` and `fedsim.resume`: a whole run by one call, with its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import to_toml
from fedsim.runs.folder import RunFolder
from fedsim.runs.result import RunResult
from fedsim.simulation.run import Simulation
from fedsim.simulation.session import Outcome, Session, execute
from fedsim.simulation.session import resume as continue_run


def resume(path: str | Path, *, rounds: int | None = None, **objects: Any) -> RunResult:
    """Continue a run after its last checkpoint.

    Args:
        path: the run's folder.
        rounds: new total, to extend the run.
        objects: the Python objects that the run was made of, as given to `simulate`.

    Raises:
        ConfigError: such objects are missing.
        RunFailed: the run's outcome is failure, or its checkpoint is damaged.
    """
    folder = RunFolder(Path(path))
    sim, progress = continue_run(folder, rounds=rounds, **objects)
    return _result(
        sim, folder, execute(sim, folder, progress=progress, session=Session(["fedsim.resume"], rounds))
    )


def simulate(
    config: Mapping[str, Any] | None = None,
    *,
    runs: str | Path = "runs",
    name: str | None = None,
    **arguments: Any,  # Any: those of Simulation, checked there
) -> RunResult:
    """Run a simulation to its end and write its folder.

    Args:
        config: a configuration as nested mappings; see `docs/configuration.md`.
        runs: where run folders go.
        name: of the run.
        arguments: those of `fedsim.Simulation` (model, data, strategy, client, rounds, sample, …).

    Returns:
        The result; also of a run that failed, whose error is raised after its folder is complete.

    Raises:
        ConfigError, DataError, ModelError: before anything is written.
        RunFailed: the run's outcome is failure.
    """
    sim = Simulation(config, **arguments)
    label = name or sim.config.run.name or f"{sim.strategy_name}-{sim.data.dataset.name}"
    folder = RunFolder.create(
        Path(runs), label, config_text=to_toml(sim.config), facts=sim.facts, command=["fedsim.simulate"]
    )
    sim.keep_state_in(folder.state_folder)
    return _result(sim, folder, execute(sim, folder))


def _result(sim: Simulation, folder: RunFolder, outcome: Outcome) -> RunResult:
    if outcome.error is not None:
        raise outcome.error
    return RunResult.open(folder.path, module=sim.module)
