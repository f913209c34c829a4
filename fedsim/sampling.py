"""Who is in the cohort: samplers, and how many.

A sampler is a pure function of the seed, the round and the attempt; it costs O(cohort), not
O(population), whatever the population is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedsim.errors import ConfigError
from fedsim.ids import among
from fedsim.keys import Purpose, generator
from fedsim.types import Bools, Ids


@dataclass(frozen=True, slots=True, eq=False)
class Free:
    """Who can be asked: called with (ids [b], round) it says so for each.

    Args:
        there: (ids [b], round) -> [b] whose device is there.
        busy: ids of the clients that have something to do.
    """

    there: Callable[[Ids, int], Bools]
    busy: Ids = field(default_factory=lambda: np.empty(0, np.int64))

    def __call__(self, ids: Ids, round_index: int) -> Bools:
        there = self.there(ids, round_index)
        return there & ~among(ids, self.busy) if len(self.busy) else there


Sampler = Callable[[int, int, int, int, int, Free], Ids]


def cohort_size(sample: int | float | str, population: int) -> int:
    """Clients per round: a number, a fraction of the population, or ``"all"``.

    Raises:
        ConfigError: more clients than there are, none, or a fraction outside (0, 1].
    """
    where = f"[round] sample = {sample!r}"
    if sample == "all":
        return population
    if isinstance(sample, str):
        raise ConfigError(
            "sample is a number of clients, a fraction, or 'all'", code="FS-CFG-060", where=where
        )
    if isinstance(sample, float) and (sample <= 1.0 or not sample.is_integer()):
        if not 0.0 < sample <= 1.0:
            raise ConfigError(
                "a fraction of the population must lie in (0, 1]",
                code="FS-CFG-060",
                where=where,
                hint="write a whole number for a number of clients",
            )
        return max(1, math.ceil(sample * population))
    count = int(sample)
    if not 1 <= count <= population:
        raise ConfigError(
            "the cohort cannot be drawn from this population",
            code="FS-CFG-061",
            where=where,
            why=f"{count} clients a round are asked for, {population} are registered",
            hint=f"set sample between 1 and {population}, or raise [data.partition] clients",
        )
    return count


def uniform() -> Sampler:
    """A fixed number of clients, uniformly without replacement among those available."""

    def sample(seed: int, round_index: int, attempt: int, population: int, count: int, free: Free) -> Ids:
        rng = generator(seed, Purpose.SAMPLE, round_index, attempt)
        return _available(rng, population, count, round_index, free)

    return sample


def poisson() -> Sampler:
    """Every client independently with probability count / population (the cohort's size varies).

    Drawn as a binomial number of clients, then that many uniformly: the same distribution in
    O(cohort).
    """

    def sample(seed: int, round_index: int, attempt: int, population: int, count: int, free: Free) -> Ids:
        rng = generator(seed, Purpose.SAMPLE, round_index, attempt)
        size = int(rng.binomial(population, min(1.0, count / population)))
        ids = np.sort(rng.choice(population, size, replace=False, shuffle=False)).astype(np.int64)
        return ids[free(ids, round_index)]

    return sample


def listed(*, clients: Sequence[int]) -> Sampler:
    """Always these clients, those of them that are available.

    Args:
        clients: ids, each once.
    """
    if not clients or len(set(clients)) != len(clients) or min(clients) < 0:
        raise ValueError("clients must be one or more distinct ids from 0")
    ids = np.sort(np.asarray(clients, np.int64))

    def sample(seed: int, round_index: int, attempt: int, population: int, count: int, free: Free) -> Ids:
        if ids[-1] >= population:
            raise ConfigError(
                f"client {ids[-1]} is not registered",
                code="FS-CFG-062",
                where="[sampler] clients",
                why=f"the population has {population} clients, numbered from 0",
                hint="name clients below that number",
            )
        return ids[free(ids, round_index)]

    return sample


def _available(rng: np.random.Generator, population: int, count: int, round_index: int, free: Free) -> Ids:
    """`count` distinct available clients, ascending; all of them where fewer are available.

    Draws and rejects, so that nobody asks a million clients whether they are there; where too few
    of a draw are available the whole population is asked once.
    """
    if len(free.busy) * 2 > population:  # hardly anybody is idle: ask those alone
        idle = np.ones(population, bool)
        idle[free.busy] = False
        ids = rng.permutation(np.flatnonzero(idle)).astype(np.int64)
        return np.sort(ids[free.there(ids, round_index)][:count])
    if count >= population:
        everyone = np.arange(population, dtype=np.int64)
        return everyone[free(everyone, round_index)]
    drawn = min(population, count)
    while drawn <= population // 2 or drawn == count:
        ids = rng.choice(population, drawn, replace=False).astype(np.int64)
        there = ids[free(ids, round_index)]
        if len(there) >= count:
            return np.sort(there[:count])
        if drawn > population // 2:
            break
        drawn *= 2
    everyone = rng.permutation(population).astype(np.int64)
    return np.sort(everyone[free(everyone, round_index)][:count])
