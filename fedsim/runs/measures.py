"""What the records of a run measured: series by round, the better direction, fairness over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.metrics import SMALLER_IS_BETTER

Floats = npt.NDArray[np.float64]


class Series(NamedTuple):
    """Values of one key by round: both [n], only where there is a finite value."""

    rounds: Floats
    values: Floats

    def __bool__(self) -> bool:
        return len(self.rounds) > 0


def series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The finite values of `name`; of a round that was tried again the last one."""
    found: dict[float, float] = {}
    for record in records:
        value = record.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found[float(record["round"])] = float(value)
    return Series(np.array(list(found)), np.array(list(found.values())))


def totals(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Sums of `name` by round, over all attempts of a round, [n] with zeros where it is absent."""
    sums: dict[float, float] = {}
    for record in records:
        value = record.get(name) or 0
        sums[float(record["round"])] = sums.get(float(record["round"]), 0.0) + float(value)
    return Series(np.array(list(sums)), np.array(list(sums.values())))


def smaller_is_better(metric: str) -> bool:
    """Whether a small value of this metric is a good one."""
    return metric in SMALLER_IS_BETTER


def best(records: Sequence[Mapping[str, Any]], metric: str) -> tuple[int, float] | None:
    """Round and value of the best evaluation, the earliest of equal ones; None without any."""
    found = series(records, metric)
    if not found:
        return None
    at = int(found.values.argmin() if smaller_is_better(metric) else found.values.argmax())
    return int(found.rounds[at]), float(found.values[at])


def main_metric(facts: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> str:
    """The metric that a run is about: the first of its own, else accuracy or loss as recorded."""
    named = facts.get("metrics") or []
    if named:
        return str(named[0])
    seen = {name for record in records for name in record}
    return "accuracy" if "accuracy" in seen else "loss"


class Cost(NamedTuple):
    """What a run took: rounds completed, failed attempts, seconds of computing, bytes both ways."""

    rounds: int
    failed: int
    seconds: float
    bytes_down: int
    bytes_up: int


def cost(records: Sequence[Mapping[str, Any]]) -> Cost:
    """Sums over the records of a run."""
    failed = [record.get("outcome") == "failed" for record in records]
    done = (int(r["round"]) for r, bad in zip(records, failed, strict=True) if not bad)
    return Cost(
        max(done, default=0),
        sum(failed),
        sum((r.get("time") or {}).get("seconds") or 0.0 for r in records),
        sum(r.get("bytes_down") or 0 for r in records),
        sum(r.get("bytes_up") or 0 for r in records),
    )


class Fairness(NamedTuple):
    """How a metric is spread over clients.

    Args:
        values: [n] of the clients that have one, from bad to good.
        mean: over clients, each counted once.
        worst: mean over the worst tenth (at least one client).
        spread: standard deviation over clients.
        tenth: how many clients the worst tenth is.
        without: clients that have no finite value, such as those without examples.
    """

    values: Floats
    mean: float
    worst: float
    spread: float
    tenth: int
    without: int


def fairness(values: npt.ArrayLike, *, smaller_better: bool = False) -> Fairness | None:
    """Spread of one value per client; None where no client has a finite one."""
    all_values = np.asarray(values, np.float64)
    finite = np.sort(all_values[np.isfinite(all_values)])
    if not len(finite):
        return None
    ranked = finite[::-1] if smaller_better else finite
    tenth = max(1, len(ranked) // 10)
    return Fairness(
        ranked,
        float(ranked.mean()),
        float(ranked[:tenth].mean()),
        float(ranked.std()),
        tenth,
        len(all_values) - len(finite),
    )
