"""FedHyper: learning rates that follow the inner product of consecutive updates.

Wang, Wang and Li 2024, "FedHyper: a universal and robust learning rate scheduler for federated learning
with hypergradient descent", and the authors' program. Symbols: x model, Δ̄_t the weighted
mean of the deltas of window t (never multiplied by a rate), α server rate, b multiplier of the local
rate η, κ gain, V memory, clip to the bounds of the rate.

    G     α <- clip(α + κ ⟨Δ̄_t, Δ̄_{t-1}⟩);             x <- x + α Δ̄_t
    GM    a = α - 1;  a <- clip(a + κ ⟨V, Δ̄_t⟩);        x <- x + Δ̄_t + a Δ̄_t + 0.9 a V
          V <- Δ̄_t + 0.9 V
    SL    b <- clip(b + κ ⟨Δ̄_t, Δ̄_{t-1}⟩);              clients of window t + 1 train with η b
    CL    each client schedules b at each of its steps: ``fedhyper_local``; x and Δ̄_{t-1} go down

    client i:  FedAvg with the rate η b
    server:    G, GM or a constant rate α0; together with SL, CL or a constant local rate

Δ̄_{-1} = V = 0, so the products of the first window are 0, α = α0 and b = 1 there. A window in which
nobody took part changes nothing: Δ̄ of the last one that had somebody is kept.

SL needs no message of its own: the rate b η travels with the task as every local rate does, so that
normalisers, other optimisers and opaque training functions see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec, affine
from fedsim.strategies.fedavg import check_finite, mean_delta, model, server_vector, weighing
from fedsim.strategies.fedhyper_local import client_scheduled
from fedsim.strategies.hypergradient import Bounds, checked_bounds, product, scheduled
from fedsim.strategy import Strategy, Traits, fold_deltas, lend_nothing, moved
from fedsim.types import GradFn, Ids, Message, Population, WindowInfo

PERSISTENCE = 0.9
"""How much of V, the memory of GM, passes from one window to the next."""
LOCAL_BOUNDS = (1 / 10, 10.0)
SERVER_BOUNDS = {
    ("G", "published"): (1 / 3, 3.0),
    ("G", "reference"): (0.2, 5.0),
    ("GM", "published"): (0.8, 5.0),
    ("GM", "reference"): (0.8, 5.0),
}
"""(lo, hi) of α; GM is in the authors' program only, where a = α - 1 is clipped to [-0.2, 4]."""


class State(NamedTuple):
    """What the server keeps.

    Args:
        x: [D].
        delta: [D] Δ̄ of the last window that had one, () where no scheduler reads it.
        memory: [D] V of GM, () without.
        server_rate: α.
        local_rate: b of the next window's clients under SL, else 1.
        participants: m, clients of the window that `delta` comes from.
    """

    x: Tensor
    delta: Tensor | tuple[()]
    memory: Tensor | tuple[()]
    server_rate: float
    local_rate: float
    participants: int


def _bounds(name: str, given: Sequence[float] | None, default: Bounds, *, used: bool) -> Bounds:
    if given is not None and not used:
        raise ValueError(f"{name} bounds a rate that is not scheduled; leave it out or choose a scheduler")
    return checked_bounds(name, default if given is None else given)


def fedhyper(
    *,
    server: Literal["G", "GM", "none"] = "G",
    local: Literal["none", "SL", "CL"] = "none",
    kappa: float = 1.0,
    server_bounds: Sequence[float] | None = None,
    local_bounds: Sequence[float] | None = None,
    normalise: Literal["none", "cosine"] = "none",
    server_variant: Literal["published", "reference"] = "published",
    local_variant: Literal["published", "reference"] = "reference",
    alpha0: float = 1.0,
    weighting: Literal["examples", "uniform"] = "examples",
) -> Strategy:
    """Federated averaging with scheduled rates on the server, on the clients, or both.

    Args:
        server: scheduler of the server rate; ``none`` keeps alpha0.
        local: scheduler of the local rate: one for all by the server, or each client its own.
        kappa: κ >= 0, gain of every scheduler; 0 schedules nothing.
        server_bounds: lo and hi of α, [1/3, 3] of the paper by default ([0.8, 5] of GM).
        local_bounds: lo and hi of b, [1/10, 10] by default.
        normalise: ``cosine`` divides every inner product by the norms, which frees κ of the model's size.
        server_variant: whose bounds G has by default; ``reference`` is [0.2, 5] of the authors' program.
        local_variant: rule of CL: the paper's on gradients, or that of the authors' program on
            displacements.
        alpha0: α of the first window, within the bounds.
        weighting: of the mean Δ̄, by examples or one client one vote.
    """
    check_finite(kappa=kappa, alpha0=alpha0)
    if kappa < 0.0:
        raise ValueError(f"kappa must be at least 0, got {kappa}")
    default = SERVER_BOUNDS.get((server, server_variant), (1.0, 1.0))
    of_server = _bounds("server_bounds", server_bounds, default, used=server != "none")
    of_clients = _bounds("local_bounds", local_bounds, LOCAL_BOUNDS, used=local != "none")
    if server != "none" and not of_server[0] <= alpha0 <= of_server[1]:
        raise ValueError(
            f"alpha0 must lie in [{of_server[0]:g}, {of_server[1]:g}], server_bounds; got {alpha0}"
        )
    keeps_delta = server == "G" or local != "none"

    def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
        delta = server_vector(x0) if keeps_delta else ()
        memory = server_vector(x0) if server == "GM" else ()
        return State(x0, delta, memory, float(alpha0), 1.0, 1)

    def broadcast(state: State) -> Message:
        if local != "CL" or isinstance(state.delta, tuple):
            return Message({"x": state.x})
        participants = torch.tensor(float(state.participants), dtype=torch.float64, device=state.x.device)
        vectors = {"x": state.x, "delta": state.delta.to(state.x.dtype)}
        return Message(vectors, {"participants": participants})

    def plan(state: State, spec: LocalSpec, window: int, ids: Ids) -> tuple[LocalSpec, Ids | None]:
        return replace(spec, lr=spec.lr * state.local_rate) if local == "SL" else spec, None

    def client_half(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        if local != "CL":
            return affine(grad_fn)
        return client_scheduled(grad_fn, local_variant, kappa=kappa, bounds=of_clients, normalise=normalise)

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        delta = mean_delta(reduced)
        if delta is None:
            return state, _rates(state.server_rate, state.local_rate)
        rate, local_rate = state.server_rate, state.local_rate
        if not isinstance(state.delta, tuple):
            value = product(delta, state.delta.double(), normalise=normalise)
            if server == "G":
                rate = scheduled(rate, value, kappa=kappa, bounds=of_server)
            if local == "SL":
                local_rate = scheduled(local_rate, value, kappa=kappa, bounds=of_clients)
        memory, step = state.memory, rate * delta
        if not isinstance(memory, tuple):
            V = memory.double()
            rate = scheduled(rate, product(V, delta, normalise=normalise), kappa=kappa, bounds=of_server)
            step = rate * delta + (PERSISTENCE * (rate - 1.0)) * V
            memory = (delta + PERSISTENCE * V).to(memory.dtype)
        new = State(
            moved(state.x, step),
            state.delta if isinstance(state.delta, tuple) else delta.to(state.delta.dtype),
            memory,
            rate,
            local_rate,
            int(reduced["count"]),
        )
        return new, _rates(rate, state.local_rate)

    def _rates(server_rate: float, local_rate: float) -> dict[str, float]:
        """α of this window, and under SL the multiplier that its clients trained with."""
        return {"server_rate": server_rate} | ({"local_rate": local_rate} if local == "SL" else {})

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=client_half,
        weigh=weighing(weighting),
        fold=fold_deltas,
        apply=apply,
        model=model,
        plan=plan,
        lend=lend_nothing,
        traits=_traits(server, local, keeps_delta),
    )


def _traits(server: str, local: str, keeps_delta: bool) -> Traits:
    return Traits(
        # GM's memory and the local schedulers are defined by one synchronous window after another.
        modes=frozenset({"sync", "async"} if server != "GM" and local == "none" else {"sync"}),
        client_hooks=local == "CL",
        affine=local != "CL",
        sums_only=True,
        down_factor=2 if local == "CL" else 1,
        server_vectors=int(keeps_delta) + int(server == "GM"),
        neutral="kappa = 0 -> fedavg with server_lr = alpha0",
    )
