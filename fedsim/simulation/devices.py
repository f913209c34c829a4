"""Models of the clients' devices: how long a task takes, who drops out, who is a straggler.

Times are virtual seconds of the run's clock. Everything is a function of (seed, round, client).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedsim.keys import Purpose, normal, uniform
from fedsim.types import Bools, Floats, Ids


class DeviceModel(NamedTuple):
    """Functions of ([b] ids, ...), all vectorised.

    Args:
        seconds: (ids, steps, round) -> [b] from dispatch to arrival.
        lost: (ids, round) -> [b] bool, whose answer never comes.
        limit: (ids, steps, round) -> [b] local steps that the device manages.
    """

    seconds: Callable[[Ids, Ids, int], Floats]
    lost: Callable[[Ids, int], Bools]
    limit: Callable[[Ids, Ids, int], Ids]


def instant() -> DeviceModel:
    """Every device answers at once and never fails: plain rounds."""
    return DeviceModel(
        lambda ids, steps, r: np.zeros(len(ids)),
        lambda ids, r: np.zeros(len(ids), bool),
        lambda ids, steps, r: steps,
    )


def lognormal(
    *,
    step_seconds: float = 0.01,
    spread: float = 0.0,
    start_seconds: float = 0.0,
    dropout: float = 0.0,
    stragglers: float = 0.0,
    slowdown: float = 10.0,
    partial_work: bool = False,
    seed: int = 0,
) -> DeviceModel:
    """Devices of log-normal speed, of which some drop out and some straggle.

    Args:
        step_seconds: median seconds of one local step.
        spread: standard deviation of log speed over devices; fixed for each device.
        start_seconds: seconds of a task before its first step.
        dropout: probability that a device never answers a task, in [0, 1).
        stragglers: probability that a device is a straggler in a round, in [0, 1].
        slowdown: factor by which a straggler is slower.
        partial_work: a straggler does steps / slowdown local steps (at least one) in its usual time
            instead of taking longer (FedProx's systems heterogeneity).
        seed: of the devices.
    """
    if not (step_seconds >= 0 and spread >= 0 and start_seconds >= 0 and slowdown >= 1):
        raise ValueError("step_seconds, spread and start_seconds must be at least 0 and slowdown at least 1")
    if not 0.0 <= dropout < 1.0 or not 0.0 <= stragglers <= 1.0:
        raise ValueError("dropout must lie in [0, 1) and stragglers in [0, 1]")

    def straggling(ids: Ids, round_index: int) -> Bools:
        drawn = uniform(seed, Purpose.DEVICE, round_index + 1, ids, 2)
        slow: Bools = drawn[:, 1] < stragglers
        return slow

    def seconds(ids: Ids, steps: Ids, round_index: int) -> Floats:
        factor: Floats = np.exp(spread * normal(seed, Purpose.DEVICE, 0, ids, 1)[:, 0])
        if not partial_work:
            factor = factor * np.where(straggling(ids, round_index), slowdown, 1.0)
        total: Floats = start_seconds + step_seconds * steps * factor
        return total

    def lost(ids: Ids, round_index: int) -> Bools:
        gone: Bools = uniform(seed, Purpose.DEVICE, round_index + 1, ids, 2)[:, 0] < dropout
        return gone

    def limit(ids: Ids, steps: Ids, round_index: int) -> Ids:
        if not partial_work:
            return steps
        fewer = np.maximum(1, np.floor(steps / slowdown)).astype(np.int64)
        return np.where(straggling(ids, round_index), np.minimum(steps, fewer), steps)

    return DeviceModel(seconds, lost, limit)
