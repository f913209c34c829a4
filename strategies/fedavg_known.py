"""FedAvg with known participation: every answer is divided by the probability that it comes.

The baseline "known participation statistics" of Wang and Ji 2024, "A lightweight method for tackling
unknown participation statistics in federated averaging", section 6. Symbols: x model, Δ_i deltas, q_i
the share of the windows in which client i takes part, S the participants, N the registered clients,
η_g server rate.

    client i:  FedAvg
    server:    x <- x + η_g (1/N) Σ_{i in S} Δ_i / q_i

Unbiased for the mean over everybody: E[1{i in S} / q_i] = 1. A rate of 0 says that a client never
answers; if it does, its update is refused, as nothing tells its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.flat import ParamSpec
from fedsim.strategies.fedavg import broadcast, check_finite, local, model
from fedsim.strategies.importance import check_one_each
from fedsim.strategy import Strategy, Traits, as_planned, fold_deltas, lend_nothing, moved, uniformly
from fedsim.types import Bools, Floats, Meta, Population, WindowInfo


class State(NamedTuple):
    """x [D]; q [N]."""

    x: Tensor
    rates: Floats


def weigh(state: State, meta: Meta) -> tuple[Floats, Bools]:
    """1 / q_i; refuses clients without examples, of rate 0, or registered after the rates were given."""
    _, refused = uniformly(state, meta)
    known = meta.ids < len(state.rates)
    q = np.where(known, state.rates[np.where(known, meta.ids, 0)], 0.0)
    possible = q > 0.0
    return np.where(possible, 1.0 / np.where(possible, q, 1.0), 0.0), refused | ~possible


def fedavg_known(
    *, server_lr: float = 1.0, rates: Literal["population"] | Sequence[float] = "population"
) -> Strategy:
    """Averaging under known participation.

    Args:
        server_lr: η_g.
        rates: q_i in [0, 1], the share of the windows in which client i takes part: a list with one
            entry per client, or ``population`` for those of the configured availability and sampling.

    Raises:
        ValueError: a rate is outside [0, 1].
        ConfigError: by `init`: FS-CFG-088, the rates are not known; FS-CFG-102, not one for each
            client.
    """
    check_finite(server_lr=server_lr)
    given = None if isinstance(rates, str) else np.array(rates, dtype=np.float64)
    if given is not None and not ((given >= 0.0) & (given <= 1.0)).all():
        worst = given[~((given >= 0.0) & (given <= 1.0))][0]
        raise ValueError(f"rates must lie in [0, 1], got {worst:g}")

    def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
        known = population.rates if given is None else given
        if known is None:
            raise ConfigError(
                "the participation rates of the clients are not known",
                code="FS-CFG-088",
                where="[strategy] rates",
                why="neither the availability nor the sampling says how often each takes part",
                hint="give rates = [one number in [0, 1] per client], or use name = 'fedau', which "
                "estimates them",
            )
        check_one_each(known, population, "rates")
        return State(x0, known.astype(np.float64))

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        delta = reduced.get("delta")
        if delta is None:
            return state, {}
        return state._replace(x=moved(state.x, server_lr * (delta / info.N))), {}

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
            needs=frozenset({"rates"}) if given is None else frozenset(),
            affine=True,
            sums_only=True,
            neutral="every client in every window (all rates 1) -> fedavg, weighting uniform",
        ),
    )
