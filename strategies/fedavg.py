"""FedAvg: average what the clients learned.

McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data",
Algorithm 1. Symbols: x model, Δ_i = x_i - x, S the participants, n_i examples, p_i importance, N
registered clients, η_g server rate.

    client i:  x_i <- x;  repeat  x_i <- x_i - η g_i(x_i)
    server:    x <- x + η_g Σ_{i in S} a_i Δ_i

    weighting     a_i
    examples      n_i / Σ_S n_j        (line "w_{t+1} <- Σ n_k/m_t w^k", the published one)
    uniform       1 / |S|
    population    p_i N / |S|          not normalised; unbiased for p under uniform sampling
    all           1 / N
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec, affine
from fedsim.strategy import (
    Strategy,
    Traits,
    as_planned,
    by_examples,
    fold_deltas,
    lend_nothing,
    moved,
    uniformly,
)
from fedsim.types import Bools, Floats, GradFn, Message, Meta, Population, WindowInfo


class State(NamedTuple):
    """x [D]; total examples of the population (0 where unknown)."""

    x: Tensor
    examples: int


def init(x0: Tensor, spec: ParamSpec, population: Population) -> State:
    """The model alone."""
    total = 0 if population.examples is None else int(population.examples.sum())
    return State(x0, total)


def broadcast(state: Any) -> Message:
    """Send the model."""
    return Message({"x": state.x})


def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
    """Plain local SGD."""
    return affine(grad_fn)


def model(state: Any) -> Tensor:
    """x [D]."""
    x: Tensor = state.x
    return x


def mean_delta(reduced: dict[str, Tensor]) -> Tensor | None:
    """Δ̄ [D] float64, the weighted mean; None where nobody took part or the weights sum to 0."""
    return reduced["delta"] / reduced["weight"] if has_weight(reduced) else None


def has_weight(reduced: dict[str, Tensor]) -> bool:
    """Whether anybody took part with a weight."""
    weight = reduced.get("weight")
    return weight is not None and float(weight) > 0.0


def server_vector(x0: Tensor) -> Tensor:
    """[D] zeros for what a server remembers between windows: the dtype of x, at least float32.

    A momentum in bfloat16 would lose every contribution below 1/256 of what it already holds.
    """
    return torch.zeros_like(x0, dtype=torch.promote_types(x0.dtype, torch.float32))


def weighing(weighting: Literal["examples", "uniform"]) -> Callable[[Any, Meta], tuple[Floats, Bools]]:
    """`weigh` of a strategy whose Δ̄ is a normalised mean: a_i = n_i / Σ_S n_j or 1 / |S|."""
    return by_examples if weighting == "examples" else uniformly


def check_finite(**numbers: float) -> None:
    """Refuse NaN and infinity among a factory's parameters, naming the parameter."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def fedavg(
    *,
    server_lr: float = 1.0,
    weighting: Literal["examples", "uniform", "population", "all"] = "examples",
    importance: Literal["uniform", "examples"] = "uniform",
) -> Strategy:
    """Federated averaging.

    Args:
        server_lr: η_g.
        weighting: how clients are weighted, see the module's table.
        importance: p_i of ``population``: 1/N, or n_i / Σ n_j over all registered clients.
    """
    check_finite(server_lr=server_lr)

    def init_checked(x0: Tensor, spec: ParamSpec, population: Population) -> State:
        if weighting == "population" and importance == "examples" and population.examples is None:
            raise ConfigError(
                "importance 'examples' needs the number of examples of every registered client",
                code="FS-CFG-065",
                where="[strategy] importance",
                hint="use importance = 'uniform'",
            )
        return init(x0, spec, population)

    def weigh(state: State, meta: Meta) -> tuple[Floats, Bools]:
        if weighting == "examples":
            return by_examples(state, meta)
        if weighting == "population" and importance == "examples":
            return by_examples(state, meta)
        return uniformly(state, meta)

    def apply(state: State, reduced: dict[str, Tensor], info: WindowInfo) -> tuple[State, dict[str, float]]:
        if not has_weight(reduced):
            return state, {}

        def step(total: Tensor) -> Tensor:
            if weighting == "all":
                return server_lr * (total / info.N)
            if weighting == "population":
                # Σ p_i N Δ_i / |S|: with p_i = 1/N the weights were 1, with p_i = n_i / Σ n_j they were n_i
                scale = 1.0 if importance == "uniform" else info.N / state.examples
                return server_lr * (total * (scale / reduced["count"]))
            return server_lr * (total / reduced["weight"])

        return state._replace(x=moved(state.x, reduced["delta"], step)), {}

    return Strategy(
        init=init_checked,
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
            neutral="one local step on all data, weighting examples -> centralised gradient descent",
        ),
    )
