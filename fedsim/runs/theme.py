"""How pictures look: colours that stay apart for colour-blind eyes, one style, reproducible files.

The colours are those of Okabe and Ito 2008, "Color universal design". Nothing is told by colour alone:
lines differ in dash and marker, areas in hatching. An SVG names its colours exactly as below, so the
report can put its own for light and dark in their place (`recoloured`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, INK, MUTED, GRID = "#ffffff", "#1c1f23", "#5b6470", "#d9dce1"
BLUE, VERMILLION, GREEN, PURPLE, AMBER, SKY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
)  # fmt: skip
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, AMBER, SKY)
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (5, 1.4, 1.2, 1.4)))
MARKERS = ("o", "s", "^", "D", "v", "P")

WIDTH, HEIGHT = 5.2, 3.3
"""Inches. Narrow on purpose: shrunk to a phone's width the texts are still about 10 pixels high."""

_STYLE: dict[Any, Any] = {  # Any: matplotlib types every one of its keys
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 1.0,
    "svg.hashsalt": "fedsim",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save in here; matplotlib's settings are as before afterwards."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def figure(*, width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure; not known to pyplot, so nothing has to be closed. Only inside `style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def axes_of(drawing: Figure) -> Axes:
    """The one pair of axes of a figure, with horizontal grid lines."""
    axes = drawing.add_subplot()
    axes.grid(axis="y")
    return axes


def plain(text: str) -> str:
    """A text from outside as it can stand in a picture: no control characters, no half characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "?", text)


def save(drawing: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``<name>.svg`` and ``<name>.png``; the same figure gives the same bytes. Only inside `style`.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    paths = []
    for ending in ("svg", "png"):
        content = io.BytesIO()
        # A date would make equal pictures different files.
        drawing.savefig(content, format=ending, dpi=144, metadata={"Date": None} if ending == "svg" else None)
        path = folder / f"{name}.{ending}"
        write_atomically(path, content.getvalue())
        paths.append(path)
    return paths


_VARIABLES = {
    PAPER: "--paper", INK: "--ink", MUTED: "--muted", GRID: "--grid", BLUE: "--blue",
    VERMILLION: "--vermillion", GREEN: "--green", PURPLE: "--purple", AMBER: "--amber", SKY: "--sky",
    "#000000": "--ink",
}  # fmt: skip


def embedded(svg: str, name: str, *, label: str) -> str:
    """A saved SVG as it goes into HTML: without preamble, with own ids and a label for screen readers.

    Args:
        name: unlike that of any other picture of the page.
        label: what the picture shows, already escaped for HTML.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\b(id="|xlink:href="#|href="#|url\(#)', rf"\g<1>{name}-", body)
    head, end, rest = body.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{label}"{end}{rest}'


def recoloured(svg: str) -> str:
    """The SVG with a page's variables in the place of the colours above, for light and dark."""
    for colour, variable in _VARIABLES.items():
        svg = re.sub(rf"(?<=: ){colour}(?=[;\"])", f"var({variable})", svg)
    return svg


def round_axis(axes: Axes, last: int) -> None:
    """Whole numbers on the x axis, which ends at `last` rounds."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlim(-0.02 * max(last, 1), max(last, 1) * 1.02)
    axes.set_xlabel("round")


def markers_every(points: int) -> int:
    """Distance of markers so that a line carries about twelve of them."""
    return max(1, points // 12)


def legend_above(drawing: Figure, handles: Sequence[Artist], *, columns: int = 2) -> None:
    """A legend over the drawing, where it hides no data."""
    drawing.legend(handles=list(handles), loc="outside upper left", ncols=columns, borderaxespad=0.1)


def labelled(axes: Axes) -> list[Artist]:
    """What was drawn with a label."""
    return list(axes.get_legend_handles_labels()[0])
