"""Several runs side by side; those that differ only in their seeds are one, with mean and deviation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedsim.errors import ConfigError
from fedsim.runs import measures, theme
from fedsim.runs.folder import RunFolder
from fedsim.runs.numbers import in_bytes, in_time, short
from fedsim.runs.table import csv_bytes, flat
from fedsim.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Spread(NamedTuple):
    """Mean over runs and their sample standard deviation, None of a single run."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return short(self.mean) + ("" if self.deviation is None else f" ± {short(self.deviation)}")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Runs of one configuration.

    Attributes:
        label: the runs' name, with a number where other groups have the same.
        folders: names of their folders.
        seeds: of the runs.
        outcomes: as in the manifests.
        curves: the metric of each run by round.
        final, best: of the metric over the runs; None where no run measured it.
        rounds: completed, on average.
        seconds, bytes: of computing and of communication, on average.
        differs: keys of the configuration in which the groups differ, with this group's values.
    """

    label: str
    folders: tuple[str, ...]
    seeds: tuple[int | None, ...]
    outcomes: tuple[str, ...]
    curves: tuple[measures.Series, ...]
    final: Spread | None
    best: Spread | None
    rounds: float
    seconds: float
    bytes: float
    differs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Groups of runs, compared by one metric."""

    metric: str
    groups: tuple[Group, ...]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as texts, one row a group."""
        header = ["run", "seeds", f"final {self.metric}", f"best {self.metric}", "rounds", "time", "bytes"]
        differing = list(dict.fromkeys(key for group in self.groups for key in group.differs))
        rows = [
            [
                group.label,
                str(len(group.folders)),
                "–" if group.final is None else str(group.final),
                "–" if group.best is None else str(group.best),
                short(group.rounds),
                in_time(group.seconds),
                in_bytes(group.bytes),
                *(str(group.differs.get(key, "–")) for key in differing),
            ]
            for group in self.groups
        ]
        return header + differing, rows

    def document(self) -> dict[str, Any]:
        """The same for JSON, with numbers."""
        return {
            "metric": self.metric,
            "groups": [
                {
                    "label": group.label,
                    "runs": list(group.folders),
                    "seeds": list(group.seeds),
                    "outcomes": list(group.outcomes),
                    "final": None if group.final is None else group.final._asdict(),
                    "best": None if group.best is None else group.best._asdict(),
                    "rounds": group.rounds,
                    "seconds": group.seconds,
                    "bytes": group.bytes,
                    "differs": dict(group.differs),
                }
                for group in self.groups
            ],
        }


def compare(runs: Sequence[RunFolder], *, metric: str | None = None) -> Comparison:
    """Group the runs by configuration without seeds and name, in the order in which they were given.

    Args:
        metric: to compare by; that of the first run when None.

    Raises:
        ConfigError: FS-CFG-094, there is no run, or no run measured the metric.
        EnvironmentProblem: FS-ENV-023, FS-ENV-024, a run's file is damaged or cannot be read.
    """
    if not runs:
        raise ConfigError(
            "there are no runs to compare",
            code="FS-CFG-094",
            hint="name two or more runs; fedsim ls lists them",
        )
    unique = list({run.path.resolve(): run for run in runs}.values())
    records = [run.records() for run in unique]
    name = metric or measures.main_metric(unique[0].manifest["facts"], records[0])
    if not any(measures.series(each, name) for each in records):
        raise ConfigError(
            f"none of these runs measured {name!r}",
            code="FS-CFG-094",
            why=f"the first recorded {', '.join(sorted({k for r in records[0] for k in r}))}",
            hint="choose another metric with --metric",
        )
    settings = [_settings(run.config) for run in unique]
    members: dict[str, list[int]] = {}
    for position, setting in enumerate(settings):
        members.setdefault(json.dumps(setting, sort_keys=True, default=str), []).append(position)
    differing = _differing([settings[places[0]] for places in members.values()])
    names = [unique[places[0]].name for places in members.values()]
    groups = []
    for number, places in enumerate(members.values()):
        label = names[number] if names.count(names[number]) == 1 else f"{names[number]} ({number + 1})"
        setting = settings[places[0]]
        differs = {key: setting[key] for key in differing if key in setting}
        groups.append(_group(label, [unique[p] for p in places], [records[p] for p in places], name, differs))
    return Comparison(name, tuple(groups))


def _group(
    label: str,
    runs: Sequence[RunFolder],
    records: Sequence[Sequence[Mapping[str, Any]]],
    metric: str,
    differs: Mapping[str, Any],
) -> Group:
    curves = tuple(measures.series(each, metric) for each in records)
    tops = [top[1] for each in records if (top := measures.best(each, metric)) is not None]
    costs = [measures.cost(each) for each in records]
    return Group(
        label,
        tuple(run.path.name for run in runs),
        tuple(run.manifest["seeds"].get("run") for run in runs),
        tuple(run.status() for run in runs),
        curves,
        _spread([curve.values[-1].item() for curve in curves if curve]),
        _spread(tops),
        float(np.mean([cost.rounds for cost in costs])),
        float(np.mean([cost.seconds for cost in costs])),
        float(np.mean([cost.bytes_down + cost.bytes_up for cost in costs])),
        differs,
    )


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with dotted keys, without what tells repetitions of one experiment apart."""
    keys = dict(flat(config))
    for key in ("run.seed", "run.name", "data.partition.seed"):
        keys.pop(key, None)
    return keys


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if any(setting.get(key) != settings[0].get(key) for setting in settings[1:])]


def comparison_figure(comparison: Comparison) -> Figure:
    """The metric by round, a line and a marker for each group; several seeds as mean and deviation.

    Draw and save it inside `theme.style`.
    """
    drawing = theme.figure(width=6.4, height=3.6 + 0.12 * len(comparison.groups))
    axes = theme.axes_of(drawing)
    last = 0
    for number, group in enumerate(comparison.groups):
        rounds, values = _aligned(group.curves)
        if not len(rounds):
            continue
        last = max(last, int(rounds[-1]))
        mean = values.mean(axis=0)
        colour = theme.SERIES[number % len(theme.SERIES)]
        many = f" ({len(values)} seeds, mean ± deviation)" if len(values) > 1 else ""
        axes.plot(
            rounds,
            mean,
            color=colour,
            linestyle=theme.DASHES[number // len(theme.SERIES) % len(theme.DASHES)],
            marker=theme.MARKERS[number % len(theme.MARKERS)],
            markersize=4,
            markevery=theme.markers_every(len(rounds)),
            label=theme.plain(group.label) + many,
        )
        if len(values) > 1:
            deviation = values.std(axis=0, ddof=1)
            axes.fill_between(rounds, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
    theme.round_axis(axes, last)
    axes.set_ylabel(comparison.metric)
    theme.legend_above(drawing, theme.labelled(axes), columns=1)
    return drawing


def _aligned(curves: Sequence[measures.Series]) -> tuple[measures.Floats, measures.Floats]:
    """Rounds [n] that every measured curve has, and the values [curves, n] there."""
    measured = [curve for curve in curves if curve]
    if not measured:
        return np.empty(0), np.empty((0, 0))
    rounds = measured[0].rounds
    for curve in measured[1:]:
        rounds = np.intersect1d(rounds, curve.rounds)
    return rounds, np.stack([c.values[np.isin(c.rounds, rounds)] for c in measured])


def save_comparison(comparison: Comparison, path: Path) -> list[Path]:
    """Write the picture as SVG and PNG and its numbers as CSV, all named as `path` but for the ending.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    stem = path.with_suffix("") if path.suffix in (".svg", ".png", ".csv") else path
    with theme.style():
        paths = theme.save(comparison_figure(comparison), stem.parent, stem.name)
    rows = [
        (group.label, folder, seed, int(round_index), value)
        for group in comparison.groups
        for folder, seed, curve in zip(group.folders, group.seeds, group.curves, strict=True)
        for round_index, value in zip(curve.rounds, curve.values.tolist(), strict=True)
    ]
    table = stem.with_name(f"{stem.name}.csv")
    write_atomically(table, csv_bytes(["group", "run", "seed", "round", comparison.metric], rows))
    return [*paths, table]
