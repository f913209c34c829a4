"""What a partitioner is, and the arithmetic that all of them share.

A partitioner divides examples among clients by looking at labels and owners only, never at inputs.
It is a plain function ``(labels, owners, clients, rng) -> result``; where there is more to say than
that, it is a `Scheme`, which is called in the same way. The result is either one client per
example, or an index grouped by client with its offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedsim.errors import ConfigError

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

Divided: TypeAlias = Ints | tuple[Ints, Ints]
"""``assignment [n]``: the client of each example, -1 for none; or ``(index, offsets [N + 1])``."""

Divide: TypeAlias = Callable[[Ints, Ints | None, int, np.random.Generator], Divided]
"""``(labels [n], owners [n] or None, clients, rng) -> Divided``."""

UNASSIGNED = -1


class Scheme(NamedTuple):
    """A partitioner that says more about itself than a plain function can.

    Attributes:
        divide: the division itself. `clients` is 0 where the caller did not say how many.
        short: what happens to a client with fewer than ``min_examples``: ``fill`` gives it examples
            of the largest clients, ``drop`` removes it from the population. Real clients are
            dropped, since nobody else's examples are theirs.
        needs_clients: False where the data themselves say how many clients there are.
        deviations: clients -> [N] standard deviation of each client's feature noise, or None.
    """

    divide: Divide
    short: Literal["fill", "drop"] = "fill"
    needs_clients: bool = True
    deviations: Callable[[int], Floats] | None = None

    def __call__(
        self, labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator, /
    ) -> Divided:
        return self.divide(labels, owners, clients, rng)


def grouped(assignment: Ints, clients: int) -> tuple[Ints, Ints]:
    """``(index, offsets)`` of an assignment; every client's rows in ascending order."""
    order = np.argsort(assignment, kind="stable")
    sizes = np.bincount(assignment[assignment >= 0], minlength=clients)
    unassigned = len(assignment) - int(sizes.sum())
    return order[unassigned:].astype(np.int64, copy=False), offsets_of(sizes)


def offsets_of(sizes: npt.NDArray[np.integer]) -> Ints:
    """[N + 1] cumulative sizes, from 0."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def even_sizes(total: int, parts: int) -> Ints:
    """[parts] sizes that sum to `total` and differ by at most one, the larger ones first."""
    sizes = np.full(parts, total // parts, dtype=np.int64)
    sizes[: total % parts] += 1
    return sizes


def proportional_sizes(shares: Floats, total: int) -> Ints:
    """[N] sizes that sum to `total`, each within one of ``shares * total``.

    Cutting at the rounded cumulative shares keeps the sum exact without a second pass.
    """
    cuts = np.rint(np.cumsum(shares) * total).astype(np.int64)
    cuts[-1] = total
    return np.diff(np.minimum(cuts, total), prepend=0)


def log_gamma_draws(shape: float, size: int | tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Logarithms of Gamma(shape, 1) draws.

    Gamma(a) = Gamma(a + 1) U^(1/a) keeps them finite where a small `shape` would make the draws
    themselves underflow to 0 (all of a Dirichlet's components at once, from about 0.001 downwards).
    """
    grown = np.log(rng.standard_gamma(shape + 1.0, size))
    # 1 - U lies in (0, 1]: the logarithm is finite.
    return np.asarray(grown + np.log1p(-rng.random(size)) / shape, dtype=np.float64)


def normalised(logs: Floats) -> Floats:
    """Exponentials along the last axis divided by their sum, without overflow."""
    shifted = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), dtype=np.float64)


def above_zero(name: str, value: float) -> float:
    """`value` if it is a finite number above 0.

    Raises:
        ConfigError: FS-DAT-044.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        raise out_of_range(name, value, "a finite number above 0")
    return float(value)


def at_least(name: str, value: int, least: int) -> int:
    """`value` if it is a whole number of at least `least`.

    Raises:
        ConfigError: FS-DAT-044.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise out_of_range(name, value, f"a whole number of at least {least}")
    return int(value)


def out_of_range(name: str, value: object, accepted: str) -> ConfigError:
    """The error for one parameter of a partition."""
    return ConfigError(
        f"the partition parameter {name!r} has the value {value!r}",
        code="FS-DAT-044",
        where=f"data.partition.{name}",
        why=f"it must be {accepted}",
        hint=f"correct data.partition.{name}",
    )
