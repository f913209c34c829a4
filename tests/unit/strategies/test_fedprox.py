from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import ConfigError
from fedsim.local import LocalSpec
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.fedprox import fedprox
from tests.quadratics import ENGINES, diagonal, federate, heterogeneous, quadratic_grad, run

PAIR = diagonal([[1, 2, 1], [1, 1, 2]], [[1, 0, 2], [3, -2, 0]], sizes=[1, 3])


@pytest.mark.parametrize("engine", ENGINES)
def test_two_steps_by_hand(engine: str) -> None:
    """With w = 0, μ = 0.5, η = 0.1, the first step is FedAvg's: (0.1, 0, 0.2) and (0.3, -0.2, 0).

    Second step of client 0: gradient (-0.9, 0, -1.8) + 0.5 (0.1, 0, 0.2) = (-0.85, 0, -1.7),
    so x_0 = (0.185, 0, 0.37). Client 1: (-2.7, 1.8, 0) + 0.5 (0.3, -0.2, 0) = (-2.55, 1.7, 0),
    so x_1 = (0.555, -0.37, 0). Weighted 1 : 3.
    """
    x = run(federate(PAIR, fedprox(mu=0.5), engine=engine, steps=2), 1)[0]
    np.testing.assert_allclose(x, [0.4625, -0.2775, 0.0925], atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_follows_the_equations_with_stragglers(engine: str) -> None:
    problem, cohorts = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), [[0, 1, 4], [2, 3, 5], [1]]
    limits = {1: 2, 4: 1}
    federation = federate(
        problem, fedprox(mu=0.6), engine=engine, steps=5, cohorts=cohorts, limits=limits, x0=np.ones(4)
    )
    models = run(federation, 6)
    w = np.ones(4)
    for r, model in enumerate(models):
        cohort, start = cohorts[r % 3], w

        def pull(x: np.ndarray, start: np.ndarray = start) -> np.ndarray:
            return 0.6 * (x - start)

        local = [problem.descend(i, w, steps=limits.get(i, 5), lr=0.1, extra=pull) for i in cohort]
        w = np.average(local, axis=0, weights=problem.sizes[cohort])
        np.testing.assert_allclose(model, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighting", ["examples", "uniform", "population", "all"])
def test_without_proximal_term_it_is_fedavg(weighting: str) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    one = run(federate(problem, fedprox(mu=0.0, weighting=weighting), steps=4, cohorts=[[0, 3], [1]]), 3)
    two = run(federate(problem, fedavg(weighting=weighting), steps=4, cohorts=[[0, 3], [1]]), 3)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("mu", [0.01, 1.0, 15.0])
def test_one_local_step_is_fedavg_for_any_mu(mu: float) -> None:
    problem, x0 = heterogeneous(), np.full(4, 3.0)
    one, two = (run(federate(problem, s, steps=1, x0=x0), 3) for s in (fedprox(mu=mu), fedavg()))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), mus=st.tuples(st.floats(0, 15), st.floats(0, 15)))
def test_a_larger_mu_never_moves_a_client_further(seed: int, mus: tuple[float, float]) -> None:
    problem = heterogeneous(clients=1, seed=seed)
    small, large = sorted(mus)
    # Rate 0.05: then η (A + μ) < 1, and each mode of the quadratic decays without overshooting.
    near, far = (
        np.linalg.norm(run(federate(problem, fedprox(mu=mu), steps=6, lr=0.05), 1)[0])
        for mu in (large, small)
    )
    assert near <= far + 1e-12


def test_local_training_ends_at_the_optimum_of_the_proximal_objective() -> None:
    problem, w, mu = heterogeneous(clients=1), np.array([1.0, -2.0, 0.5, 3.0]), 0.8
    x = run(federate(problem, fedprox(mu=mu), steps=400, lr=0.2, x0=w), 1)[0]
    A, b = problem.A[0], problem.b[0]
    np.testing.assert_allclose(x, np.linalg.solve(A + mu * np.eye(4), A @ b + mu * w), atol=1e-12)


def test_a_proximal_term_too_strong_for_the_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr times mu must be less than 2") as caught:
        fedprox(mu=20.0).local(quadratic_grad, LocalSpec(lr=0.1))
    assert caught.value.code == "FS-CFG-080"
    fedprox(mu=19.9).local(quadratic_grad, LocalSpec(lr=0.1))


@pytest.mark.parametrize("mu", [-0.1, float("inf"), float("nan")])
def test_a_mu_outside_its_range_is_refused(mu: float) -> None:
    with pytest.raises(ValueError, match="mu"):
        fedprox(mu=mu)
