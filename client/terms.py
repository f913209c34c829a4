"""What a task asks for, read from its JSON without building anything: the ground of an owner's decision."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from fedsim.pb import federation_pb2 as pb

ITEM_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


MOST_CLIENTS = 10_000_000
"""Clients of a run; a client's tables of all clients grow with them, whoever made the number up."""


class Malformed(Exception):
    """A task that does not say what a task must say."""


class Terms(NamedTuple):
    """What a task asks for, as far as a policy cares.

    Args:
        batch_size: 0 for all examples at once; steps: None where `epochs` counts.
        noise_multiplier, clip: of the run's differential privacy, None where it has none.
    """

    server_id: str
    run_id: str
    run_name: str
    strategy: str
    model: str
    dataset: str
    batch_size: int
    steps: int | None
    epochs: int
    upload_bytes: int
    schema: str
    noise_multiplier: float | None
    clip: float | None


def terms_of(task: pb.Task) -> Terms:
    """What a task asks for.

    Raises:
        Malformed: it does not say it, or not in the form of the contract.
    """
    if not task.client < task.population <= MOST_CLIENTS:
        raise Malformed(f"client {task.client} of {task.population} (at most {MOST_CLIENTS})")
    try:
        config, local = json.loads(task.config), json.loads(task.local)
        strategy, model, data = (_text(config[table]["name"]) for table in ("strategy", "model", "data"))
        steps = task.steps if task.steps >= 0 else _whole(local["steps"])
        privacy = config.get("privacy") or {}
        return Terms(
            task.server_id.hex(), task.run_id, task.run_name, strategy, model, data,
            batch_size=_whole(local["batch_size"]) or 0, steps=steps, epochs=_whole(local["epochs"]) or 0,
            upload_bytes=sum(math.prod(s.shape) * ITEM_BYTES[s.dtype] for s in task.update),
            schema=task.schema,
            noise_multiplier=_number(privacy.get("noise_multiplier")), clip=_number(privacy.get("clip_norm")),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from error


def _text(value: Any) -> str:  # Any: JSON
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    return value


def _whole(value: Any) -> int | None:  # Any: JSON
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {type(value).__name__}")
    return value


def _number(value: Any) -> float | None:  # Any: JSON
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {type(value).__name__}")
    return float(value)
