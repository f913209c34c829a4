"""The state of a run after a window, to a file and back; the file is half of a commit, its row the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedsim import bundle
from fedsim.bundle import Object
from fedsim.checkpoint import load_tree, save_tree
from fedsim.federation import RunState
from fedsim.server.server_run import ServerRun

FORMAT = "1"


class Saved(NamedTuple):
    """What a state file holds beside the run itself.

    Args:
        progress: of the session: best so far and so on.
        flying: clients and versions of the tasks that go on.
        decision_seq, event_seq: last entries of the journal that the state knows of.
        failed_in_a_row: attempts.
        folder: bytes of the run folder's line files, by name.
        outcome: running, or how the run came to its end with this window.
    """

    progress: dict[str, Any]
    flying: list[tuple[int, int]]
    decision_seq: int
    event_seq: int
    failed_in_a_row: int
    folder: dict[str, int]
    outcome: str = "running"


def save(run: ServerRun, path: Path, saved: Saved) -> Object:
    """Write the state, whole or not at all, and synced.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    leaves, plain = save_tree(run.federation.state, copy=False)
    tensors = {f"run.{name}": tensor for name, tensor in leaves.items()}
    tensors |= {f"rows.{part}": torch.from_numpy(values) for part, values in run.rows.index().items()}
    clients = np.flatnonzero(run.counts.folded)
    last = b"".join(run.counts.last.get(client, bytes(16)) for client in clients.tolist())
    tensors["counts.clients"] = torch.from_numpy(clients)
    tensors["counts.folded"] = torch.from_numpy(run.counts.folded[clients])
    tensors["counts.last"] = torch.frombuffer(bytearray(last), dtype=torch.uint8) if last else _no_bytes()
    layout = {k: [list(shape), str(dtype)] for k, (shape, dtype) in run.rows.layout.items()}
    metadata = {"format": FORMAT, "run": plain, "rows": json.dumps(layout), "saved": json.dumps(saved)}
    return bundle.encode_to(path, tensors, metadata)


def load(run: ServerRun, path: Path) -> tuple[RunState, Saved]:
    """The state of a file that `save` wrote; rows and counts are put in place.

    Raises:
        BundleError, RunFailed: the file is damaged or belongs to another configuration.
    """
    tensors = bundle.decode_file(path)
    with path.open("rb") as file:
        metadata = bundle.read_header(file, path.stat().st_size).metadata
    state = load_tree(run.first_state, _below(tensors, "run."), metadata["run"])
    layout = {
        k: (tuple(shape), getattr(torch, dtype.removeprefix("torch.")))
        for k, (shape, dtype) in json.loads(metadata["rows"]).items()
    }
    run.rows.restore({part: t.numpy() for part, t in _below(tensors, "rows.").items()}, layout)
    clients = tensors["counts.clients"].numpy()
    run.counts.folded[:] = 0
    run.counts.folded[clients] = tensors["counts.folded"].numpy()
    last = tensors["counts.last"].numpy().tobytes()
    run.counts.last = {
        client: last[16 * row : 16 * row + 16]
        for row, client in enumerate(clients.tolist())
        if any(last[16 * row : 16 * row + 16])
    }
    values = json.loads(metadata["saved"])
    values[1] = [tuple(pair) for pair in values[1]]
    return state, Saved(*values)


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _no_bytes() -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)
