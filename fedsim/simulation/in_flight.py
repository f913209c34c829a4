"""The tasks in flight of an asynchronous run, to a checkpoint and back.

A device works on the model that it was given, so that model is saved, once for each version; so is
what the server lent, the queue of the clock, and the answers that were computed before their time
(computed again in another block they would differ in the last bit).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.buffers import Buffers
from fedsim.local import LocalSpec
from fedsim.outbox import lend_nothing_to
from fedsim.simulation.engine import SimulatedEngine
from fedsim.simulation.ready import Ready, gathered
from fedsim.simulation.sent import FLYING, Sent
from fedsim.types import Ids, Message, Task, UpdateBlock

Tensors = dict[str, Tensor]

_ARRAYS = ("ids", "base_version", "examples", "local_steps", "normaliser", "train_seconds", "state_version")


def save_flight(engine: SimulatedEngine) -> tuple[Tensors, str]:
    """Tensors by name, and a JSON text of the rest."""
    tensors: Tensors = {}
    tasks: list[dict[str, Any]] = []
    number = -1
    for sent in engine.sent.sents:
        rows = np.flatnonzero(sent.status == FLYING)
        if not len(rows):
            continue  # answered, and nobody asked for it
        number, task = number + 1, sent.task
        tasks.append(
            {
                "ids": task.ids[rows].tolist(),
                "version": task.version,
                "round": task.round_index,
                "attempt": task.attempt,
                "spec": asdict(task.spec),
                "steps": sent.steps[rows].tolist(),
                "seconds": sent.seconds[rows].tolist(),
                "lost": sent.lost[rows].tolist(),
            }
        )
        if f"buffers.{task.version}.floating" not in tensors:  # once for each version
            for group, values in (("vectors", task.message.vectors), ("scalars", task.message.scalars)):
                tensors |= {f"message.{task.version}.{group}.{name}": t.clone() for name, t in values.items()}
            for name, buffer in task.buffers._asdict().items():
                tensors[f"buffers.{task.version}.{name}"] = buffer.clone()
        for name, values in dict(task.lend(task.ids[rows])).items():
            tensors[f"lent.{number}.{name}"] = values.clone()
    for (client, version), ready in engine.ready.items():
        if engine.sent.is_announced((client, version)):
            continue
        tensors |= {f"ready.{client}.{version}.{n}": t for n, t in _answer(ready).items()}
    return tensors, json.dumps({"clock": engine.clock.saved(), "tasks": tasks})


def load_flight(
    engine: SimulatedEngine, tensors: Mapping[str, Tensor], text: str
) -> tuple[Ids, Ids, dict[int, Message]]:
    """Put the engine where `save_flight` found it.

    Returns:
        [t] clients and base versions of the tasks in flight, and the message of each version.
    """
    saved = json.loads(text)
    device = engine.place.clients.device
    groups = _grouped({name: tensor.to(device) for name, tensor in tensors.items()})
    engine.cancel()
    engine.clock.restore(saved["clock"])
    messages: dict[int, Message] = {}
    buffers: dict[int, Buffers] = {}
    for number, entry in enumerate(saved["tasks"]):
        version = entry["version"]
        if version not in messages:
            named = (groups.get(("message", f"{version}", group), {}) for group in ("vectors", "scalars"))
            messages[version] = Message(*named)
            buffers[version] = Buffers(**groups["buffers", f"{version}"])
        ids = np.array(entry["ids"], np.int64)
        lent = groups.get(("lent", f"{number}"), {})
        task = Task(
            ids,
            version,
            entry["round"],
            entry["attempt"],
            messages[version],
            _lending(ids, lent) if lent else lend_nothing_to,
            buffers[version],
            LocalSpec(**entry["spec"]),
        )
        sent = Sent(
            task,
            np.array(entry["steps"], np.int64),
            np.array(entry["seconds"], np.float64),
            np.array(entry["lost"], bool),
        )
        engine.sent.add(sent)
    for (kind, *key), named_rows in groups.items():
        if kind == "ready":
            engine.ready[int(key[0]), int(key[1])] = _ready(named_rows)
    sents = engine.sent.sents
    nobody = [np.empty(0, np.int64)]
    ids = np.concatenate([sent.task.ids for sent in sents] or nobody)
    versions = [np.full(len(sent.task.ids), sent.task.version, np.int64) for sent in sents]
    return ids, np.concatenate(versions or nobody), messages


def _lending(ids: Ids, lent: Mapping[str, Tensor]) -> Any:
    """`Task.lend` of rows that were saved."""
    row_of = {client: row for row, client in enumerate(ids.tolist())}

    def lend(some: Ids) -> dict[str, Tensor]:
        rows = [row_of[client] for client in some.tolist()]
        return {name: values[rows] for name, values in lent.items()}

    return lend


def _answer(ready: Ready) -> Tensors:
    block, kept = gathered([ready])
    arrays = {name: torch.from_numpy(getattr(block, name).copy()) for name in _ARRAYS}
    named: Tensors = {f"array.{name}": t for name, t in arrays.items()}
    named |= {f"vectors.{name}": t for name, t in block.vectors.items()}
    named |= {f"scalars.{name}": t for name, t in block.scalars.items()}
    named |= {f"metrics.{name}": torch.from_numpy(v.copy()) for name, v in block.metrics.items()}
    named |= {f"kept.{name}": t for name, t in kept.items()}
    buffers = {"floating": block.buffers, "integers": block.int_buffers}
    named |= {f"buffers.{name}": t for name, t in buffers.items() if t is not None}
    return {name: tensor.clone() for name, tensor in named.items()}


def _ready(named: Mapping[str, Tensor]) -> Ready:
    arrays: dict[str, Any] = {name: t.cpu().numpy() for name, t in _below(named, "array.").items()}
    buffers = _below(named, "buffers.")
    block = UpdateBlock(
        **arrays,
        vectors=_below(named, "vectors."),
        scalars=_below(named, "scalars."),
        metrics={name: t.cpu().numpy() for name, t in _below(named, "metrics.").items()},
        buffers=buffers.get("floating"),
        int_buffers=buffers.get("integers"),
    )
    return Ready(block, 0, _below(named, "kept."))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


_KEYS = {"message": 3, "buffers": 2, "lent": 2, "ready": 3}
"""How many words at the beginning of a name say what it belongs to."""


def _grouped(tensors: Mapping[str, Tensor]) -> dict[tuple[str, ...], Tensors]:
    """All tensors by what they belong to, in one pass: there may be thousands of versions."""
    groups: dict[tuple[str, ...], Tensors] = {}
    for name, tensor in tensors.items():
        count = _KEYS[name.partition(".")[0]]
        *key, rest = name.split(".", count)
        groups.setdefault(tuple(key), {})[rest] = tensor
    return groups
