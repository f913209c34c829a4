"""Client halves of tests' own, and what their clients answer."""

from __future__ import annotations

from typing import Any

from fedsim.local import (
    Direction,
)
from fedsim.strategies.fedavg import fedavg
from fedsim.strategy import Strategy
from fedsim.types import Batch, GradFn
from fedsim.vector import Vector
from tests.federations import Small


def with_local(algorithm: Any) -> Strategy:
    """FedAvg with another client half: (grad_fn) -> LocalAlgorithm."""
    return fedavg()._replace(local=lambda grad_fn, spec: algorithm(grad_fn))


def plain_direction(grad_fn: GradFn) -> Any:
    def direction(msg: Any, lent: Any, state: Any, x: Vector, carry: Any, batch: Batch) -> Any:
        g, aux = grad_fn(x, batch)
        return Direction(g), carry, aux

    return direction


def answers(small: Small, *, windows: int = 1) -> dict[int, Any]:
    """{client: (vectors, scalars, local steps, normaliser, metrics)} of the last window."""
    seen: dict[int, Any] = {}

    def note(observed: Any) -> None:
        block = observed.block
        for row, client in enumerate(block.ids.tolist()):
            seen[client] = (
                {n: v[row] for n, v in block.vectors.items()},
                {n: float(v[row]) for n, v in block.scalars.items()},
                int(block.local_steps[row]),
                float(block.normaliser[row]),
                {n: float(v[row]) for n, v in block.metrics.items()},
            )

    small.federation.observers = (note,)
    for _ in range(windows):
        assert small.federation.run_window().error is None
    return seen
