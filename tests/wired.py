"""Tasks as a coordinator would send them, taken from a simulation that records what it does.

Each recorded exchange holds the task with its bundles and what the loop engine of the simulation made of
it, so that a client can be held to the very same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim import Simulation, bundle, wire
from fedsim.config import from_dict
from fedsim.pb import federation_pb2 as pb
from fedsim.types import Task, UpdateBlock


class Exchange(NamedTuple):
    """One client's part in one window.

    Args:
        task: serialised; message, lent: bundles.
        block: the simulation's answer of this client; kept: its rows after it.
    """

    client: int
    task: bytes
    message: bytes
    lent: bytes | None
    block: UpdateBlock
    kept: Mapping[str, Tensor]


def config(strategy: str = "fedavg", **tables: Mapping[str, Any]) -> dict[str, Any]:
    """A small federation of four unlike clients on synthetic data, three rounds of all of them."""
    values: dict[str, Any] = {
        "run": {"seed": 3, "rounds": 3},
        "data": {
            "name": "synthetic", "clients": 4, "features": 6, "classes": 3, "examples": 15,
            "partition": {"kind": "dirichlet", "alpha": 0.5, "clients": 4},
        },
        "model": {"name": "mlp", "hidden": [5]},
        "client": {"epochs": 2, "batch_size": 4, "lr": 0.1},
        "round": {"sample": 4},
        "strategy": {"name": strategy},
        "engine": {"name": "loop", "dtype": "float64"},
        "evaluation": {"central": False, "clients": "never"},
    }  # fmt: skip
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    return values


def exchanges(values: Mapping[str, Any]) -> Iterator[Exchange]:
    """Every task of the run with its answer, in the order of folding."""
    sim = Simulation(from_dict(values))
    content = wire.client_config(sim.config)
    sent: dict[int, tuple[Task, int]] = {}
    blocks: list[UpdateBlock] = []
    submit, collect = sim.engine.submit, sim.engine.collect

    def submitting(task: Task) -> None:
        sent.update({client: (task, row) for row, client in enumerate(task.ids.tolist())})
        submit(task)

    def collecting(*arguments: Any) -> Iterator[Any]:
        for answer in collect(*arguments):
            blocks.append(answer)
            yield answer

    sim.engine.submit = submitting  # type: ignore[method-assign]
    sim.engine.collect = collecting  # type: ignore[method-assign]
    for record in sim:
        assert record["outcome"] in ("start", "ok"), record
        for block in blocks:
            client = int(block.ids[0])
            task, row = sent[client]
            ids = np.array([client], np.int64)
            lent = wire.pack_lent(task.lend(ids))
            kept = sim.states.read(ids) if sim.states.layout else {}
            yield Exchange(
                client,
                task_bytes(content, client, sim.data.clients, task, row, sim.spec.digest),
                bundle.encode(wire.pack_message(task.message, task.buffers)),
                bundle.encode(lent) if lent else None,
                block,
                kept,
            )
        blocks.clear()


def task_bytes(content: bytes, client: int, population: int, task: Task, row: int, schema: str) -> bytes:
    """The task of one client as it crosses the network."""
    found: bytes = pb.Task(
        run_id="0" * 12,
        task_id=bytes(16),
        client=client,
        population=population,
        version=task.version,
        round_index=task.round_index,
        round_attempt=task.attempt,
        config=content,
        schema=schema,
        local=wire.local_json(task.spec),
        steps=-1 if task.steps is None else int(task.steps[row]),
    ).SerializeToString()
    return found


def same(mine: Tensor, theirs: Tensor) -> bool:
    """Bit for bit."""
    return mine.dtype == theirs.dtype and torch.equal(
        mine.contiguous().view(torch.uint8) if mine.ndim else mine.reshape(1).view(torch.uint8),
        theirs.contiguous().view(torch.uint8) if theirs.ndim else theirs.reshape(1).view(torch.uint8),
    )
