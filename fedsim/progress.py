"""How far a run has come: the best value so far, and whether the target is met."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.metrics import METRICS, SMALLER_IS_BETTER

Record = Mapping[str, Any]  # Any: numbers and words


@dataclass(slots=True)
class Progress:
    """What the session remembers between records; plain JSON in a checkpoint."""

    metric: str
    larger: bool
    best: dict[str, Any] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    rounds_since_best: int = 0

    def improved(self, record: Record, names: Sequence[str]) -> bool:
        """Take a record in; whether it holds a new best value."""
        values = {n: record[n] for n in names if n in record}
        if not values:
            return False
        self.final = values
        value = values.get(self.metric)
        if value is None or not math.isfinite(value):
            self.rounds_since_best += 1
            return False
        old = self.best.get("value")
        if old is None or (value > old if self.larger else value < old):
            self.best = {"metric": self.metric, "value": value, "round": record["round"]}
            self.rounds_since_best = 0
            return True
        self.rounds_since_best += 1
        return False


def progress_of(config: Config, names: Sequence[str]) -> Progress:
    """By ``[evaluation] best = "accuracy:max"``, or the first of `names`, the run's metrics.

    Raises:
        ConfigError: a metric that is not computed, or a direction other than max and min.
    """
    rule = config.evaluation.best
    if rule is None:
        metric = names[0]
        return Progress(metric, metric not in SMALLER_IS_BETTER)
    metric, _, direction = rule.partition(":")
    if metric not in names or direction not in ("", "max", "min"):
        raise ConfigError(
            f"the best model cannot be chosen by {rule!r}",
            code="FS-CFG-072",
            where="[evaluation] best",
            why=f"metrics of this run: {', '.join(names)}; direction max or min",
            hint=f'write best = "{names[0]}:max"',
        )
    larger = direction == "max" if direction else metric not in SMALLER_IS_BETTER
    return Progress(metric, larger)


def target_of(config: Config) -> Callable[[Record], bool]:
    """Whether a record meets ``[evaluation] target = "accuracy >= 0.97"``.

    Raises:
        ConfigError: a target of another form.
    """
    text = config.evaluation.target
    if text is None:
        return lambda record: False
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*([-+.\deE]+)\s*", text)
    if match is None or match[1] not in METRICS:
        raise ConfigError(
            f"the target {text!r} is not understood",
            code="FS-CFG-073",
            where="[evaluation] target",
            hint='write target = "accuracy >= 0.97" or "loss <= 0.1"',
        )
    metric, sign, bound = match[1], match[2], float(match[3])

    def met(record: Record) -> bool:
        value = record.get(metric)
        if value is None:
            return False
        return bool(value >= bound if sign == ">=" else value <= bound)

    return met
