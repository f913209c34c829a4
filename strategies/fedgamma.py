"""FedGAMMA: SCAFFOLD whose gradients are sharpness-aware.

Dai et al. 2023, "FedGAMMA: federated learning with global sharpness-aware minimization".
Symbols as in `scaffold` (c, c_i) and `perturbation` (g2 the gradient at y + e).

    client i:  y <- x
               repeat  e = ρ g1 / (‖g1‖ + 1e-7);  y <- y - η (g2 - c_i + c)
               c_i+ = c_i - c + (x - y) / Σ_k η_k          control = "delta"
                      mean of the steps' g2                control = "gradients"
    server:    SCAFFOLD

The controls are of g2: they correct the drift of the very gradients that the steps take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.strategies.perturbation import check_radius, perturbed
from fedsim.strategies.scaffold import scaffold
from fedsim.strategy import Strategy
from fedsim.types import GradFn


def fedgamma(
    *,
    rho: float = 0.1,
    server_lr: float = 1.0,
    state_at: Literal["client", "server"] = "client",
    control: Literal["delta", "gradients"] = "delta",
) -> Strategy:
    """Stochastic controlled averaging of sharpness-aware local steps; clients count equally.

    Args:
        rho: ρ >= 0, the radius of the perturbation; 0 is SCAFFOLD, option 2.
        server_lr: η_g.
        state_at: who holds c_i; the trajectories are the same.
        control: what c_i is refreshed from: the distance moved, or the gradients of the steps, which
            weight decay and clipping do not enter and for which any local optimiser will do.
    """
    check_radius(rho)
    controlled = scaffold(server_lr=server_lr, state_at=state_at, control=control)

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        return controlled.local(perturbed(grad_fn, rho=rho), spec)

    return controlled._replace(
        local=local,
        traits=replace(controlled.traits, neutral="rho = 0 -> scaffold"),
    )
