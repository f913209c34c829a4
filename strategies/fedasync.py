"""FedAsync: the model moves with every answer, the less the staler it is.

Xie, Koyejo and Gupta 2019, "Asynchronous federated optimization", Algorithm 1.
Symbols: w the model, x_0 the version that client i started from, x_i its result, Δ_i = x_i - x_0,
u staleness, s a staleness function (``fedsim.strategies.staleness``), α mixing weight, ρ proximal
coefficient, η local rate, η_g server rate.

    client i:   minimise F_i(x) + ρ/2 ‖x - x_0‖²  from x = x_0:
                repeat  x <- x - η (g_i(x) + ρ (x - x_0))
    server, on an arrival from i:
      mixing    w <- (1 - α_u) w + α_u x_i          α_u = α s(u)      the published form
      delta     w <- w + η_g s(u) Δ_i

The mixing form pulls w towards a model that is old even where the client learned nothing (Δ_i = 0);
the delta form does not, and is the default. With u = 0 and α = η_g = 1 both give w = x_i.

Arrivals that fall into one window (they came at the same moment, or the scheduler closes windows less
often than on every arrival) have the same w before them. The delta form adds what each would add by
itself. The mixing form takes the mean of their pulls α_u (x_i - w), so that w stays between the old w
and the x_i: their sum would overshoot from the second on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec, Result, affine, report_delta
from fedsim.strategies.fedavg import broadcast, check_finite, model
from fedsim.strategies.fedprox import check_proximal, proximal
from fedsim.strategies.staleness import check_max_staleness, staleness_weights, too_old
from fedsim.strategy import Strategy, Sums, Traits, as_planned, fold_deltas, lend_nothing, moved, weighted_sum
from fedsim.types import Bools, Floats, GradFn, Message, Meta, Population, UpdateBlock, WindowInfo
from fedsim.vector import Vector

MIXING_PROX = 0.005
"""ρ of the mixing form where none is given: the experiments of the paper."""


class State(NamedTuple):
    """x [D], the symbol w above."""

    x: Tensor


def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
    """The model alone."""
    return State(x0)


def report_model(
    msg: Message, lent: Any, client_state: Any, x: Vector, carry: Any, normaliser: Tensor
) -> tuple[Result, Any, Mapping[str, Tensor]]:
    """x_i itself: the server mixes models."""
    return Result({"x": x}), client_state, {}


def fold_models(
    state: State, block: UpdateBlock, weights: Floats, rows: Any
) -> tuple[Sums, Mapping[str, Tensor]]:
    """{"x": Σ α_u x_i, "weight": Σ α_u, "count": Σ 1}."""
    x = block.vectors["x"]
    sums = {
        "x": weighted_sum(weights, x),
        "weight": torch.tensor(float(weights.sum()), dtype=torch.float64, device=x.device),
        "count": torch.tensor(float(len(block)), dtype=torch.float64, device=x.device),
    }
    return sums, {}


def apply_mixing(
    state: State, reduced: dict[str, Tensor], info: WindowInfo
) -> tuple[State, dict[str, float]]:
    """w <- (1 - ᾱ) w + mean α_u x_i with ᾱ = mean α_u, over the arrivals of the window."""
    count = reduced.get("count")
    if count is None or not float(count) > 0.0:
        return state, {}
    # Not w + ᾱ (x_i - w): with ᾱ = 1 this gives x_i to the last bit.
    x = (1.0 - reduced["weight"] / count) * state.x.double() + reduced["x"] / count
    return State(x.to(state.x.dtype)), {}


def fedasync(
    *,
    form: Literal["delta", "mixing"] = "delta",
    server_lr: float = 1.0,
    alpha: float = 0.6,
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial",
    exponent: float = 0.5,
    hinge_a: float = 10.0,
    hinge_b: float = 4.0,
    max_staleness: int | Literal["none"] = "none",
    prox: float | Literal["published"] = "published",
) -> Strategy:
    """Asynchronous federated optimisation.

    Args:
        form: whether the server adds what the client learned or mixes the client's model in.
        server_lr: η_g of the delta form.
        alpha: α in (0, 1] of the mixing form.
        staleness: s(u).
        exponent: a of ``polynomial``, (1 + u)^-a.
        hinge_a: a of ``hinge``, 1 / (a (u - b) + 1) from u = b on.
        hinge_b: b of ``hinge``, the staleness up to which s(u) = 1.
        max_staleness: u beyond which an answer is refused.
        prox: ρ >= 0; ``published`` is 0.005 in the mixing form and 0 in the delta form, which is stated
            for plain local SGD. lr · prox must stay below 2.
    """
    check_finite(server_lr=server_lr)
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
    if prox != "published" and not 0.0 <= prox < float("inf"):
        raise ValueError(f"prox must be at least 0 and finite, got {prox}")
    check_max_staleness(max_staleness)
    s = staleness_weights(staleness, exponent=exponent, a=hinge_a, b=hinge_b)
    mixing = form == "mixing"
    rho = (MIXING_PROX if mixing else 0.0) if prox == "published" else prox

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        check_proximal(spec, rho, "prox")
        return affine(grad_fn, proximal(rho), finish=report_model if mixing else report_delta)

    def weigh(state: State, meta: Meta) -> tuple[Floats, Bools]:
        weights = s(meta.staleness.astype(np.float64)) * (alpha if mixing else 1.0)
        return weights, (meta.examples <= 0) | too_old(meta.staleness, max_staleness)

    def apply_delta(
        state: State, reduced: dict[str, Tensor], info: WindowInfo
    ) -> tuple[State, dict[str, float]]:
        delta = reduced.get("delta")
        return (state, {}) if delta is None else (State(moved(state.x, server_lr * delta)), {})

    traits = Traits(
        modes=frozenset({"async"}),
        client_hooks=mixing or rho > 0.0,  # an opaque training function reports a delta
        affine=True,
        columnwise=True,
        neutral="" if mixing or rho else "staleness = constant -> async_fedavg with bias = naive",
    )
    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=weigh,
        fold=fold_models if mixing else fold_deltas,
        apply=apply_mixing if mixing else apply_delta,
        model=model,
        plan=as_planned,
        lend=lend_nothing,
        traits=traits,
    )
