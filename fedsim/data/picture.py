"""The picture of a partition: which client owns how many examples of which class.

Up to 40 clients and 20 classes are stacked bars. More are a heat map, clients side by side in the
order of their most frequent class, with their sizes above it; beyond 1,000 clients, neighbours
share a column. The numbers of every client are in the CSV beside it.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.data.federated import FederatedData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ints = npt.NDArray[np.int64]

MOST_BARS = 40
MOST_COLOURS = 20
MOST_COLUMNS = 1000
_QUANTILES = 5  # classes to divide a regression target into


class PartitionPicture(NamedTuple):
    """The files of one picture."""

    svg: Path
    png: Path
    csv: Path


def draw_partition(data: FederatedData, folder: Path, *, name: str = "partition") -> PartitionPicture:
    """Draw the label histogram per client and write it with its numbers.

    The same data give the same bytes with the same matplotlib.

    Args:
        folder: made if it is missing.
        name: of the files, without ending.

    Returns:
        paths of ``<name>.svg``, ``<name>.png`` and ``<name>.csv`` (one row per client: number,
        name, examples, then one column per class).
    """
    histogram, classes = label_counts(data)
    folder.mkdir(parents=True, exist_ok=True)
    files = PartitionPicture(*(folder / f"{name}.{ending}" for ending in ("svg", "png", "csv")))
    _write_csv(files.csv, data, histogram, classes)

    import matplotlib

    # Names of clip paths are random and texts become outlines unless told otherwise.
    with matplotlib.rc_context({"svg.hashsalt": "fedsim", "svg.fonttype": "none"}):
        figure = _figure(data, histogram, classes)
        figure.savefig(files.svg, metadata={"Date": None})
        figure.savefig(files.png, dpi=120)
    return files


def label_counts(data: FederatedData) -> tuple[Ints, tuple[str, ...]]:
    """Histogram [N, K] of the training examples, and the K names of its columns.

    A regression target is divided at its quantiles into five classes.
    """
    dataset = data.dataset
    if dataset.classes is None:
        targets = dataset.train.targets.numpy()
        edges = np.quantile(targets, np.linspace(0.0, 1.0, _QUANTILES + 1))
        labels = np.searchsorted(edges[1:-1], targets, side="right").astype(np.int64)
        between = tuple(f"{low:.3g} … {high:.3g}" for low, high in zip(edges[:-1], edges[1:], strict=True))
        histogram = data.label_histogram(labels)
        missing = _QUANTILES - histogram.shape[1]  # quantiles coincide when many targets are equal
        return np.pad(histogram, ((0, 0), (0, missing))), between
    histogram = data.label_histogram()
    count = histogram.shape[1]
    known = dataset.label_names
    # A character class is shown as a Python literal where it would be invisible.
    named = tuple(label if label.strip() else repr(label)[1:-1] for label in known)
    return histogram, named if len(named) == count else tuple(str(k) for k in range(count))


def _write_csv(path: Path, data: FederatedData, histogram: Ints, classes: tuple[str, ...]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["client", "name", "examples", *classes])
        for client, counts in enumerate(histogram.tolist()):
            owner = data.names[client] if data.names else ""
            writer.writerow([client, owner, sum(counts), *counts])


def _figure(data: FederatedData, histogram: Ints, classes: tuple[str, ...]) -> Figure:
    from matplotlib.figure import Figure

    clients = len(histogram)
    if clients <= MOST_BARS and len(classes) <= MOST_COLOURS:
        figure = Figure(figsize=(max(6.0, 1.5 + 0.22 * clients), 3.6), layout="constrained")
        axes = figure.add_subplot()
        _bars(axes, data, histogram, classes)
    else:
        height = min(9.0, max(3.6, 1.9 + 0.11 * len(classes)))
        figure = Figure(figsize=(9.0, height), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1.1, height - 1.6]})
        _heat_map(figure, above, below, histogram, classes)
        axes = above
    axes.set_title(_title(data), fontsize=9, loc="left")
    return figure


def _title(data: FederatedData) -> str:
    sizes = data.sizes
    return (
        f"{data.dataset.name}, {data.description}\n{data.clients:,} clients with "
        f"{sizes.min():,} to {sizes.max():,} examples, median {np.median(sizes):,.0f}"
    )


def _bars(axes: Axes, data: FederatedData, histogram: Ints, classes: tuple[str, ...]) -> None:
    import matplotlib

    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"]
    position = np.arange(len(histogram))
    bottom = np.zeros(len(histogram))
    for k, label in enumerate(classes):
        axes.bar(position, histogram[:, k], bottom=bottom, color=colours(k), width=0.85, label=label)
        bottom += histogram[:, k]
    axes.set_xlim(-0.6, len(histogram) - 0.4)
    axes.set_ylabel("training examples")
    if data.names:
        short = [owner if len(owner) <= 18 else owner[:17] + "…" for owner in data.names]
        axes.set_xticks(position, short, rotation=90, fontsize=7)
    else:
        axes.set_xticks(position[:: 1 if len(histogram) <= 20 else 5])
        axes.set_xlabel("client")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        title="class",
        fontsize=7,
        title_fontsize=7,
        ncols=1 if len(classes) <= 12 else 2,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        reverse=True,
    )


def _heat_map(figure: Figure, above: Axes, below: Axes, histogram: Ints, classes: tuple[str, ...]) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    edges, columns = _pooled(histogram[_by_main_class(histogram)])
    widths = np.diff(edges)
    totals = columns.sum(axis=1)
    shares = columns / np.maximum(totals, 1)[:, None]
    mesh = below.pcolormesh(
        edges,
        np.arange(len(classes) + 1) - 0.5,
        shares.T,
        cmap="viridis",
        # Shares of many classes are all small: a root spreads them.
        norm=PowerNorm(1.0 if len(classes) <= MOST_COLOURS else 0.5, vmin=0.0, vmax=1.0),
        rasterized=True,  # thousands of rectangles would be megabytes of SVG
    )
    step = -(-len(classes) // 40)
    below.set_yticks(range(0, len(classes), step), classes[::step], fontsize=7)
    below.invert_yaxis()
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_ylabel("class")
    pooled = f" ({widths[0]} to a column)" if widths[0] > 1 else ""
    below.set_xlabel(f"clients, ordered by their most frequent class{pooled}")
    figure.colorbar(mesh, ax=[above, below], label="share of the client's examples", pad=0.01)
    above.stairs(totals / widths, edges.astype(np.float64), fill=True, color="0.45")
    above.set_ylabel("examples")
    above.set_ylim(bottom=0)
    above.spines[["top", "right"]].set_visible(False)


def _by_main_class(histogram: Ints) -> Ints:
    """[N] order of the clients: by most frequent class, then by its share, the purest first."""
    totals = np.maximum(histogram.sum(axis=1), 1)
    share = histogram.max(axis=1, initial=0) / totals
    return np.lexsort((-share, histogram.argmax(axis=1)))


def _pooled(counts: Ints) -> tuple[Ints, Ints]:
    """Neighbouring clients together: edges [columns + 1] in clients, counts [columns, K].

    There are at most MOST_COLUMNS columns, equally wide but for the last.
    """
    per_column = -(-len(counts) // MOST_COLUMNS)
    starts = np.arange(0, len(counts), per_column)
    return np.append(starts, len(counts)), np.add.reduceat(counts, starts, axis=0)
