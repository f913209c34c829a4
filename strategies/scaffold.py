"""SCAFFOLD: control variates that take the drift out of local steps.

Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning",
Algorithm 1. Symbols: x model, y local iterate, c server control, c_i that of client i (all zero at
first participation), η local rate, η_g server rate, S the participants, N the registered clients.

    client i:  y <- x
               repeat  y <- y - η (g_i(y) - c_i + c)                                   (line 10)
               c_i+ = ∇F_i(x)                                        option I           (line 12)
               c_i+ = c_i - c + (x - y) / Σ_k η_k                    option II          (line 12)
               report Δ_i = y - x and Δc_i = c_i+ - c_i                                 (line 13)
    server:    x <- x + η_g (1/|S|) Σ_S Δ_i                                             (lines 16, 17)
               c <- c + (1/N) Σ_S Δc_i                                                  (lines 16, 17)

Σ_k η_k is the driver's normaliser: K η for constant rates, the sum of the coefficients of the
directions under momentum. A client that took no step keeps its c_i. Always c = (1/N) Σ_i c_i.

Weight decay and clipping change the step and so, through option II, c_i; ``control = "gradients"``
takes the mean of the data gradients of the task instead (the same number without the two).

    who holds c_i   down                 up
    client          x, c                 Δ_i, Δc_i
    server          x, c - c_i           Δ_i              option II: the server computes c_i+ itself
                                         Δ_i, c_i+        option I or "gradients": it cannot
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.local import (
    Direction,
    LocalAlgorithm,
    LocalSpec,
    Phase,
    Result,
    Terms,
    affine,
    report_delta,
    stateless,
)
from fedsim.rows import RowStore
from fedsim.strategies.fedavg import check_finite, mean_delta, model, server_vector
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
from fedsim.types import (
    Aux,
    Batch,
    Bools,
    Floats,
    GradFn,
    Ids,
    Message,
    Meta,
    Population,
    UpdateBlock,
    WindowInfo,
)
from fedsim.vector import Vector, where

Local = Callable[[GradFn, LocalSpec], LocalAlgorithm]
Broadcast = Callable[[Any], Message]
Lend = Callable[[Any, Any, Ids], Any]
Fold = Callable[..., tuple[Sums, Mapping[str, Tensor]]]
Refresh = Literal["delta", "steps", "pass"]
"""Where c_i+ comes from: Δ_i (option II), the gradients of the local steps, or one pass (option I)."""


class State(NamedTuple):
    """x, c [D]."""

    x: Tensor
    c: Tensor


class ClientState(NamedTuple):
    """c_i, where the client holds it."""

    control: Vector


class Gathered(NamedTuple):
    """∇F_i(x) (option I) or the sum of the local steps' gradients; the number of local steps, 0-d."""

    gradient: Vector
    steps: Tensor


def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
    """The model; nothing is known of anyone's gradients."""
    return State(x0, server_vector(x0))


def own_correction(msg: Message, lent: Any, client_state: Any) -> tuple[float, Vector]:
    """c - c_i of a client that holds c_i (line 10)."""
    return 0.0, msg.c - client_state.control


def lent_correction(msg: Message, lent: Any, client_state: Any) -> tuple[float, Vector]:
    """c - c_i as the server lends it."""
    return 0.0, lent["correction"]


def with_zero_control(msg: Message) -> ClientState:
    """First participation of a client that will hold c_i."""
    return ClientState(msg.x.zeros_like())


def _gathering(grad_fn: GradFn, terms: Terms, refresh: Refresh) -> LocalAlgorithm:
    """Local training that also gathers gradients for c_i+ in its carry."""

    def start(msg: Message, lent: Any, client_state: Any) -> tuple[Vector, Gathered]:
        x: Vector = msg.x
        # Not in the dtype of x: bfloat16 counts to 256.
        none = next(iter(x.tensors.values())).new_zeros((), dtype=torch.float32)
        return x, Gathered(x.zeros_like(), none)

    def step(
        msg: Message, lent: Any, client_state: Any, x: Vector, carry: Gathered, batch: Batch
    ) -> tuple[Direction, Gathered, Aux]:
        g, aux = grad_fn(x, batch)
        _, correction = terms(msg, lent, client_state)
        assert correction is not None
        gradient = carry.gradient + g if refresh == "steps" else carry.gradient
        return Direction(g + correction), Gathered(gradient, carry.steps + 1), aux

    def whole(
        msg: Message, lent: Any, client_state: Any, x: Vector, carry: Gathered, batch: Batch
    ) -> tuple[Direction, Gathered, Aux]:
        g, aux = grad_fn(x, batch)
        return Direction(g), carry._replace(gradient=carry.gradient + batch.weight * g), aux

    phases = (Phase(whole, data="full"), Phase(step)) if refresh == "pass" else (Phase(step),)
    return LocalAlgorithm(stateless, start, phases, report_delta)


def _gathered(carry: Gathered, refresh: Refresh) -> Vector:
    """c_i+ from the carry, where a local step was taken."""
    return carry.gradient / torch.clamp(carry.steps, min=1) if refresh == "steps" else carry.gradient


def _client_half(grad_fn: GradFn, terms: Terms, refresh: Refresh) -> LocalAlgorithm:
    """Corrected local steps, still without a report."""
    return affine(grad_fn, terms) if refresh == "delta" else _gathering(grad_fn, terms, refresh)


def _client_held(refresh: Refresh) -> tuple[Local, Broadcast, Lend, Fold]:
    """The four functions that differ between the placements, for c_i with the client."""

    def finish(
        msg: Message, lent: Any, client_state: ClientState, x: Vector, carry: Any, normaliser: Tensor
    ) -> tuple[Result, ClientState, Mapping[str, Tensor]]:
        delta, c_i = x - msg.x, client_state.control
        if refresh == "delta":
            # Without a step nothing changes: by factors, which take a third of a choice between vectors.
            taken = normaliser > 0
            share = torch.where(taken, 1 / normaliser, torch.zeros_like(normaliser))
            change = delta * -share - msg.c * taken.to(normaliser.dtype)
            return Result({"delta": delta, "delta_c": change}), ClientState(c_i + change), {}
        new = where(carry.steps > 0, _gathered(carry, refresh), c_i)
        return Result({"delta": delta, "delta_c": new - c_i}), ClientState(new), {}

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        half = _client_half(grad_fn, own_correction, refresh)
        return half._replace(fresh=with_zero_control, finish=finish)

    def broadcast(state: State) -> Message:
        return Message({"x": state.x, "c": state.c.to(state.x.dtype)})

    def fold(state: State, block: UpdateBlock, weights: Floats, rows: RowStore) -> tuple[Sums, Sums]:
        sums, _ = fold_deltas(state, block, weights, rows)
        return {**sums, "delta_c": weighted_sum(np.ones(len(block)), block.vectors["delta_c"])}, {}

    return local, broadcast, lend_nothing, fold


def _server_held(refresh: Refresh) -> tuple[Local, Broadcast, Lend, Fold]:
    """The same for c_i with the server: the client keeps nothing between tasks."""

    def finish(
        msg: Message, lent: Any, client_state: Any, x: Vector, carry: Any, normaliser: Tensor
    ) -> tuple[Result, Any, Mapping[str, Tensor]]:
        return Result({"delta": x - msg.x, "control": _gathered(carry, refresh)}), client_state, {}

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        half = _client_half(grad_fn, lent_correction, refresh)
        return half if refresh == "delta" else half._replace(finish=finish)

    def broadcast(state: State) -> Message:
        return Message({"x": state.x})

    def lend(state: State, rows: RowStore, ids: Ids) -> dict[str, Tensor]:
        return {"correction": (state.c - rows.held(ids, "control", like=state.c)).to(state.x.dtype)}

    def fold(state: State, block: UpdateBlock, weights: Floats, rows: RowStore) -> tuple[Sums, Sums]:
        sums, _ = fold_deltas(state, block, weights, rows)
        c_i = rows.held(block.ids, "control", like=state.c)
        if refresh == "delta":
            taken = torch.from_numpy(block.normaliser > 0).to(c_i.device)
            length = torch.from_numpy(np.where(block.normaliser > 0, block.normaliser, 1.0)).to(c_i)
            new = c_i - state.c - block.vectors["delta"] / length[:, None]
        else:
            taken = torch.from_numpy(block.local_steps > 0).to(c_i.device)
            new = block.vectors["control"].to(c_i.dtype)
        new = torch.where(taken[:, None], new, c_i)
        return {**sums, "delta_c": weighted_sum(np.ones(len(block)), new - c_i)}, {"control": new}

    return local, broadcast, lend, fold


def scaffold(
    *,
    server_lr: float = 1.0,
    state_at: Literal["client", "server"] = "client",
    option: Literal[1, 2] = 2,
    control: Literal["delta", "gradients"] = "delta",
) -> Strategy:
    """Stochastic controlled averaging; clients count equally.

    Args:
        server_lr: η_g.
        state_at: who holds c_i; the trajectories are the same.
        option: 1 refreshes c_i by one extra pass over the client's data at x, 2 from the local steps.
        control: what option 2 reads: the distance moved, or the data gradients of the steps, which
            weight decay and clipping do not enter and for which any local optimiser will do.
    """
    check_finite(server_lr=server_lr)
    if option == 1 and control == "gradients":
        raise ValueError("control belongs to option 2; option 1 always takes the gradient of a full pass")
    refresh: Refresh = "pass" if option == 1 else "delta" if control == "delta" else "steps"
    at_client = state_at == "client"
    local, broadcast, lend, fold = (_client_held if at_client else _server_held)(refresh)

    def weigh(state: State, meta: Meta) -> tuple[Floats, Bools]:
        weights, refused = uniformly(state, meta)
        # An optimiser without a normaliser would leave c_i where it is, silently.
        return weights, refused | np.isnan(meta.normaliser) if refresh == "delta" else refused

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        delta = mean_delta(reduced)
        if delta is None:
            return state, {}
        c = moved(state.c, reduced["delta_c"] / info.N)
        return State(moved(state.x, server_lr * delta), c), {}

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=weigh,
        fold=fold,
        apply=apply,
        model=model,
        plan=as_planned,
        lend=lend,
        traits=Traits(
            client_state=state_at,
            client_hooks=True,
            needs_normaliser=refresh == "delta",
            affine=refresh == "delta",
            columnwise=at_client,
            down_factor=2,
            up_factor=2 if at_client or refresh != "delta" else 1,
            server_vectors=1,
            server_vectors_per_client=0 if at_client else 1,
            neutral="first window, or identical clients with exact gradients -> fedavg, weighting uniform",
        ),
    )
