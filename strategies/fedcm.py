"""FedCM: local steps that follow, for the larger part, the direction of everybody's last steps.

Xu et al. 2021, "FedCM: federated learning with client-level momentum". Symbols: x model, y
local iterate, m the momentum (the paper's Δ_t, in units of a gradient), α in (0, 1], η local rate, η_g
server rate, S the participants.

    client i:  y <- x;  repeat  y <- y - η (α g_i(y) + (1 - α) m)
    server:    m <- -(1/|S|) Σ_S Δ_i / Σ_k η_k
               x <- x + η_g (1/|S|) Σ_S Δ_i

Σ_k η_k is each client's own normaliser, K η for K plain steps, so that m stays the mean direction when
clients or rounds differ in steps or rates. A client that took no step has no direction: it counts in x and
not in m. m starts at 0, and the first window is FedAvg with local rate α η.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.local import (
    Direction,
    LocalAlgorithm,
    LocalSpec,
    Phase,
    from_broadcast,
    report_delta,
    stateless,
)
from fedsim.strategies.client_momentum import fold, weigh
from fedsim.strategies.fedavg import check_finite, mean_delta, model, server_vector
from fedsim.strategy import (
    Strategy,
    Traits,
    as_planned,
    lend_nothing,
    moved,
)
from fedsim.types import (
    Aux,
    Batch,
    GradFn,
    Message,
    Population,
    WindowInfo,
)
from fedsim.vector import Vector


class State(NamedTuple):
    """x, m [D]."""

    x: Tensor
    m: Tensor


def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
    """The model; nobody has moved yet."""
    return State(x0, server_vector(x0))


def broadcast(state: State) -> Message:
    """x and m."""
    return Message({"x": state.x, "m": state.m.to(state.x.dtype)})


def fedcm(*, alpha: float = 0.1, server_lr: float = 1.0) -> Strategy:
    """Client-level momentum; clients count equally.

    Args:
        alpha: α in (0, 1], share of the client's own gradient; 1 is FedAvg.
        server_lr: η_g.
    """
    check_finite(server_lr=server_lr)
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}")

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        def direction(
            msg: Message, lent: Any, client_state: Any, y: Vector, carry: Any, batch: Batch
        ) -> tuple[Direction, Any, Aux]:
            g, aux = grad_fn(y, batch)
            return Direction(alpha * g + (1.0 - alpha) * msg.m), carry, aux

        return LocalAlgorithm(stateless, from_broadcast, (Phase(direction),), report_delta)

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        delta = mean_delta(reduced)
        if delta is None:
            return state, {}
        m = state.m
        if float(reduced["moving"]) > 0.0:
            m = (reduced["gradient"] / reduced["moving"]).to(m.dtype)
        return State(moved(state.x, server_lr * delta), m), {}

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=weigh,
        fold=fold,
        apply=apply,
        model=model,
        plan=as_planned,
        lend=lend_nothing,
        traits=Traits(
            client_hooks=True,
            needs_normaliser=True,
            columnwise=True,
            down_factor=2,
            server_vectors=1,
            neutral="alpha = 1 -> fedavg, weighting uniform",
        ),
    )
