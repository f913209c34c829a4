"""QSR: longer rounds as the local rate falls, like its inverse square.

Gu, Lyu, Arora, Zhang and Huang 2024, "A quadratic synchronization rule for distributed deep learning".
Symbols: η_t local rate of round t, H_t local steps of round t, α growth coefficient, T steps in all.

    plan:      H_t = max{H_base, ⌊(α / η_t)²⌋}; in the warm-up with the rate that it leads to
               H_t <- min{H_t, T - steps done}, so that the last round ends at T
    client i:  H_t steps of FedAvg
    server:    FedAvg

η_t is lr · lr_decay^round of the ``[client]`` table. A round counts with the steps that
its clients took, the most of any of them where devices cut tasks short.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.local import LocalSpec
from fedsim.strategies.fedavg import broadcast, local, mean_delta, model, weighing
from fedsim.strategy import Strategy, Traits, fold_deltas, lend_nothing, moved
from fedsim.types import Ids, Population, WindowInfo

SLACK = 1e-9
"""Relative; 0.3 / 0.1 is 2.9999999999999996 in binary and must count as 3, also after many decays."""


class State(NamedTuple):
    """x [D]; local steps of all windows so far."""

    x: Tensor
    steps: int


def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
    """The model before any step."""
    return State(x0, 0)


def local_steps(lr: float, *, alpha: float, base_steps: int) -> int:
    """H = max{H_base, ⌊(α / η)²⌋} for a rate η > 0."""
    return max(base_steps, math.floor((alpha / lr) ** 2 * (1.0 + SLACK)))


def qsr(
    *,
    alpha: float = 0.2,
    base_steps: int = 4,
    warmup_rounds: int = 0,
    peak_lr: float | None = None,
    total_steps: int | None = None,
    weighting: Literal["uniform", "examples"] = "uniform",
) -> Strategy:
    """Federated averaging under the quadratic synchronisation rule.

    Args:
        alpha: α >= 0, to be tuned with the local optimiser: of the order of 0.1 for SGD and 0.01 for
            AdamW; without effect while the rate is above α / √H_base.
        base_steps: H_base >= 1, fewest local steps of a round; 2 to 8 are usual.
        warmup_rounds: first rounds, in which H is that of `peak_lr`, whatever their own rate.
        peak_lr: the rate that the warm-up leads to; needed with `warmup_rounds`.
        total_steps: T >= 1 after which nobody trains any more; None for no end.
        weighting: of the mean, one client one vote or by examples.
    """
    if not 0.0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    if base_steps < 1:
        raise ValueError(f"base_steps must be at least 1, got {base_steps}")
    if warmup_rounds < 0:
        raise ValueError(f"warmup_rounds must be at least 0, got {warmup_rounds}")
    if (warmup_rounds > 0) != (peak_lr is not None):
        raise ValueError("warmup_rounds and peak_lr belong together: give both or neither")
    if peak_lr is not None and not 0.0 < peak_lr < float("inf"):
        raise ValueError(f"peak_lr must be positive and finite, got {peak_lr}")
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")

    def plan(state: State, spec: LocalSpec, window: int, ids: Ids) -> tuple[LocalSpec, None]:
        rate = peak_lr if peak_lr is not None and window < warmup_rounds else spec.lr
        steps = local_steps(rate, alpha=alpha, base_steps=base_steps)
        if total_steps is not None:
            steps = min(steps, max(0, total_steps - state.steps))
        return replace(spec, steps=steps), None

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        delta = mean_delta(reduced)
        if delta is None or info.meta is None:
            return state, {}
        taken = int(info.meta.local_steps.max())
        metrics = {"local_steps": float(taken), "steps_done": float(state.steps + taken)}
        return State(moved(state.x, delta), state.steps + taken), metrics

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=weighing(weighting),
        fold=fold_deltas,
        apply=apply,
        model=model,
        plan=plan,
        lend=lend_nothing,
        traits=Traits(
            affine=True,
            sums_only=True,
            neutral="alpha = 0 -> fedavg, weighting uniform, with [client] steps = base_steps",
        ),
    )
