from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from fedsim.local import LocalSpec
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.fedcm import fedcm
from fedsim.strategies.fedsam import fedsam, mofedsam
from fedsim.uphill import UphillGradient
from tests.quadratics import (
    ENGINES,
    Array,
    Quadratics,
    client_held,
    diagonal,
    federate,
    heterogeneous,
    quadratic_grad,
    run,
)

COHORTS = [[0, 1, 4], [2, 3, 5], [1], [0, 2, 4, 5]]
LIMITS = {1: 2, 4: 1, 5: 0}


def uphill(problem: Quadratics, client: int, x: Array, rho: float) -> Array:
    """g2."""
    g = problem.gradient(client, x)
    return problem.gradient(client, x + rho * g / (np.linalg.norm(g) + 1e-7))


@pytest.mark.parametrize("engine", ENGINES)
def test_one_round_by_hand(engine: str) -> None:
    """Curvatures 1, ρ = 0.5: gradients (-3, -4, 0), (0, 0, 2) become (-3.3, -4.4, 0), (0, 0, 2.5).

    With rate 0.1: Δ = (0.33, 0.44, 0), (0, 0, -0.25); examples 1 and 3 weigh 1/4 and 3/4.
    """
    pair = diagonal([[1, 1, 1], [1, 1, 1]], [[3, 4, 0], [0, 0, -2]], sizes=[1, 3])
    spec = LocalSpec(steps=1, batch_size=1, lr=0.1)
    models = run(federate(pair, fedsam(rho=0.5), engine=engine, spec=spec), 1)
    np.testing.assert_allclose(models[0], [0.0825, 0.11, -0.1875], atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_fedsam_follows_the_equations_round_by_round(
    engine: str, weighting: Literal["examples", "uniform"], beta: float
) -> None:
    problem, rho = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), 0.4
    strategy = fedsam(rho=rho, server_lr=0.8, weighting=weighting, init_beta=beta)
    federation = federate(problem, strategy, engine=engine, steps=4, cohorts=COHORTS, limits=LIMITS)
    w, last = np.zeros(4), dict[int, Array]()
    for r in range(8):
        cohort, deltas = COHORTS[r % 4], []
        for i in cohort:
            x = w + beta * (w - last.get(i, w))
            for _ in range(LIMITS.get(i, 4)):
                x = x - 0.1 * uphill(problem, i, x, rho)
            last[i] = x
            deltas.append(x - w)
        weights = problem.sizes[cohort] if weighting == "examples" else None
        w = w + 0.8 * np.average(deltas, axis=0, weights=weights)
        np.testing.assert_allclose(run(federation, 1)[0], w, rtol=0, atol=1e-10)


def test_a_client_keeps_where_it_ended_only_for_a_relaxed_start() -> None:
    for beta, kept in ((0.0, False), (0.1, True)):
        federation = federate(heterogeneous(), fedsam(init_beta=beta), steps=2)
        run(federation, 1)
        assert client_held(federation).any() == kept
        assert fedsam(init_beta=beta).traits.client_state == ("client" if kept else "none")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("parameters", [{}, {"weighting": "population", "importance": "examples"}])
def test_without_a_radius_fedsam_is_fedavg(engine: str, parameters: dict[str, Any]) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    one, two = (
        run(federate(problem, strategy, engine=engine, steps=4, cohorts=COHORTS), 6)
        for strategy in (
            fedsam(rho=0.0, server_lr=0.7, **parameters),
            fedavg(server_lr=0.7, **parameters),
        )
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("engine", ENGINES)
def test_mofedsam_follows_the_equations_round_by_round(engine: str) -> None:
    problem, rho, alpha, eta_g = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), 0.4, 0.3, 0.8
    strategy = mofedsam(rho=rho, alpha=alpha, server_lr=eta_g)
    federation = federate(problem, strategy, engine=engine, steps=5, cohorts=COHORTS, limits=LIMITS)
    x, m = np.zeros(4), np.zeros(4)
    for r in range(8):
        deltas, directions = [], []
        for i in COHORTS[r % 4]:
            y, steps = x, LIMITS.get(i, 5)
            for _ in range(steps):
                y = y - 0.1 * (alpha * uphill(problem, i, y, rho) + (1 - alpha) * m)
            deltas.append(y - x)
            if steps:
                directions.append(-(y - x) / (steps * 0.1))
        m, x = np.mean(directions, axis=0), x + eta_g * np.mean(deltas, axis=0)
        np.testing.assert_allclose(run(federation, 1)[0], x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(federation.state.strategy.m.numpy(), m, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_radius_mofedsam_is_fedcm(engine: str) -> None:
    one, two = (
        run(federate(heterogeneous(), strategy, engine=engine, steps=4, cohorts=COHORTS), 6)
        for strategy in (mofedsam(rho=0.0, alpha=0.2), fedcm(alpha=0.2))
    )
    np.testing.assert_array_equal(one, two)


def test_with_only_its_own_gradient_mofedsam_is_fedsam() -> None:
    one, two = (
        run(federate(heterogeneous(), strategy, steps=4, cohorts=COHORTS), 6)
        for strategy in (mofedsam(alpha=1.0), fedsam(weighting="uniform"))
    )
    np.testing.assert_array_equal(one, two)


def test_the_gradient_that_is_declared_is_taken_uphill_only_where_there_is_a_radius() -> None:
    for rho in (0.0, 0.1):
        gradient = fedsam(rho=rho).local(quadratic_grad, LocalSpec()).gradient
        assert (gradient is quadratic_grad) == (rho == 0.0)
        assert isinstance(gradient, UphillGradient) == (rho > 0.0)


@pytest.mark.parametrize("strategy", [fedsam(), mofedsam()], ids=["fedsam", "mofedsam"])
def test_an_empty_window_changes_nothing(strategy: Any) -> None:
    models = run(federate(heterogeneous(), strategy, cohorts=[[0, 1], []]), 2)
    np.testing.assert_array_equal(models[0], models[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", [fedsam(init_beta=0.1), mofedsam()], ids=["fedsam", "mofedsam"])
def test_the_model_keeps_its_dtype(dtype: torch.dtype, strategy: Any) -> None:
    federation = federate(heterogeneous(), strategy, steps=2, dtype=dtype)
    run(federation, 2)
    assert federation.model.dtype == dtype


@pytest.mark.parametrize("factory", [fedsam, mofedsam])
@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_radius_out_of_its_range_is_refused(factory: Any, rho: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        factory(rho=rho)


def test_a_relaxation_that_points_backwards_is_refused() -> None:
    with pytest.raises(ValueError, match="init_beta"):
        fedsam(init_beta=-0.1)
