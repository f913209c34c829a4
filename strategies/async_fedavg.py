"""Asynchronous FedAvg: the model moves with every answer, unbiased for what the clients are worth.

Fraboni, Vidal, Kameni and Lorenzi 2023, "A general theory for federated optimization with
asynchronous and heterogeneous clients updates", asynchronous FedAvg. Symbols: w the model, Δ_i relative
to the version that client i started from, p_i its importance, τ_i the time that a task of it takes, d_i
its aggregation weight, η_g server rate.

    client i:                        FedAvg
    server, on an arrival from i:    w <- w + η_g d_i Δ_i

    bias        d_i
    unbiased    p_i τ_i Σ_j 1/τ_j      of all arrivals (1/τ_i) / Σ_j 1/τ_j are from i: p_i an arrival
    naive       1                      minimises Σ q_i F_i with q_i ∝ 1/τ_i, whatever the p_i

Either way an arrival weighs 1 on average: over a time T the weights add up to T Σ_j 1/τ_j, against
T / max τ in synchronous rounds. Compare at equal ``server_lr`` with that in mind.

The weights hold while all registered clients work all the time; N and the sum run over all that are
ever registered, and with uniform importance only the mean of their 1/τ_j matters. Where clients are not
always there, or their times are not known, count their arrivals instead: ``fedfix`` with rate =
"interval".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.flat import ParamSpec
from fedsim.strategies.fedavg import broadcast, check_finite, local, model
from fedsim.strategies.importance import Importance, check_importance, importances
from fedsim.strategy import Strategy, Traits, as_planned, fold_deltas, lend_nothing, moved
from fedsim.types import Bools, Floats, Meta, Population, WindowInfo


class State(NamedTuple):
    """x [D], the symbol w above; d [N] float64, the weight of an update of each client."""

    x: Tensor
    d: Floats


def known_durations(population: Population, *, strategy: str) -> Floats:
    """[N] seconds of a task of each client.

    Raises:
        ConfigError: FS-CFG-089, they are not known, or not all positive.
    """
    seconds = population.durations
    if seconds is None or not np.isfinite(seconds).all() or not (seconds > 0.0).all():
        raise ConfigError(
            f"{strategy} needs to know how long a task of each client takes",
            code="FS-CFG-089",
            where="[strategy]",
            why="the durations of the clients' tasks are not known"
            if seconds is None
            else "a task takes no time, or no finite time",
            hint="choose [devices] with fixed positive times, or a strategy that measures: fedfix with "
            "rate = 'interval' or 'ema'",
        )
    return seconds.astype(np.float64)


def async_fedavg(
    *,
    bias: Literal["unbiased", "naive"] = "unbiased",
    server_lr: float = 1.0,
    importance: Importance = "uniform",
) -> Strategy:
    """Federated averaging on every arrival.

    Args:
        bias: ``unbiased`` makes up for clients that answer more often, and needs to know the times of
            their tasks; ``naive`` weights every arrival 1 and knows no importances.
        server_lr: η_g. One arrival with weight 1 replaces the model as far as it is fresh; with many
            clients 1/N is the scale of a synchronous round.
        importance: p_i: ``uniform``, by ``examples``, or a list with one number for each client.
    """
    check_finite(server_lr=server_lr)
    check_importance(importance)

    def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
        if bias == "naive":
            return State(x0, np.ones(population.size))
        tau = known_durations(population, strategy="async_fedavg")
        return State(x0, importances(importance, population) * tau * (1.0 / tau).sum())

    def weigh(state: State, meta: Meta) -> tuple[Floats, Bools]:
        return state.d[meta.ids], meta.examples <= 0

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        delta = reduced.get("delta")
        return (state, {}) if delta is None else (state._replace(x=moved(state.x, server_lr * delta)), {})

    unbiased = bias == "unbiased"
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
            modes=frozenset({"async"}),
            needs=frozenset({"durations"}) if unbiased else frozenset(),
            affine=True,
            columnwise=True,
            neutral="equal durations and importances -> bias = naive" if unbiased else "",
        ),
    )
