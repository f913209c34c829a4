"""FedDyn: a dual variable per client that aligns the clients' optima with the mean objective's.

Acar et al. 2021, "Federated learning based on dynamic regularization", Algorithm 1, in the scaled form
h_i = -g_i / α, h̄ = -h / α of its client and server duals g_i, h. Symbols: w the broadcast model,
x the local iterate, α > 0, S the participants, N the registered clients, η the local rate.

    client i:  minimise F_i(x) - ⟨g_i, x⟩ + α/2 ‖x - w‖²  from x = w:
               repeat  x <- x - η (g_i(x) + α (x - w + h_i))
               h_i <- h_i + Δ_i                           (g_i <- g_i - α Δ_i)
    server:    h̄ <- h̄ + (1/N) Σ_S Δ_i                     (h <- h - (α/N) Σ_S Δ_i)
               w <- w + (1/|S|) Σ_S Δ_i + h̄               (w <- mean_S x_i - h / α)

Always h̄ = (1/N) Σ_i h_i; where it stands still, h̄ = 0 and α h_i = -∇F_i(w). It does not become FedAvg
for any α while duals accumulate.

    who holds h_i   down      up
    client          w         Δ_i
    server          w, h_i    Δ_i        for clients that cannot keep state
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec, Result, affine
from fedsim.rows import RowStore
from fedsim.strategies.fedavg import broadcast, mean_delta, model, server_vector
from fedsim.strategies.fedprox import check_proximal
from fedsim.strategy import Strategy, Sums, Traits, as_planned, fold_deltas, lend_nothing, moved, uniformly
from fedsim.types import Floats, GradFn, Ids, Message, Population, UpdateBlock, WindowInfo
from fedsim.vector import Vector


class State(NamedTuple):
    """x [D] (the paper's w); h [D], the mean of all clients' duals in units of the model."""

    x: Tensor
    h: Tensor


class ClientState(NamedTuple):
    """h_i, where the client holds it."""

    dual: Vector


def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
    """The model with zero duals."""
    return State(x0, server_vector(x0))


def with_zero_dual(msg: Message) -> ClientState:
    """First participation of a client that will hold h_i."""
    return ClientState(msg.x.zeros_like())


def update_dual(
    msg: Message, lent: Any, client_state: ClientState, x: Vector, carry: Any, normaliser: Tensor
) -> tuple[Result, ClientState, Mapping[str, Tensor]]:
    """h_i <- h_i + Δ_i on the client."""
    delta = x - msg.x
    return Result({"delta": delta}), ClientState(client_state.dual + delta), {}


def lend_duals(state: State, rows: RowStore, ids: Ids) -> dict[str, Tensor]:
    """h_i of each client."""
    return {"dual": rows.held(ids, "dual", like=state.h).to(state.x.dtype)}


def fold_duals(state: State, block: UpdateBlock, weights: Floats, rows: RowStore) -> tuple[Sums, Sums]:
    """h_i <- h_i + Δ_i on the server."""
    sums, _ = fold_deltas(state, block, weights, rows)
    return sums, {"dual": rows.held(block.ids, "dual", like=state.h) + block.vectors["delta"]}


def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
    """Move h̄ by the population's mean and x by the participants' mean and the new h̄."""
    delta = mean_delta(reduced)
    if delta is None:
        return state, {}
    h = state.h.double() + reduced["delta"] / info.N
    return State(moved(state.x, delta + h), h.to(state.h.dtype)), {}


def feddyn(*, alpha: float = 0.1, state_at: Literal["client", "server"] = "client") -> Strategy:
    """Dynamic regularisation; clients count equally and there is no server rate.

    Args:
        alpha: α > 0; published scans go from 0.001 to 0.1. lr · alpha must stay below 2.
        state_at: who holds h_i; the trajectories are the same.
    """
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    at_client = state_at == "client"

    def terms(msg: Message, lent: Any, client_state: Any) -> tuple[float, Vector]:
        # α (x - w + h_i) = α x + α (h_i - w)
        h_i = client_state.dual if at_client else lent["dual"]
        return alpha, alpha * (h_i - msg.x)

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        check_proximal(spec, alpha, "alpha")
        if at_client:
            return affine(grad_fn, terms, fresh=with_zero_dual, finish=update_dual)
        return affine(grad_fn, terms)

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=uniformly,
        fold=fold_deltas if at_client else fold_duals,
        apply=apply,
        model=model,
        plan=as_planned,
        lend=lend_nothing if at_client else lend_duals,
        traits=Traits(
            client_state=state_at,
            client_hooks=True,
            affine=True,
            columnwise=at_client,
            sums_only=at_client,
            down_factor=1 if at_client else 2,
            server_vectors=1,
            server_vectors_per_client=0 if at_client else 1,
            neutral="no parameters make it fedavg: the duals accumulate for every alpha",
        ),
    )
