"""What goes to the worker and what comes back; without torch, so that the parent need not load it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """One task to be done.

    Args:
        task: a serialised ``fedsim.v1.Task``.
        message: the broadcast, a bundle; lent: what the server lends to this client, None for nothing.
        state: what this client kept after its last answer that counted, None for the fresh state.
        out: folder for what is written.
    """

    task: bytes
    message: bytes | Path
    lent: bytes | Path | None
    state: Path | None
    out: Path


class Answer(NamedTuple):
    """What came of it.

    Args:
        update: a bundle, in memory where it is at most 1 MiB.
        state: what this client will keep once the update has counted, None where it keeps nothing.
        examples, local_steps, normaliser, metrics: as in `fedsim.types.UpdateBlock`.
        train_seconds: of this machine, for the whole task.
    """

    update: bytes | Path
    state: Path | None
    examples: int
    local_steps: int
    normaliser: float
    train_seconds: float
    metrics: dict[str, float]


class Facts(NamedTuple):
    """What a client knows of a run before it trains."""

    examples: int


class DeviceFacts(NamedTuple):
    """What a coordinator is told of a device.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        name: of the processor or GPU, as far as it is known.
        memory_bytes: that could be used now.
    """

    device: str
    name: str
    memory_bytes: int
