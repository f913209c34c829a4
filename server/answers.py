"""Accepted answers: where their bytes lie until they are folded, and how they are read for folding."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim import bundle
from fedsim.flat import ParamSpec
from fedsim.pb import federation_pb2 as pb
from fedsim.server.objects import Objects
from fedsim.server.segments import Segments, Window
from fedsim.types import UpdateBlock
from fedsim.wire import unpack_update

# Columns of clients.jsonl that a client's own metrics must not take the place of.
RESERVED = frozenset(
    {"round", "client", "verdict", "reason", "examples", "steps", "norm", "seconds", "bytes_up", "staleness"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One accepted update.

    Args:
        task_id, client, version: of the task that it answers.
        digest, size: of the bundle; place: ``object``, or ``window/attempt/offset`` in a segment.
        seconds: from dispatch to arrival, on the run's clock.
    """

    task_id: bytes
    client: int
    version: int
    digest: bytes
    size: int
    place: str
    examples: int
    local_steps: int
    normaliser: float
    seconds: float
    metrics: Mapping[str, float]


def row_of(answer: Answer, body: pb.SubmitBody, request: pb.SubmitRequest) -> dict[str, Any]:
    """The answer as columns of the ledger."""
    return {
        "task_id": answer.task_id,
        "client": answer.client,
        "key": body.key,
        "digest": answer.digest,
        "size": answer.size,
        "place": answer.place,
        "examples": answer.examples,
        "local_steps": answer.local_steps,
        "normaliser": None if math.isnan(answer.normaliser) else answer.normaliser,
        "train_seconds": answer.seconds,
        "metrics": json.dumps(answer.metrics),
        "body": request.body,
        "signature": request.signature,
    }


def answer_of(row: Mapping[str, Any]) -> Answer:
    """The answer of a row of the ledger."""
    return Answer(
        row["task_id"],
        row["client"],
        row["version"],
        row["digest"],
        row["size"],
        row["place"],
        row["examples"],
        row["local_steps"],
        math.nan if row["normaliser"] is None else row["normaliser"],
        row["train_seconds"],
        json.loads(row["metrics"]),
    )


def own_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """What is kept of the metrics that a client sent: numbers, under names that are not ours."""
    return {n: v for n, v in sorted(metrics.items()) if n not in RESERVED and math.isfinite(v)}


def placed(place: str, run_id: str) -> tuple[Window, int]:
    """The segment of an inline update, and its offset there."""
    window, attempt, offset = (int(part) for part in place.split("/"))
    return Window(run_id, window, attempt), offset


def block_of(
    answer: Answer,
    spec: ParamSpec,
    *,
    state_version: int,
    device: torch.device,
    run_id: str,
    objects: Objects,
    segments: Segments,
) -> UpdateBlock:
    """The answer as a block of one client, the vectors of a large one mapped from the file that holds them.

    Raises:
        BundleError: the bytes on the disk are not those that were accepted.
    """
    release = None
    if answer.place == "object":
        tensors, release = bundle.map_file(objects.path(answer.digest))
        if spec.personal or device.type != "cpu":  # copied below
            release = None
    else:
        window, offset = placed(answer.place, run_id)
        tensors = bundle.decode(segments.of(window).read(offset, answer.size))
    update = unpack_update({name: tensor.to(device) for name, tensor in tensors.items()}, spec)
    return UpdateBlock(
        np.array([answer.client], np.int64),
        np.array([answer.version], np.int64),
        np.array([answer.examples], np.int64),
        np.array([answer.local_steps], np.int64),
        np.array([answer.normaliser]),
        np.array([answer.seconds]),
        update.vectors,
        update.scalars,
        {name: np.array([value]) for name, value in answer.metrics.items()},
        update.buffers,
        update.integers,
        np.array([state_version], np.int64),
        release,
    )
