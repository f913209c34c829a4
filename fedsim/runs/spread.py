"""The picture of fairness: one metric for every client, from the worst to the best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim.runs import theme
from fedsim.runs.measures import Fairness
from fedsim.runs.numbers import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 60
"""Above so many clients bars have no gaps; above ten times as many neighbours share one by their mean."""


def fairness_figure(found: Fairness, metric: str) -> Figure:
    """Sorted bars with the worst tenth hatched, the mean as a line, the spread in words."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    drawing = theme.figure()
    axes = theme.axes_of(drawing)
    clients = len(found.values)
    if clients <= MOST_BARS:
        position = np.arange(clients) + 0.5
        bars = axes.bar(position, found.values, width=0.8, color=theme.SKY)
        for bar in bars[: found.tenth]:
            bar.set(facecolor=theme.VERMILLION, hatch="////", edgecolor=theme.PAPER)
    else:
        for start, stop, colour, hatch in (
            (0, found.tenth, theme.VERMILLION, "////"),
            (found.tenth, clients, theme.SKY, None),
        ):
            edges, heights = _pooled(found.values, start, stop)
            axes.stairs(heights, edges, fill=True, facecolor=colour, hatch=hatch, edgecolor=theme.PAPER, lw=0)
    mean = axes.axhline(found.mean, color=theme.INK, linestyle=theme.DASHES[1], linewidth=1.4)
    axes.set_xlim(0, clients)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel(f"{clients:,} clients, from the worst to the best")
    axes.set_ylabel(f"{metric} on the client's data")
    mean.set_label(f"mean {short(found.mean)}, spread {short(found.spread)}")
    worst = Patch(
        facecolor=theme.VERMILLION,
        hatch="////",
        edgecolor=theme.PAPER,
        label=f"worst 10 %: {short(found.worst)}",
    )
    theme.legend_above(drawing, [worst, mean])
    if metric == "accuracy":
        axes.set_ylim(0, 1)
    return drawing


def _pooled(values: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges [b + 1] and mean heights [b] of the clients `start` … `stop`."""
    width = max(1, -(-len(values) // (10 * MOST_BARS)))
    starts = np.arange(start, stop, width)
    edges = np.append(starts, stop)
    return edges, np.add.reduceat(values[:stop], starts) / np.diff(edges)
