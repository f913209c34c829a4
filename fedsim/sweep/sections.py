"""The table ``[sweep]`` of a sweep file: its keys, their types and defaults.

    [sweep]
    seeds = [1, 2, 3]
    [[sweep.axis]]
    key = "client.lr"
    values = [0.01, 0.1]
    [sweep.variants.fedprox]
    strategy.name = "fedprox"

Everything outside of ``[sweep]`` is an ordinary configuration, which every cell begins with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedsim.config_sections import Values
from fedsim.schema import check, refusal

M = TypeVar("M", bound=BaseModel)

SIZES = ("quick", "decision", "full")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SweepTable(_Table):
    """``[sweep]`` itself; the tables below it are checked one by one, each under its own name."""

    name: str | None = None
    """Of the sweep and of its folder; the default is the file's name."""
    title: str | None = None
    """Over the table; the default is the name."""
    seeds: list[int] | str | None = None
    """A list, or a text such as "1..5"."""
    seed_keys: list[str] = ["run.seed"]
    """Keys that take the seed; data.partition.seed among them draws a new partition for each seed."""
    default_size: str | None = None
    """The size that is taken without --size; none takes the file as it stands."""
    variants: dict[str, dict[str, Any]] | None = None
    """Name -> the keys in which it differs from the configuration."""
    axis: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    quick: dict[str, Any] | None = None
    decision: dict[str, Any] | None = None
    full: dict[str, Any] | None = None


class AxisTable(_Table):
    """One ``[[sweep.axis]]``."""

    key: str | None = None
    """The key that takes each of the values."""
    name: str | None = None
    """Of the column; the default is the key."""
    values: list[Any] | dict[str, dict[str, Any]]  # Any: whatever the key takes
    """Values of the key, or a table of named settings, each a set of keys."""


class ReportTable(_Table):
    """``[sweep.report]``: what the table and the picture show."""

    metrics: list[str] = []
    """Keys of metrics.jsonl, the one that it is about first; the default is the runs' own first metric."""
    target: float | None = None
    """Value of the first metric that is waited for: rounds to it, and seconds of the simulated clock."""
    by: Literal["round", "clock_seconds"] = "round"
    """What the curves are drawn against."""
    baseline: str | None = None
    """Variant that the others are compared with, paired by seed."""
    plot: Literal["curves", "axis"] = "curves"
    """Curves over the rounds, or the final value against a numeric axis."""
    axis: str | None = None
    """The axis to draw against where several are numeric."""
    band: Literal["deviation", "range"] = "deviation"
    """Around the mean: the standard deviation over seeds, or from the least to the largest."""
    y: list[float] | None = None
    """Least and largest value of the y axis."""
    log: bool | None = None
    """Logarithmic x axis of plot = "axis"; the default decides by the values."""


class SizeTable(BaseModel):
    """``[sweep.quick]`` and its like; further keys are tables of the configuration."""

    model_config = ConfigDict(extra="allow", frozen=True)

    seeds: list[int] | str | None = None
    variants: list[str] | None = None
    """Only these variants."""
    axis: dict[str, list[Any]] = {}
    """Axis -> its values in this size (of an axis of named settings: their names)."""
    report: dict[str, Any] = {}
    """Keys of ``[sweep.report]`` that are others in this size."""


def checked(model: type[M], values: Mapping[str, Any], *, where: str) -> M:
    """`values` as an instance of `model`.

    Args:
        where: file and table, for the message.

    Raises:
        ConfigError: FS-CFG-004 unknown key, FS-CFG-005 wrong type, FS-CFG-007 missing key.
    """
    try:
        return check(model, values)
    except ValidationError as error:
        raise refusal(error, values, list(model.model_fields), where=where) from error


def own_tables(size: SizeTable) -> Values:
    """The tables of the configuration that a size holds."""
    return dict(size.model_extra or {})
