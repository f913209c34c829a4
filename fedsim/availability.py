"""Which clients could take part in a round: seeded models, asked only about the clients drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedsim.keys import Purpose, uniform
from fedsim.types import Bools, Ids

Availability = Callable[[Ids, int], Bools]  # (ids [b], round) -> [b]


def always(*, seed: int = 0) -> Availability:
    """Everyone, every round."""
    return lambda ids, round_index: np.ones(len(ids), bool)


def bernoulli(*, probability: float, seed: int = 0) -> Availability:
    """Each client independently in each round.

    Args:
        probability: of being available, in (0, 1].
    """
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability must lie in (0, 1], got {probability}")

    def available(ids: Ids, round_index: int) -> Bools:
        return uniform(seed, Purpose.AVAILABILITY, round_index, ids, 1)[:, 0] < probability

    return available


def cyclic(*, period: int, share: float, seed: int = 0) -> Availability:
    """Each client for max(1, round(period · share)) consecutive rounds of each period, random phase.

    Args:
        period: rounds.
        share: of the period, in (0, 1].
    """
    if period < 1 or not 0.0 < share <= 1.0:
        raise ValueError(f"period must be at least 1 and share in (0, 1], got {period}, {share}")
    length = max(1, round(period * share))

    def available(ids: Ids, round_index: int) -> Bools:
        phase = np.floor(uniform(seed, Purpose.AVAILABILITY, 0, ids, 1)[:, 0] * period)
        there: Bools = (round_index + phase.astype(np.int64)) % period < length
        return there

    return available
