"""FedAvgM: FedAvg with momentum on the server.

Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution for federated visual
classification", section 4.3. Symbols: x model, v velocity, Δ̄ the weighted mean of the deltas (minus
the paper's pseudo-gradient), β momentum, η_g server rate.

    client i:  FedAvg
    server:    v <- β v + Δ̄
               x <- x + η_g v                   x <- x + η_g (Δ̄ + β v)   with nesterov

A window in which nobody took part changes neither x nor v: the velocity does not decay by waiting.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.strategies.fedavg import (
    broadcast,
    check_finite,
    local,
    mean_delta,
    model,
    server_vector,
    weighing,
)
from fedsim.strategy import Strategy, Traits, as_planned, fold_deltas, lend_nothing, moved
from fedsim.types import Population, WindowInfo


class State(NamedTuple):
    """x [D]; v [D], zero before the first window."""

    x: Tensor
    v: Tensor


def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
    """The model at rest."""
    return State(x0, server_vector(x0))


def fedavgm(
    *,
    server_lr: float = 1.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    weighting: Literal["examples", "uniform"] = "examples",
) -> Strategy:
    """Federated averaging with server momentum.

    Args:
        server_lr: η_g. A constant Δ̄ is followed with step η_g Δ̄ / (1 - β) in the long run.
        momentum: β in [0, 1); 0 is FedAvg.
        nesterov: look ahead along the velocity.
        weighting: of the mean Δ̄, by examples or one client one vote.
    """
    check_finite(server_lr=server_lr)
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        delta = mean_delta(reduced)
        if delta is None:
            return state, {}
        v = momentum * state.v.double() + delta
        step = delta + momentum * v if nesterov else v
        return State(moved(state.x, server_lr * step), v.to(state.v.dtype)), {}

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=weighing(weighting),
        fold=fold_deltas,
        apply=apply,
        model=model,
        plan=as_planned,
        lend=lend_nothing,
        traits=Traits(
            modes=frozenset({"sync", "async"}),
            affine=True,
            columnwise=True,
            sums_only=True,
            server_vectors=1,
            neutral="momentum = 0 -> fedavg",
        ),
    )
