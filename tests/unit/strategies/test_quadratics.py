"""The oracle for convergence: clients that pull in different directions, and many local steps."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.feddyn import feddyn
from fedsim.strategies.fednova import fednova
from fedsim.strategies.fedprox import fedprox
from fedsim.strategies.scaffold import scaffold
from fedsim.strategy import Strategy
from tests.quadratics import ENGINES, Quadratics, federate, heterogeneous, run

STEPS, LR = 20, 0.1
REACHES: dict[str, tuple[Strategy, int]] = {
    "scaffold": (scaffold(), 110),
    "scaffold, held by the server": (scaffold(state_at="server"), 110),
    "scaffold, option 1": (scaffold(option=1), 30),
    "scaffold, from gradients": (scaffold(control="gradients"), 110),
    "feddyn": (feddyn(alpha=1.0), 70),
    "feddyn, held by the server": (feddyn(alpha=1.0, state_at="server"), 70),
}


def problem() -> Quadratics:
    return heterogeneous(clients=4, dimensions=3, seed=3)


def fixed_point_of_fedavg(quadratics: Quadratics) -> np.ndarray:
    """Where mean Δ_i = 0: Δ_i = (I - (I - η A_i)^K) (b_i - x)."""
    eye = np.eye(quadratics.b.shape[1])
    pulls = np.array([eye - np.linalg.matrix_power(eye - LR * A, STEPS) for A in quadratics.A])
    right = np.einsum("ijk,ik->j", pulls, quadratics.b)
    return np.asarray(np.linalg.solve(pulls.sum(axis=0), right))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", REACHES)
def test_it_reaches_the_optimum_of_the_mean_objective(name: str, engine: str) -> None:
    strategy, rounds = REACHES[name]
    last = run(federate(problem(), strategy, engine=engine, steps=STEPS, lr=LR), rounds)[-1]
    assert np.linalg.norm(last - problem().optimum()) < 1e-8


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", [fedavg(), fednova(), fedprox(mu=1.0)], ids=["fedavg", "fednova", "fedprox"])
def test_it_stays_away_from_the_optimum_however_long_it_runs(strategy: Strategy, engine: str) -> None:
    models = run(federate(problem(), strategy, engine=engine, steps=STEPS, lr=LR), 60)
    assert np.linalg.norm(models[-1] - models[-2]) < 1e-10  # it has converged,
    assert np.linalg.norm(models[-1] - problem().optimum()) > 1e-3  # to another point


def test_fedavg_ends_where_theory_puts_it() -> None:
    last = run(federate(problem(), fedavg(), steps=STEPS, lr=LR), 60)[-1]
    np.testing.assert_allclose(last, fixed_point_of_fedavg(problem()), atol=1e-11)


@pytest.mark.parametrize("strategy", [scaffold(), feddyn(alpha=1.0)], ids=["scaffold", "feddyn"])
def test_it_reaches_the_optimum_with_half_of_the_clients_at_a_time(strategy: Strategy) -> None:
    cohorts = [[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2]]
    models = run(federate(problem(), strategy, steps=5, lr=LR, cohorts=cohorts), 400)
    assert np.linalg.norm(models[-1] - problem().optimum()) < 1e-8


def test_one_local_step_leaves_nothing_to_correct() -> None:
    last = run(federate(problem(), fedavg(), steps=1, lr=0.3), 200)[-1]
    np.testing.assert_allclose(last, problem().optimum(), atol=1e-10)


def test_with_unequal_work_fedavg_weights_the_objectives_by_it_and_fednova_does_not() -> None:
    """With a vanishing rate K_i local steps are K_i times one: FedAvg minimises Σ K_i F_i."""
    limits = {0: 1, 1: 2, 2: 4, 3: 8}
    naive, fair = (
        run(federate(problem(), s, steps=8, lr=1e-3, limits=limits, x0=problem().optimum()), 1200)[-1]
        for s in (fedavg(), fednova())
    )
    assert np.linalg.norm(naive - problem().optimum([1, 2, 4, 8])) < 0.02
    assert np.linalg.norm(naive - problem().optimum()) > 0.1
    assert np.linalg.norm(fair - problem().optimum()) < 0.02
