"""FedAU: weights that undo unequal participation when nobody knows the probabilities.

Wang and Ji 2024, "A lightweight method for tackling unknown participation statistics in federated
averaging", Algorithms 1 and 2. Symbols: x model, Δ_i deltas, ω_i the mean interval in windows between
the answers of client i, intervals cut at K (``fedsim.strategies.participation``), p_i importance, S the
participants, N the registered clients, η_g server rate.

    client i:  FedAvg
    server:    x <- x + η_g Σ_{i in S} p_i ω_i Δ_i              p_i = 1/N unless configured
               close the intervals of S

The divisor is N, not |S|: ω_i estimates 1 / (probability that i takes part), which makes the sum an
estimate of the mean over everybody. ω_i uses the windows before this one only. The program that comes
with the paper cannot execute a window without participants; here time advances and x stays.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.strategies.fedavg import broadcast, check_finite, local, model
from fedsim.strategies.importance import Importance, check_importance, check_one_each, known_examples
from fedsim.strategies.participation import (
    Cutoff,
    Intervals,
    checked_cutoff,
    mean_intervals,
    no_intervals,
    with_answers,
)
from fedsim.strategy import Strategy, Traits, as_planned, fold_deltas, lend_nothing, moved, uniformly
from fedsim.types import Bools, Floats, Meta, Population, WindowInfo


class State(NamedTuple):
    """x [D]; the intervals of all clients; total examples of the population where importances use it."""

    x: Tensor
    intervals: Intervals
    examples: int


def fedau(
    *,
    cutoff: int | Literal["none"] = 50,
    server_lr: float = 1.0,
    importance: Importance = "uniform",
) -> Strategy:
    """Averaging under unknown participation.

    Args:
        cutoff: K >= 1, windows after which an interval is cut; small values lean towards frequent
            clients, ``none`` has the largest variance.
        server_lr: η_g.
        importance: p_i of the objective Σ p_i F_i: ``uniform`` 1/N, ``examples`` n_i / Σ n_j over the
            clients known at the start, or a list with one number for each client.

    Raises:
        ValueError: cutoff below 1.
        ConfigError: FS-CFG-082, importances that are no distribution; by `init`: FS-CFG-102, not one
            for each client, FS-CFG-065, examples that are not known.
    """
    check_finite(server_lr=server_lr)
    limit: Cutoff = checked_cutoff(cutoff)
    check_importance(importance)
    p = None if isinstance(importance, str) else np.asarray(importance, np.float64)

    def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
        total = 0
        if p is not None:
            check_one_each(p, population, "importance")
        elif importance == "examples":
            total = known_examples(population)
        return State(x0, no_intervals(population.size), total)

    def scaled(state: State, meta: Meta) -> Floats:
        """[b] p_i times the number of clients that p is about; 0 for a client that a list leaves out."""
        size = len(state.intervals.close)
        if importance == "examples":
            return meta.examples.astype(np.float64) * (size / state.examples)
        if p is None:
            return np.ones(len(meta.ids))
        listed = meta.ids < len(p)
        return np.where(listed, p[np.where(listed, meta.ids, 0)], 0.0) * size

    def weigh(state: State, meta: Meta) -> tuple[Floats, Bools]:
        omega = mean_intervals(
            state.intervals, meta.ids, joined=meta.joined, window=meta.window, cutoff=limit
        )
        _, refused = uniformly(state, meta)
        # A list says nothing of a client that registers later: its update cannot be weighed.
        if p is not None:
            refused = refused | (meta.ids >= len(p))
        return omega * scaled(state, meta), refused

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        if not len(info.ids):
            return state, {}
        intervals = with_answers(
            state.intervals, info.ids, joined=info.joined, window=info.window, cutoff=limit
        )
        # `scaled` multiplied by the number of clients that p is about.
        divisor = info.N if importance == "uniform" else len(state.intervals.close)
        x = moved(state.x, server_lr * (reduced["delta"] / divisor))
        return State(x, intervals, state.examples), weights_of(state, info)

    def weights_of(state: State, info: WindowInfo) -> dict[str, float]:
        if info.meta is None:
            return {}
        weights, _ = weigh(state, info.meta)
        return {"weight_mean": float(weights.mean()), "weight_max": float(weights.max())}

    return Strategy(
        init=init,
        broadcast=broadcast,
        local=local,
        weigh=weigh,
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
            neutral="every client in every window -> fedavg, weighting uniform; "
            "cutoff = 1 -> fedavg, weighting all",
        ),
    )
