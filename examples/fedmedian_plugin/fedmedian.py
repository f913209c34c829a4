"""A strategy of one's own, outside the package: proximal clients, coordinate-wise median server.

Client: g + mu (x - w), as in FedProx. Server: x <- x + server_lr · median of the deltas. Everything
that is not special is taken from FedAvg with `_replace`; both engines run it as it stands.
"""

from __future__ import annotations

import torch

from fedsim import make_strategy
from fedsim.local import LocalAlgorithm, LocalSpec, affine
from fedsim.reduce import Rows
from fedsim.strategy import State, Strategy, Traits, moved
from fedsim.types import GradFn, WindowInfo


def fedmedian(*, mu: float = 0.01, server_lr: float = 1.0) -> Strategy:
    """Coordinate-wise median of proximal clients.

    Args:
        mu: pull towards the broadcast model, at least 0.
        server_lr: factor of the median step.
    """
    if mu < 0.0:
        raise ValueError(f"mu must be at least 0, got {mu}")

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        return affine(grad_fn, lambda msg, lent, client_state: (mu, -mu * msg.x))

    def apply(state: State, rows: Rows, info: WindowInfo) -> tuple[State, dict[str, float]]:
        if len(rows) == 0:
            return state, {}
        middle = torch.cat([block.double().quantile(0.5, dim=0) for block in rows.columns("delta")])
        return state._replace(x=moved(state.x, server_lr * middle)), {}

    return make_strategy("fedavg", weighting="uniform")._replace(
        local=local, fold="gather", apply=apply, traits=Traits(reduction="gather", client_hooks=True)
    )
