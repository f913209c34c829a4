from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.local import LocalSpec
from fedsim.strategies.feddyn import feddyn
from tests.quadratics import (
    ENGINES,
    client_held,
    diagonal,
    federate,
    heterogeneous,
    quadratic_grad,
    run,
    server_held,
)

PAIR = diagonal([[1, 2, 1], [1, 1, 2]], [[1, 0, 2], [3, -2, 0]], sizes=[1, 3])
PLACES: tuple[Literal["client", "server"], ...] = ("client", "server")
COHORTS = [[0, 1, 4], [2, 3, 5], [1], [0, 2, 4, 5]]


def duals(federation: Federation, place: str) -> np.ndarray:
    """[N, d] every h_i, wherever it is."""
    return client_held(federation) if place == "client" else server_held(federation, "dual")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
def test_two_rounds_by_hand(engine: str, place: Literal["client", "server"]) -> None:
    """One step of rate 0.1, α = 0.5. Round 1: Δ = (0.1, 0, 0.2), (0.3, -0.2, 0), which are the duals;

    h̄ = (0.2, -0.1, 0.1), and w = mean Δ + h̄ = (0.4, -0.2, 0.2). Round 2, client 0: gradient
    (-0.6, -0.4, -1.8) + 0.5 h_0 = (-0.55, -0.4, -1.7); client 1: (-2.6, 1.8, 0.4) + 0.5 h_1
    = (-2.45, 1.7, 0.4). Mean Δ = (0.15, -0.065, 0.065), h̄ = (0.35, -0.165, 0.165).
    """
    federation = federate(PAIR, feddyn(alpha=0.5, state_at=place), engine=engine)
    models = run(federation, 2)
    np.testing.assert_allclose(models[0], [0.4, -0.2, 0.2], atol=1e-15)
    np.testing.assert_allclose(models[1], [0.9, -0.43, 0.43], atol=1e-15)
    np.testing.assert_allclose(federation.state.strategy.h, [0.35, -0.165, 0.165], atol=1e-15)
    np.testing.assert_allclose(duals(federation, place)[0], [0.155, 0.04, 0.37], atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
def test_it_follows_the_published_form_round_by_round(
    engine: str, place: Literal["client", "server"]
) -> None:
    """Algorithm 1 with its own g_i and h, of which the implementation keeps -g_i / α and -h / α."""
    problem, alpha, limits = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), 0.7, {1: 2, 4: 1, 5: 0}
    strategy = feddyn(alpha=alpha, state_at=place)
    federation = federate(problem, strategy, engine=engine, steps=5, cohorts=COHORTS, limits=limits)
    w, h, g = np.zeros(4), np.zeros(4), np.zeros((6, 4))
    for r in range(8):
        cohort, local = COHORTS[r % 4], []
        for i in cohort:
            x = w
            for _ in range(limits.get(i, 5)):
                x = x - 0.1 * (problem.gradient(i, x) - g[i] + alpha * (x - w))
            g[i] = g[i] - alpha * (x - w)
            local.append(x)
        h = h - alpha / 6 * sum(x - w for x in local)
        w = np.mean(local, axis=0) - h / alpha
        np.testing.assert_allclose(run(federation, 1)[0], w, rtol=0, atol=1e-10)
        np.testing.assert_allclose(-alpha * duals(federation, place), g, rtol=0, atol=1e-10)
        np.testing.assert_allclose(-alpha * federation.state.strategy.h.numpy(), h, rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", PLACES)
def test_the_server_dual_is_always_the_mean_over_the_population(place: Literal["client", "server"]) -> None:
    strategy = feddyn(state_at=place)
    federation = federate(heterogeneous(), strategy, steps=4, cohorts=[*COHORTS, []], limits={2: 0})
    for _ in range(7):
        run(federation, 1)
        mean = duals(federation, place).mean(axis=0)
        np.testing.assert_allclose(federation.state.strategy.h, mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_both_placements_give_the_same_trajectory(momentum: float) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    spec = LocalSpec(
        epochs=2, batch_size=2, lr=0.05, lr_decay=0.9, momentum=momentum, weight_decay=0.01, clip_norm=5.0
    )
    one, two = (
        run(federate(problem, feddyn(state_at=place), spec=spec, cohorts=COHORTS), 6) for place in PLACES
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


def test_it_stands_still_where_the_duals_are_the_clients_gradients() -> None:
    problem, alpha = heterogeneous(clients=4, dimensions=3, seed=3), 2.0
    federation = federate(problem, feddyn(alpha=alpha), steps=10)
    run(federation, 55)
    w = federation.model.numpy()
    gradients = np.array([problem.gradient(i, w) for i in range(4)])
    np.testing.assert_allclose(federation.state.strategy.h, np.zeros(3), atol=1e-10)
    np.testing.assert_allclose(alpha * client_held(federation), -gradients, atol=1e-9)
    assert np.abs(gradients).max() > 0.1


def test_an_empty_window_changes_nothing() -> None:
    federation = federate(PAIR, feddyn(), cohorts=[[0, 1], []])
    models = run(federation, 2)
    np.testing.assert_array_equal(models[0], models[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_the_model_keeps_its_dtype(dtype: torch.dtype, place: Literal["client", "server"]) -> None:
    federation = federate(heterogeneous(), feddyn(state_at=place), steps=2, dtype=dtype)
    run(federation, 2)
    assert (federation.model.dtype, federation.state.strategy.h.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("alpha", [0.0, -0.1, float("inf"), float("nan")])
def test_an_alpha_that_is_not_positive_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        feddyn(alpha=alpha)


def test_an_alpha_too_strong_for_the_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr times alpha must be less than 2") as caught:
        feddyn(alpha=1.0).local(quadratic_grad, LocalSpec(lr=2.0))
    assert caught.value.code == "FS-CFG-080"
