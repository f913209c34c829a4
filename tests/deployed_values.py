"""Configurations of deployed runs, and what their models must be: simulated, or replayed from the journal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim import Simulation
from fedsim.config import config_from
from fedsim.runs import checkpoints
from fedsim.runs.folder import RunFolder
from fedsim.simulation.session import again
from fedsim.storage import sha256
from tests.wired import config


def values_of(
    strategy: str = "fedavg", *, clients: int = 3, rounds: int = 3, **tables: Any
) -> dict[str, Any]:
    """A small federation of `clients` unlike clients, all of them in every round unless `tables` differ."""
    values = config(strategy, **{"round": {"sample": clients}, **tables})
    values["run"]["rounds"] = rounds
    values["data"]["clients"] = values["data"]["partition"]["clients"] = clients
    values["output"] = {"report": False, "plots": False}
    values["deployment"] = {"min_clients": clients, **tables.get("deployment", {})}
    return values


def large(values: Mapping[str, Any], megabytes: float, dtype: str = "float32") -> dict[str, Any]:
    """`values` with a model of about so many megabytes, trained for one step."""
    features = 600
    hidden = max(1, int(megabytes * 1e6 / (4 if dtype == "float32" else 8) / (features + 4)))
    data = {**values["data"], "features": features}
    return {
        **values,
        "data": data,
        "model": {"name": "mlp", "hidden": [hidden]},
        "client": {"steps": 1, "batch_size": 4, "lr": 0.1},
        "engine": {**values["engine"], "dtype": dtype},
    }


def simulated(values: Mapping[str, Any], folder: Path) -> str:
    """SHA-256 of the final model that the simulator's loop engine makes of the same configuration."""
    simulation = Simulation(config_from(dict(values), {"engine": {"name": "loop"}}))
    for record in simulation:
        assert record["outcome"] in ("start", "ok"), record
    return sha256(checkpoints.save(folder, simulation.model_tensors(), "simulated"))


def replayed(run: RunFolder, folder: Path) -> str:
    """SHA-256 of the final model of a coordinator's run, gone through again by its journal."""
    replay = again(run)
    for _ in replay:
        pass
    return sha256(checkpoints.save(folder, replay.model_tensors(), "replayed"))
