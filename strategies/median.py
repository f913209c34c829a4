"""Coordinate-wise median of the clients' deltas.

Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates",
Algorithm 1, option I. Symbols: Δ_i the rows of an n × D matrix, η_g server rate.

    client i:  FedAvg
    server:    x <- x + η_g med(Δ_1, …, Δ_n)      per coordinate; for even n the mean of the middle two

Every client has one vote whatever its data: fewer than n / 2 arbitrary rows cannot move a coordinate
beyond the range of the others. The rows are read by column blocks, so that the n × D matrix is never
copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.reduce import Rows
from fedsim.strategies.fedavg import State, broadcast, check_finite, init, local, model
from fedsim.strategy import Strategy, Traits, as_planned, lend_nothing, moved, uniformly
from fedsim.types import WindowInfo


def column_median(rows: Tensor) -> Tensor:
    """[D] float64, the median of each column of [n, D], n >= 1."""
    ordered = rows.sort(dim=0).values
    n = len(rows)
    low, high = ordered[(n - 1) // 2].double(), ordered[n // 2].double()
    return low + 0.5 * (high - low)


def median(*, server_lr: float = 1.0) -> Strategy:
    """Federated learning by the coordinate-wise median.

    Args:
        server_lr: η_g.
    """
    check_finite(server_lr=server_lr)

    def apply(state: State, rows: Rows, info: WindowInfo) -> tuple[State, dict[str, float]]:
        if len(rows) == 0:
            return state, {}
        middle = torch.cat([column_median(block) for block in rows.columns("delta")])
        return state._replace(x=moved(state.x, server_lr * middle)), {}

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=uniformly,
        fold="gather",
        apply=apply,
        model=model,
        plan=as_planned,
        lend=lend_nothing,
        traits=Traits(reduction="gather", affine=True, neutral="one or two clients -> fedavg, uniform"),
    )
