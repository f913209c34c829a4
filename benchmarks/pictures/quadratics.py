"""Draws docs/pictures/quadratics.svg and .png: who reaches the optimum of clients that disagree.

``python -m benchmarks.pictures.quadratics`` at the root of the repository; it also prints the last
distances. The federation is that of ``tests/unit/strategies/test_quadratics.py`` in kind: six clients
with different quadratics in four dimensions, all of them in every round, 20 exact gradient steps of
rate 0.1 in float64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.runs import theme
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.feddyn import feddyn
from fedsim.strategies.fedprox import fedprox
from fedsim.strategies.scaffold import scaffold
from fedsim.strategy import Strategy
from tests.quadratics import Array, federate, heterogeneous, run

OUT = Path(__file__).parents[2] / "docs" / "pictures"
ROUNDS, STEPS, LR = 120, 20, 0.1
CURVES: dict[str, Strategy] = {
    "FedAvg": fedavg(),
    "FedProx, μ = 1": fedprox(mu=1.0),
    "SCAFFOLD": scaffold(),
    "FedDyn, α = 1": feddyn(alpha=1.0),
}
LABELS = {  # where each curve is named: round, distance
    "FedAvg": (75, 2.0),
    "FedProx, μ = 1": (75, 0.04),
    "SCAFFOLD": (86, 1e-7),
    "FedDyn, α = 1": (13, 3e-10),
}


def distances(strategy: Strategy) -> Array:
    """[ROUNDS + 1], ‖x - x*‖ before training and after each round."""
    problem = heterogeneous(clients=6, dimensions=4)
    models = run(federate(problem, strategy, engine="stacked", steps=STEPS, lr=LR, block=6), ROUNDS)
    return np.linalg.norm(np.vstack([np.zeros(4), models]) - problem.optimum(), axis=1)


def draw(curves: dict[str, Array]) -> None:
    with theme.style():
        figure = theme.figure(width=6.4, height=4.0)
        axes = theme.axes_of(figure)
        for position, (name, values) in enumerate(curves.items()):
            axes.plot(
                np.maximum(values, 1e-16),
                color=theme.SERIES[position],
                linestyle=theme.DASHES[position],
                marker=theme.MARKERS[position],
                markevery=(5 * position, 20),
                markersize=5,
                label=name,
            )
            x, y = LABELS[name]
            axes.text(x, y, name)
        axes.set_yscale("log")
        axes.set_ylim(1e-16, 30)
        powers = range(-16, 1, 4)
        axes.set_yticks([10.0**k for k in powers], [f"1e{k}" if k else "1" for k in powers])
        theme.round_axis(axes, ROUNDS)
        axes.set_ylabel("distance to the mean optimum")
        theme.save(figure, OUT, "quadratics")


def main() -> None:
    curves = {name: distances(strategy) for name, strategy in CURVES.items()}
    for name, values in curves.items():
        print(f"{name:16} after {ROUNDS} rounds {values[-1]:.3g}")
    OUT.mkdir(parents=True, exist_ok=True)
    draw(curves)


if __name__ == "__main__":
    main()
