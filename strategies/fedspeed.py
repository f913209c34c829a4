"""FedSpeed: FedDyn's dual and proximal terms around a gradient that is taken uphill.

Sun et al. 2023, "FedSpeed: larger local interval, less communication round, and higher generalization
accuracy", Algorithm 1, in the scaled form h_i = -ĝ_i / ℓ of its dual ĝ_i, with ℓ for its 1/λ. Symbols: w
the broadcast model, x the local iterate, ρ the radius and α the share of the perturbed gradient, S the
participants, N the registered clients, η the local rate.

    client i:  x <- w
               repeat  g1 = g_i(x);  e = ρ g1 / (‖g1‖ + 1e-7);  g2 = g_i(x + e)
                       g~ = (1 - α) g1 + α g2
                       x <- x - η (g~ + ℓ (x - w + h_i))
               h_i <- h_i + Δ_i                           (ĝ_i <- ĝ_i - ℓ Δ_i)
    server:    h̄ <- h̄ + (1/N) Σ_S Δ_i
               w <- w + (1/|S|) Σ_S Δ_i + h̄               dual_average = "all"
               w <- (1/|S|) Σ_S (x_i + h_i)               dual_average = "participants", the published line

Always h̄ = (1/N) Σ_i h_i, so the two agree when everybody takes part. With ρ > 0 it comes to rest O(ρ) away
from where Σ ∇F_i = 0, because e does not shrink with the gradient.

    clip_scope     where [client] clip_norm acts
    total          on g~ + ℓ (x - w + h_i)
    data           on g~
    reference      on g~ + ℓ (h_i - w), with ℓ x outside, as the authors' program

    who holds h_i   down      up
    client          w         Δ_i        "participants": Δ_i + h_i in one vector
    server          w, h_i    Δ_i
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim.local import Direction, LocalAlgorithm, LocalSpec, Phase, Result, Terms, affine
from fedsim.optimizers import clip
from fedsim.rows import RowStore
from fedsim.strategies import fedavg, feddyn
from fedsim.strategies.fedavg import broadcast, mean_delta, model, server_vector
from fedsim.strategies.feddyn import ClientState, update_dual, with_zero_dual
from fedsim.strategies.fedprox import check_proximal, proximal
from fedsim.strategies.perturbation import check_radius, check_share, perturbed
from fedsim.strategies.relaxation import check_relaxation, from_lent_start, held_starts, relaxed
from fedsim.strategy import (
    Strategy,
    Sums,
    Traits,
    as_planned,
    fold_deltas,
    lend_nothing,
    moved,
    uniformly,
    weighted_sum,
)
from fedsim.types import Aux, Batch, Floats, GradFn, Ids, Message, UpdateBlock, WindowInfo
from fedsim.vector import Vector

ClipScope = Literal["total", "data", "reference"]


def regularised(
    g: Vector,
    x: Vector,
    terms: tuple[Tensor | float, Vector | None],
    *,
    scope: ClipScope,
    bound: float | None,
) -> Vector:
    """g + a·x + b with (a, b) = terms, and the clip where the scope puts it; ``total`` is the driver's."""
    a, b = terms
    if b is not None and scope == "reference":
        g, b = g + b, None
    if bound is not None and scope != "total":
        g = clip(g, bound)
    if isinstance(a, Tensor) or a != 0.0:
        g = g + a * x
    return g if b is None else g + b


def scoped(grad_fn: GradFn, terms: Terms, *, scope: ClipScope, bound: float | None) -> LocalAlgorithm:
    """SGD along `regularised` directions; affine under ``total``, where the driver clips."""
    half = affine(grad_fn, terms)
    if scope == "total":
        return half

    def direction(
        msg: Message, lent: Any, client_state: Any, x: Vector, carry: Any, batch: Batch
    ) -> tuple[Direction, Any, Aux]:
        g, aux = grad_fn(x, batch)
        added = terms(msg, lent, client_state)
        return Direction(regularised(g, x, added, scope=scope, bound=bound)), carry, aux

    return half._replace(phases=(Phase(direction, clips="direction"),), terms=None)


def report_shifted(
    msg: Message, lent: Any, client_state: ClientState, x: Vector, carry: Any, normaliser: Tensor
) -> tuple[Result, ClientState, Mapping[str, Tensor]]:
    """x_i + h_i in one vector, relative to w: what "participants" averages."""
    delta = x - msg.x
    dual = client_state.dual + delta
    return Result({"shifted": delta + dual}), ClientState(dual), {}


def fold_shifted(state: Any, block: UpdateBlock, weights: Floats, rows: Any) -> tuple[Sums, Sums]:
    """Σ (Δ_i + h_i) in the place of Σ Δ_i."""
    shifted = block.vectors["shifted"]
    total = torch.tensor(float(weights.sum()), dtype=torch.float64, device=shifted.device)
    return {"delta": weighted_sum(weights, shifted), "weight": total}, {}


def apply_mean(state: Any, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[Any, dict[str, float]]:
    """w <- w + what the participants sent, on average."""
    delta = mean_delta(reduced)
    return (state, {}) if delta is None else (state._replace(x=moved(state.x, delta)), {})


def fedspeed(
    *,
    prox: float = 0.1,
    rho: float = 0.1,
    alpha: float = 1.0,
    dual_average: Literal["all", "participants"] = "all",
    dual: bool = True,
    clip_scope: ClipScope = "total",
    state_at: Literal["client", "server"] = "client",
    init_beta: float = 0.0,
) -> Strategy:
    """Proximal and dual correction of perturbed gradients; clients count equally, no server rate.

    Args:
        prox: ℓ, the paper's 1/λ; above 0 while there are duals. lr · prox must stay below 2.
        rho: ρ >= 0, the radius of the perturbation; 0 is FedDyn with α = ℓ at one gradient a step.
        alpha: α in [0, 1], share of the perturbed gradient; 0 is FedDyn too.
        dual_average: whose duals enter w: those of all registered clients, or of the participants.
        dual: without duals it is FedSAM with a proximal term, with ρ = 0 FedProx.
        clip_scope: which part of a direction ``[client] clip_norm`` bounds.
        state_at: who holds h_i; the trajectories are the same.
        init_beta: β >= 0 of the relaxed start w + β (w - x_i^last); 0 keeps no x_i^last.
    """
    check_radius(rho)
    check_share(alpha)
    check_relaxation(init_beta)
    if not 0.0 <= prox < float("inf"):
        raise ValueError(f"prox must be at least 0 and finite, got {prox}")
    if dual and prox == 0.0:
        raise ValueError(
            "prox must be positive while there are duals: with 0 they grow and nothing holds them; "
            "set prox above 0, or dual = false"
        )
    if not dual and dual_average == "participants":
        raise ValueError(
            "dual_average = 'participants' has no duals to average; set dual = true, or leave it out"
        )
    at_client, keeps_last = state_at == "client", init_beta > 0.0
    over_all = dual and dual_average == "all"

    def terms(msg: Message, lent: Any, client_state: Any) -> tuple[Tensor | float, Vector | None]:
        if not dual:
            return proximal(prox)(msg, lent, client_state)
        # ℓ (x - w + h_i) = ℓ x + ℓ (h_i - w)
        h_i = client_state.dual if at_client else lent["dual"]
        return prox, prox * (h_i - msg.x)

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        check_proximal(spec, prox, "prox")
        gradient = perturbed(grad_fn, rho=rho, alpha=alpha)
        half = scoped(gradient, terms, scope=clip_scope, bound=spec.clip_norm)
        if not at_client:
            return half._replace(init=from_lent_start) if keeps_last else half
        if dual:
            half = half._replace(fresh=with_zero_dual, finish=update_dual if over_all else report_shifted)
        return relaxed(half, init_beta)

    def lend(state: Any, rows: RowStore, ids: Ids) -> dict[str, Tensor]:
        lent = {}
        if dual:
            lent["dual"] = rows.held(ids, "dual", like=server_vector(state.x)).to(state.x.dtype)
        if keeps_last:
            lent["start"] = held_starts(rows, ids, state.x, init_beta)
        return lent

    def fold(state: Any, block: UpdateBlock, weights: Floats, rows: RowStore) -> tuple[Sums, Sums]:
        sums, _ = fold_deltas(state, block, weights, rows)
        kept, wide, delta = {}, server_vector(state.x), block.vectors["delta"]
        if dual:
            kept["dual"] = rows.held(block.ids, "dual", like=wide) + delta
            if not over_all:
                sums["delta"] = sums["delta"] + weighted_sum(weights, kept["dual"])
        if keeps_last:
            kept["last"] = state.x.to(wide.dtype) + delta
        return sums, kept

    held = int(dual) + int(keeps_last)  # vectors of each client
    return Strategy(
        init=feddyn.init if over_all else fedavg.init,
        broadcast=broadcast,
        local=local,
        weigh=uniformly,
        fold=(fold_deltas if over_all or not dual else fold_shifted) if at_client or not held else fold,
        apply=feddyn.apply if over_all else apply_mean,
        model=model,
        plan=as_planned,
        lend=lend_nothing if at_client or not held else lend,
        traits=Traits(
            client_state=state_at if held else "none",
            client_hooks=True,
            affine=clip_scope == "total",
            columnwise=at_client or not held,
            down_factor=1 if at_client else 1 + held,
            server_vectors=1 if over_all else 0,
            server_vectors_per_client=0 if at_client else held,
            neutral="rho = 0 -> feddyn, alpha = prox; rho = 0, dual = false -> fedprox, weighting uniform",
        ),
    )
