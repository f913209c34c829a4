"""FedSAM and MoFedSAM: sharpness-aware local steps, without and with FedCM's momentum.

Qu et al. 2022, "Generalized federated learning via sharpness aware minimization"; FedSAM
also Caldarola, Caputo and Ciccone 2022, "Improving generalization in federated learning by seeking
flat minima". Symbols as in `perturbation` (g2 the gradient at x + e) and `fedcm` (m, α).

    client i:  x <- w;  repeat  x <- x - η g2                          FedSAM
                                x <- x - η (α g2 + (1 - α) m)          MoFedSAM
    server:    FedAvg                                                  FedSAM
               FedCM                                                   MoFedSAM
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedsim.local import LocalAlgorithm, LocalSpec, affine
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.fedcm import fedcm
from fedsim.strategies.perturbation import check_radius, perturbed
from fedsim.strategies.relaxation import check_relaxation, relaxed
from fedsim.strategy import Strategy
from fedsim.types import GradFn


def fedsam(
    *,
    rho: float = 0.1,
    server_lr: float = 1.0,
    weighting: Literal["examples", "uniform", "population", "all"] = "examples",
    importance: Literal["uniform", "examples"] = "uniform",
    init_beta: float = 0.0,
) -> Strategy:
    """Federated averaging of sharpness-aware local steps, two gradients each.

    Args:
        rho: ρ >= 0, the radius of the perturbation; 0 is FedAvg.
        server_lr, weighting, importance: as in ``fedavg``.
        init_beta: β >= 0 of the relaxed start w + β (w - x_i^last); 0 keeps no x_i^last.
    """
    check_radius(rho)
    check_relaxation(init_beta)
    averaging = fedavg(server_lr=server_lr, weighting=weighting, importance=importance)

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        return relaxed(affine(perturbed(grad_fn, rho=rho)), init_beta)

    return averaging._replace(
        local=local,
        traits=replace(
            averaging.traits,
            modes=frozenset({"sync"}),
            client_hooks=True,
            affine=True,
            client_state="client" if init_beta > 0.0 else "none",
            neutral="rho = 0 -> fedavg",
        ),
    )


def mofedsam(*, rho: float = 0.1, alpha: float = 0.1, server_lr: float = 1.0) -> Strategy:
    """Client-level momentum over sharpness-aware gradients; clients count equally.

    Args:
        rho: ρ >= 0, the radius of the perturbation; 0 is FedCM.
        alpha: α in (0, 1], share of the client's own gradient; 1 is FedSAM.
        server_lr: η_g.
    """
    check_radius(rho)
    momentum = fedcm(alpha=alpha, server_lr=server_lr)

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        return momentum.local(perturbed(grad_fn, rho=rho), spec)

    return momentum._replace(
        local=local,
        traits=replace(momentum.traits, neutral="rho = 0 -> fedcm; alpha = 1 -> fedsam, weighting uniform"),
    )
