"""Pictures over the rounds: a metric, the losses, the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.runs import measures, theme
from fedsim.runs.numbers import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

Records = Sequence[Mapping[str, Any]]


def metric_figure(records: Records, metric: str, *, target: float | None = None) -> Figure | None:
    """One metric by round with its best value marked; None where it was never measured.

    Args:
        target: drawn as a dashed line.
    """
    found = measures.series(records, metric)
    top = measures.best(records, metric)
    if top is None:
        return None
    drawing = theme.figure()
    axes = theme.axes_of(drawing)
    axes.plot(
        found.rounds,
        found.values,
        color=theme.BLUE,
        marker="o",
        markersize=4,
        markevery=theme.markers_every(len(found.rounds)),
        label=f"test {metric}",
    )
    axes.plot(
        *top,
        linestyle="none",
        marker="*",
        markersize=13,
        color=theme.VERMILLION,
        markeredgecolor=theme.PAPER,
        label=f"best {short(top[1])}, round {top[0]}",
    )
    if target is not None:
        axes.axhline(
            target,
            color=theme.MUTED,
            linestyle=theme.DASHES[1],
            linewidth=1.2,
            label=f"target {short(target)}",
        )
    theme.round_axis(axes, _last(records))
    axes.set_ylabel(metric)
    theme.legend_above(drawing, theme.labelled(axes))
    return drawing


def loss_figure(records: Records) -> Figure | None:
    """Loss on the test set and while training; None where neither was measured.

    The axis is logarithmic where the losses span more than a factor of thirty.
    """
    lines = [
        (measures.series(records, name), label, number)
        for number, (name, label) in enumerate((("loss", "test"), ("train_loss", "training (clients)")))
    ]
    lines = [line for line in lines if line[0]]
    if not lines:
        return None
    drawing = theme.figure()
    axes = theme.axes_of(drawing)
    for found, label, number in lines:
        axes.plot(
            found.rounds,
            found.values,
            color=theme.SERIES[number],
            linestyle=theme.DASHES[number],
            marker=theme.MARKERS[number],
            markersize=4,
            markevery=theme.markers_every(len(found.rounds)),
            label=label,
        )
    values = np.concatenate([found.values for found, _, _ in lines])
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_numbers())
        axes.yaxis.set_minor_formatter(_no_numbers())
    theme.round_axis(axes, _last(records))
    axes.set_ylabel("loss")
    theme.legend_above(drawing, theme.labelled(axes))
    return drawing


def communication_figure(records: Records) -> Figure | None:
    """Bytes to and from clients, by round and summed up; None where nothing was sent."""
    down = measures.totals(records, "bytes_down")
    up = measures.totals(records, "bytes_up")
    if not down or not (down.values.sum() + up.values.sum()):
        return None
    drawing = theme.figure(height=4.0)
    above, below = drawing.subplots(2, 1, sharex=True)
    for number, (found, label) in enumerate(((down, "server to clients"), (up, "clients to server"))):
        look = {
            "color": theme.VERMILLION if number else theme.SKY,
            "linestyle": theme.DASHES[number],
            "marker": "s" if number else None,
            "markersize": 4,
            "markevery": theme.markers_every(len(found.rounds)),
            # Often as much goes up as down: the wide line is then seen behind the narrow one.
            "linewidth": 1.6 if number else 4.5,
            "label": label,
        }
        later = found.rounds > 0
        above.plot(found.rounds[later], found.values[later], **look)
        below.plot(found.rounds, np.cumsum(found.values), **look)
    for axes, label in ((above, "per round"), (below, "in total")):
        axes.set_ylabel(label)
        axes.grid(axis="y")
        axes.set_ylim(0, 1.12 * axes.dataLim.y1)
        axes.yaxis.set_major_formatter(_byte_labels())
    theme.round_axis(below, _last(records))
    theme.legend_above(drawing, theme.labelled(above))
    return drawing


def _byte_labels() -> Formatter:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit="B", sep=" ")


def _plain_numbers() -> Formatter:
    """0.1 and not a formula for ten to the power of minus one."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, position: f"{value:g}")


def _no_numbers() -> Formatter:
    from matplotlib.ticker import NullFormatter

    return NullFormatter()


def _last(records: Records) -> int:
    return max(int(record["round"]) for record in records)
