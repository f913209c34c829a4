"""Draws docs/pictures/round.svg: one round, who does what, and where the seams are."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parents[2] / "docs" / "pictures" / "round.svg"

SERVER, CLIENT, INK = "#dbe9f6", "#fde7d0", "#222222"
BOXES = [  # (x, y, text, colour)
    (0, 3, "sampler\ncohort of the round", SERVER),
    (1, 3, "strategy.broadcast\none Message", SERVER),
    (2, 3, "strategy.plan, lend\nsteps and rows per client", SERVER),
    (3, 3, "engine.submit\nTask for b clients", SERVER),
    (3, 2, "local.init\nx, carry", CLIENT),
    (2, 2, "direction × S steps\ngrad_fn → direction → optimiser", CLIENT),
    (1, 2, "local.finish\ndelta, new state kept aside", CLIENT),
    (0, 2, "transform.encode\nwhat leaves the client", CLIENT),
    (0, 1, "round machine\naccepted · duplicate · late", SERVER),
    (1, 1, "transform.decode\nfinite? observers look", SERVER),
    (2, 1, "strategy.weigh, fold\nfloat64 sums, or rows", SERVER),
    (3, 1, "strategy.apply\nversion + 1, states commit", SERVER),
]
W, H, DX, DY = 2.5, 0.9, 3.1, 1.7


def draw() -> None:
    figure, axes = plt.subplots(figsize=(11, 5.2))
    centres = []
    for x, y, text, colour in BOXES:
        left, bottom = x * DX, y * DY
        axes.add_patch(plt.Rectangle((left, bottom), W, H, facecolor=colour, edgecolor=INK, lw=1))
        name, detail = text.split("\n")
        axes.text(left + W / 2, bottom + 0.6, name, ha="center", va="center", size=9.5, weight="bold")
        axes.text(left + W / 2, bottom + 0.28, detail, ha="center", va="center", size=8)
        centres.append((left + W / 2, bottom + H / 2))
    for (x0, y0), (x1, y1) in zip(centres, centres[1:], strict=False):
        horizontal = abs(y0 - y1) < 0.1
        step = W / 2 if horizontal else H / 2
        sign = (1 if x1 > x0 else -1) if horizontal else -1
        start = (x0 + sign * step, y0) if horizontal else (x0, y0 - step)
        end = (x1 - sign * step, y1) if horizontal else (x1, y1 + step)
        axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": INK})
    axes.text(-0.15, 3 * DY + H + 0.25, "server", size=10, style="italic")
    axes.text(-0.15, 2 * DY + H + 0.25, "clients, in blocks of C or one by one", size=10, style="italic")
    axes.text(W / 2 + 0.15, 1 * DY + H + 0.25, "server, when the window closes", size=10, style="italic")
    axes.set_xlim(-0.3, 3 * DX + W + 0.3)
    axes.set_ylim(DY - 0.3, 3 * DY + H + 0.6)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    matplotlib.rcParams["svg.hashsalt"] = "fedsim"
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(OUT)
