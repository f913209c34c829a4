"""FedProx: FedAvg whose clients are held near the model that they received.

Li et al. 2020, "Federated optimization in heterogeneous networks", Algorithm 2 and equation 2.
Symbols: w the broadcast model, x the local iterate, μ the proximal coefficient, η the local rate.

    client i:  minimise F_i(x) + μ/2 ‖x - w‖²  from x = w:
               repeat  x <- x - η (g_i(x) + μ (x - w))
    server:    FedAvg

A client may stop after any number of steps (the paper's γ-inexact solutions): a device that does less
reports what it has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from fedsim.errors import ConfigError
from fedsim.local import LocalAlgorithm, LocalSpec, Terms, affine
from fedsim.strategies.fedavg import fedavg
from fedsim.strategy import Strategy
from fedsim.types import GradFn, Message
from fedsim.vector import Vector


def proximal(mu: float) -> Terms:
    """μ (x - w) as a·x + b: a = μ, b = -μ w."""

    def terms(msg: Message, lent: Any, client_state: Any) -> tuple[float, Vector | None]:
        return (mu, -mu * msg.x) if mu else (0.0, None)

    return terms


def check_proximal(spec: LocalSpec, coefficient: float, name: str) -> None:
    """Refuse a quadratic term that plain SGD cannot follow.

    x - w is multiplied by 1 - η·coefficient in every step: from η·coefficient = 2 on it grows whatever
    the data are.

    Raises:
        ConfigError: FS-CFG-080.
    """
    if spec.lr * coefficient >= 2.0:
        raise ConfigError(
            f"the local steps diverge: lr times {name} must be less than 2",
            code="FS-CFG-080",
            where=f"[client] lr = {spec.lr:g}, [strategy] {name} = {coefficient:g}",
            why=f"each step multiplies the distance to the broadcast model by 1 - {spec.lr * coefficient:g}",
            hint=f"lower [client] lr below {2.0 / coefficient:g}, or lower {name}",
        )


def fedprox(
    *,
    mu: float = 0.01,
    server_lr: float = 1.0,
    weighting: Literal["examples", "uniform", "population", "all"] = "examples",
    importance: Literal["uniform", "examples"] = "uniform",
) -> Strategy:
    """Federated averaging with a proximal term in each client's objective.

    Args:
        mu: μ >= 0; published scans go from 0.001 to 1. lr · mu must stay below 2.
        server_lr, weighting, importance: as in ``fedavg``.
    """
    if not 0.0 <= mu < float("inf"):
        raise ValueError(f"mu must be at least 0 and finite, got {mu}")
    averaging = fedavg(server_lr=server_lr, weighting=weighting, importance=importance)

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        check_proximal(spec, mu, "mu")
        return affine(grad_fn, proximal(mu))

    return averaging._replace(
        local=local,
        traits=replace(averaging.traits, client_hooks=True, neutral="mu = 0 -> fedavg"),
    )
