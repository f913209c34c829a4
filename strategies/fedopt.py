"""FedAdagrad, FedAdam, FedYogi: an adaptive optimiser on the server.

Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2. Symbols: x model, d = Δ̄ the
weighted mean of the deltas, m first moment, v second moment, τ degree of adaptivity, η server rate;
all operations are per coordinate.

    client i:  FedAvg
    server:    m <- β1 m + (1 - β1) d                      (line 10)
               FedAdagrad  v <- v + d²                     (line 11)
               FedYogi     v <- v - (1 - β2) d² sign(v - d²)  (line 12)
               FedAdam     v <- β2 v + (1 - β2) d²         (line 13)
               x <- x + η m / (√v + τ)                     (line 14)

    bias_correction   η of window r = 1, 2, … (windows in which nobody took part do not count)
    none              η                                    as published
    standard          η √(1 - β2^r) / (1 - β1^r)           Kingma and Ba 2015; FedAdagrad, whose v is a
                                                           sum and not a mean, corrects m alone
    shifted           the same with r + 1                  FedAdam only; what one widely used framework
                                                           computes

The paper asks for v >= τ² at the start (``v_init = "tau_sq"``); frameworks mostly start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
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

Start = Literal["tau_sq", "zero"]
Weighting = Literal["examples", "uniform"]
SecondMoment = Callable[[Tensor, Tensor], Tensor]  # (v, d²) -> v, all [D] float64


class State(NamedTuple):
    """x, m, v [D]; windows, how many moved the model so far."""

    x: Tensor
    m: Tensor
    v: Tensor
    windows: int


def adagrad_moment(v: Tensor, square: Tensor) -> Tensor:
    """Line 11: the sum of all squares."""
    return v + square


def adam_moment(beta2: float) -> SecondMoment:
    """Line 13: the exponential mean of the squares."""
    return lambda v, square: beta2 * v + (1.0 - beta2) * square


def yogi_moment(beta2: float) -> SecondMoment:
    """Line 12: towards the square by a step that does not depend on the distance; never below 0."""
    return lambda v, square: v - (1.0 - beta2) * square * torch.sign(v - square)


def corrected_rate(rate: float, exponent: int, *, beta1: float, beta2: float | None) -> float:
    """η √(1 - β2^r) / (1 - β1^r); without the root where `beta2` is None."""
    root = 1.0 if beta2 is None else math.sqrt(1.0 - beta2**exponent)
    return rate * root / (1.0 - beta1**exponent)


def _adaptive(
    second_moment: SecondMoment,
    *,
    server_lr: float,
    beta1: float,
    beta2: float | None,
    tau: float,
    v_init: Start,
    bias_correction: Literal["none", "standard", "shifted"],
    weighting: Weighting,
) -> Strategy:
    """Algorithm 2 with the given line for v."""
    check_finite(server_lr=server_lr)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if beta is not None and not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    if not 0.0 < tau < math.inf:
        raise ValueError(
            f"tau must be positive and finite, got {tau}: it keeps 0 / 0 out of still coordinates"
        )

    def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
        v = server_vector(x0)
        return State(x0, server_vector(x0), v + tau**2 if v_init == "tau_sq" else v, 0)

    def rate_of(window: int) -> float:
        if bias_correction == "none":
            return server_lr
        exponent = window + 1 if bias_correction == "shifted" else window
        return corrected_rate(server_lr, exponent, beta1=beta1, beta2=beta2)

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        d = mean_delta(reduced)
        if d is None:
            return state, {}
        windows = state.windows + 1
        m = beta1 * state.m.double() + (1.0 - beta1) * d
        v = second_moment(state.v.double(), d * d)
        step = rate_of(windows) * m / (v.sqrt() + tau)
        return State(moved(state.x, step), m.to(state.m.dtype), v.to(state.v.dtype), windows), {}

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
            server_vectors=2,
            neutral="beta1 = 0, v_init = zero, server_lr = c · tau, tau above √v -> fedavg, server_lr = c",
        ),
    )


def fedadagrad(
    *,
    server_lr: float = 0.1,
    beta1: float = 0.0,
    tau: float = 1e-3,
    v_init: Start = "tau_sq",
    bias_correction: Literal["none", "standard"] = "none",
    weighting: Weighting = "examples",
) -> Strategy:
    """FedAvg with Adagrad on the server: coordinates that moved much move less.

    Args:
        server_lr: η, to be tuned; 0.01 … 0.1 is typical.
        beta1: of m, in [0, 1).
        tau: τ > 0, in units of Δ̄: coordinates much smaller than it are not normalised.
        v_init: v before the first window, τ² as published or 0.
        bias_correction, weighting: see the module's table; mean by examples or one client one vote.
    """
    return _adaptive(
        adagrad_moment,
        server_lr=server_lr,
        beta1=beta1,
        beta2=None,
        tau=tau,
        v_init=v_init,
        bias_correction=bias_correction,
        weighting=weighting,
    )


def fedadam(
    *,
    server_lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    v_init: Start = "tau_sq",
    bias_correction: Literal["none", "standard", "shifted"] = "none",
    weighting: Weighting = "examples",
) -> Strategy:
    """FedAvg with Adam on the server.

    Args:
        server_lr: η, to be tuned; 0.01 … 0.1 is typical.
        beta1, beta2: of m and v, in [0, 1).
        tau: τ > 0, in units of Δ̄: coordinates much smaller than it are not normalised.
        v_init: v before the first window, τ² as published or 0.
        bias_correction, weighting: see the module's table; mean by examples or one client one vote.
    """
    return _adaptive(
        adam_moment(beta2),
        server_lr=server_lr,
        beta1=beta1,
        beta2=beta2,
        tau=tau,
        v_init=v_init,
        bias_correction=bias_correction,
        weighting=weighting,
    )


def fedyogi(
    *,
    server_lr: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    v_init: Start = "tau_sq",
    bias_correction: Literal["none", "standard"] = "none",
    weighting: Weighting = "examples",
) -> Strategy:
    """FedAvg with Yogi on the server: like Adam, but v forgets large squares slowly.

    Args:
        server_lr: η, to be tuned; 0.01 … 0.1 is typical.
        beta1, beta2: of m and v, in [0, 1).
        tau: τ > 0, in units of Δ̄: coordinates much smaller than it are not normalised.
        v_init: v before the first window, τ² as published or 0.
        bias_correction, weighting: see the module's table; mean by examples or one client one vote.
    """
    return _adaptive(
        yogi_moment(beta2),
        server_lr=server_lr,
        beta1=beta1,
        beta2=beta2,
        tau=tau,
        v_init=v_init,
        bias_correction=bias_correction,
        weighting=weighting,
    )
