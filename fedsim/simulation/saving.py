"""Checkpoints of a simulation: one safetensors file for the run, an index for each row store.

An asynchronous run also saves the tasks in flight. The rows themselves stay in the files of their
segments; a slot that a checkpoint names is not overwritten before the next checkpoint is on disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.checkpoint import load_tree, read_file, save_tree, write_file
from fedsim.rows import RowStore
from fedsim.simulation.in_flight import load_flight, save_flight
from fedsim.simulation.run import Simulation

FORMAT = "1"


def save_run(sim: Simulation, path: Path, progress: dict[str, Any]) -> None:
    """Write the state after the last committed round.

    Args:
        progress: what the session knows beside the simulation (best so far …), plain JSON.

    Raises:
        EnvironmentProblem: the disk is full or the folder cannot be written.
    """
    leaves, plain = save_tree(sim.federation.state)
    tensors: dict[str, Tensor] = {f"run.{name}": t for name, t in leaves.items()}
    metadata = {"format": FORMAT, "run": plain, "progress": json.dumps(progress)}
    metadata["failed_in_a_row"] = str(sim.failed_in_a_row)
    for name, store in _stores(sim):
        for part, values in store.index().items():
            tensors[f"{name}.{part}"] = torch.from_numpy(values).clone()
        layout = {k: [list(shape), str(dtype)] for k, (shape, dtype) in store.layout.items()}
        metadata[name] = json.dumps(layout)
    if sim.federation.asynchronous:
        flying, metadata["flight"] = save_flight(sim.engine)
        tensors |= {f"flight.{name}": t.cpu().contiguous() for name, t in flying.items()}
    write_file(path, tensors, metadata)
    for _, store in _stores(sim):
        store.pin()


def load_run(sim: Simulation, path: Path) -> dict[str, Any]:
    """Put the simulation where `save_run` left it; returns the session's progress.

    Raises:
        RunFailed: the file is damaged or belongs to another configuration.
    """
    tensors, metadata = read_file(path)
    leaves = {n.removeprefix("run."): t for n, t in tensors.items() if n.startswith("run.")}
    sim.restore(load_tree(sim.federation.state, leaves, metadata["run"]))
    sim.failed_in_a_row = int(metadata.get("failed_in_a_row", "0"))
    for name, store in _stores(sim):
        index = {part: tensors[f"{name}.{part}"].numpy() for part in ("ids", "slots", "versions")}
        layout = {
            k: (tuple(shape), getattr(torch, dtype.removeprefix("torch.")))
            for k, (shape, dtype) in json.loads(metadata[name]).items()
        }
        store.restore(index, layout)
    if sim.federation.asynchronous:
        flying = {n.removeprefix("flight."): t for n, t in tensors.items() if n.startswith("flight.")}
        sim.federation.restore(sim.federation.state, *load_flight(sim.engine, flying, metadata["flight"]))
    progress: dict[str, Any] = json.loads(metadata["progress"])
    return progress


def _stores(sim: Simulation) -> tuple[tuple[str, RowStore], ...]:
    return ("clients", sim.states), ("server", sim.rows)
