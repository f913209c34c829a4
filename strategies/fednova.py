"""FedNova: clients that work more do not pull the model towards their own optimum.

Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated
optimization", Algorithm 1 and equations 5-9; server momentum as in the authors' code. Symbols: x
model, Δ_i deltas, p_i = n_i / Σ_S n_j, K_i local steps, η local rate, a_i = ‖a_i‖₁ the normaliser of
client i's optimiser, ρ local momentum, μ proximal coefficient, γ server momentum.

    a_i   plain SGD     K_i
          momentum ρ    s <- ρ s + 1,  a <- a + s
          proximal μ    a <- (1 - η μ) a + 1,   i.e. (1 - (1 - η μ)^K_i) / (η μ)
    τ     Σ p_i a_i                    (proximal: Σ p_i K_i)
    server:    d = τ Σ_S p_i Δ_i / a_i
               x <- x + d;             with γ:  B <- γ B + d / η,  x <- x + η B

Units. The driver's normaliser of client i is L_i = Σ_k of effective step *lengths*: it contains the
rate, L_i = η a_i (plain and momentum), and knows nothing of the proximal term, so L_i = η K_i there.
Hence with A_i = L_i, or A_i = (1 - (1 - η μ)^K_i) / μ under a proximal term, A_i = η a_i, and

    d = (Σ p_i L_i) (Σ p_i Δ_i / A_i)

in every case: the two factors η cancel, and for the proximal τ, Σ p_i L_i = η Σ p_i K_i. A_i needs
nothing from the client beyond K_i and L_i, as η = L_i / K_i. The sums over a window are named
``delta`` Σ (n_i / A_i) Δ_i, ``examples`` Σ n_i, ``length`` Σ n_i L_i, and ``rate`` Σ n_i η.

Local momentum starts at zero in every task. Momentum and proximal term together are refused: the
recursions do not add. Weight decay is left out of a_i, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec, Result, affine, report_delta
from fedsim.strategies.fedavg import broadcast, model, server_vector
from fedsim.strategies.fedprox import check_proximal, proximal
from fedsim.strategy import Strategy, Sums, Traits, as_planned, fold_deltas, lend_nothing, moved
from fedsim.types import Bools, Floats, GradFn, Ids, Message, Meta, Population, UpdateBlock, WindowInfo
from fedsim.vector import Vector


class State(NamedTuple):
    """x [D]; B [D] in units of a gradient with minus sign, () without server momentum."""

    x: Tensor
    B: Tensor | tuple[()]


def gradient_length(length: Floats, steps: Ids, mu: float) -> Floats:
    """[b] A_i = η a_i, the coefficient sum of client i's gradients; positive where steps were taken.

    Args:
        length: [b] L_i, the driver's normaliser.
        steps: [b] K_i.
        mu: μ; 0 for none.
    """
    if mu == 0.0:
        return length
    rate = length / np.maximum(steps, 1)
    # expm1 and log1p keep the digits where η μ is small; from η μ = 1 on the base is not positive.
    small = rate * mu < 1.0
    exact = -np.expm1(steps * np.log1p(-np.where(small, rate * mu, 0.0))) / mu
    return np.where(small, exact, (1.0 - (1.0 - rate * mu) ** steps) / mu)


def fednova(*, server_momentum: float = 0.0, mu: float = 0.0) -> Strategy:
    """Normalised averaging; clients are weighted by examples.

    Args:
        server_momentum: γ in [0, 1).
        mu: μ >= 0 of a proximal term in the clients' objectives; not with [client] momentum.
    """
    if not 0.0 <= server_momentum < 1.0:
        raise ValueError(f"server_momentum must lie in [0, 1), got {server_momentum}")
    if not 0.0 <= mu < float("inf"):
        raise ValueError(f"mu must be at least 0 and finite, got {mu}")

    def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
        return State(x0, server_vector(x0) if server_momentum else ())

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        if mu > 0.0 and spec.momentum > 0.0:
            raise ConfigError(
                "fednova has no normaliser for local momentum and a proximal term together",
                code="FS-CFG-081",
                where=f"[client] momentum = {spec.momentum:g}, [strategy] mu = {mu:g}",
                why="the proximal term would enter the momentum buffer, and its length is then no sum "
                "of the two recursions",
                hint="set one of the two to 0",
            )
        check_proximal(spec, mu, "mu")

        def finish(
            msg: Message, lent: Any, client_state: Any, x: Vector, carry: Any, normaliser: Tensor
        ) -> tuple[Result, Any, Mapping[str, Tensor]]:
            rate = torch.full_like(normaliser, spec.lr, dtype=torch.float64)
            return Result({"delta": x - msg.x}, {"rate": rate}), client_state, {}

        return affine(grad_fn, proximal(mu), finish=finish if server_momentum else report_delta)

    def weigh(state: State, meta: Meta) -> tuple[Floats, Bools]:
        idle = (meta.examples <= 0) | (meta.local_steps <= 0)
        length = gradient_length(np.where(idle, 1.0, meta.normaliser), meta.local_steps, mu)
        return np.where(idle, 0.0, meta.examples / np.where(idle, 1.0, length)), idle

    def fold(
        state: State, block: UpdateBlock, weights: Floats, rows: Any
    ) -> tuple[Sums, Mapping[str, Tensor]]:
        sums, _ = fold_deltas(state, block, weights, rows)
        device = block.vectors["delta"].device
        n = torch.from_numpy(block.examples.astype(np.float64)).to(device)
        sums["examples"] = n.sum()
        sums["length"] = (n * torch.from_numpy(block.normaliser).to(device)).sum()
        if server_momentum:
            sums["rate"] = (n * block.scalars["rate"].to(device)).sum()
        return sums, {}

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        examples = reduced.get("examples")
        if examples is None or not float(examples) > 0.0:
            return state, {}
        step = (reduced["length"] / examples) * (reduced["delta"] / examples)
        if isinstance(state.B, tuple):
            return state._replace(x=moved(state.x, step)), {}
        rate = reduced["rate"] / examples
        B = server_momentum * state.B.double() + step / rate
        return State(moved(state.x, rate * B), B.to(state.B.dtype)), {}

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
            client_hooks=mu > 0.0,
            needs_normaliser=True,
            affine=True,
            server_vectors=1 if server_momentum else 0,
            neutral="equal local steps, server_momentum = 0 and mu = 0 -> fedavg",
        ),
    )
