"""The oracle for convergence: clients that pull in different directions, and many local steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.feddyn import feddyn
from fedsim.strategies.fednova import fednova
from fedsim.strategies.fedprox import fedprox
from fedsim.strategies.scaffold import scaffold
from fedsim.strategy import Strategy
from tests.quadratics import ENGINES, Quadratics, federate, heterogeneous, run

STEPS, LR = 10, 0.1
REACHES: dict[str, tuple[Strategy, int]] = {
    "scaffold": (scaffold(), 50),
    "scaffold, held by the server": (scaffold(state_at="server"), 50),
    "scaffold, option 1": (scaffold(option=1), 25),
    "scaffold, from gradients": (scaffold(control="gradients"), 50),
    "feddyn": (feddyn(alpha=2.0), 45),
    "feddyn, held by the server": (feddyn(alpha=2.0, state_at="server"), 45),
}


def problem() -> Quadratics:
    return heterogeneous(clients=4, dimensions=3, seed=3)


def fixed_point(
    quadratics: Quadratics, steps: Sequence[int], lr: float, weights: Sequence[float]
) -> np.ndarray:
    """Where Σ w_i Δ_i = 0 for plain local steps, as Δ_i = (I - (I - η A_i)^K_i) (b_i - x)."""
    eye = np.eye(quadratics.b.shape[1])
    pulls = np.array(
        [
            w * (eye - np.linalg.matrix_power(eye - lr * A, k))
            for A, k, w in zip(quadratics.A, steps, weights, strict=True)
        ]
    )
    return np.asarray(np.linalg.solve(pulls.sum(axis=0), np.einsum("ijk,ik->j", pulls, quadratics.b)))


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, "stacked") for name in REACHES] + [("scaffold", "loop"), ("feddyn", "loop")],
)
def test_it_reaches_the_optimum_of_the_mean_objective(name: str, engine: str) -> None:
    strategy, rounds = REACHES[name]
    last = run(federate(problem(), strategy, engine=engine, steps=STEPS, lr=LR), rounds)[-1]
    assert np.linalg.norm(last - problem().optimum()) < 1e-8


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "strategy", [fedavg(), fednova(), fedprox(mu=1.0)], ids=["fedavg", "fednova", "fedprox"]
)
def test_it_stays_away_from_the_optimum_however_long_it_runs(strategy: Strategy, engine: str) -> None:
    models = run(federate(problem(), strategy, engine=engine, steps=STEPS, lr=LR), 45)
    assert np.linalg.norm(models[-1] - models[-2]) < 1e-10  # it has converged,
    assert np.linalg.norm(models[-1] - problem().optimum()) > 1e-3  # to another point


def test_fedavg_ends_where_theory_puts_it() -> None:
    last = run(federate(problem(), fedavg(), steps=STEPS, lr=LR), 50)[-1]
    np.testing.assert_allclose(last, fixed_point(problem(), [STEPS] * 4, LR, [1] * 4), atol=1e-11)


@pytest.mark.parametrize("strategy", [scaffold(), feddyn(alpha=2.0)], ids=["scaffold", "feddyn"])
def test_it_reaches_the_optimum_with_half_of_the_clients_at_a_time(strategy: Strategy) -> None:
    cohorts = [[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2]]
    models = run(federate(problem(), strategy, steps=5, lr=LR, cohorts=cohorts), 70)
    assert np.linalg.norm(models[-1] - problem().optimum()) < 1e-8


def test_one_local_step_leaves_nothing_to_correct() -> None:
    last = run(federate(problem(), fedavg(), steps=1, lr=0.5), 80)[-1]
    np.testing.assert_allclose(last, problem().optimum(), atol=1e-10)


def test_with_unequal_work_fedavg_weights_the_objectives_by_it_and_fednova_does_not() -> None:
    """Both stand still where theory says, and for small rates that is the optimum of Σ K_i F_i or Σ F_i."""
    work, lr = [1, 2, 4, 8], 1e-3
    naive = fixed_point(problem(), work, lr, [1] * 4)
    fair = fixed_point(problem(), work, lr, [1 / k for k in work])
    for strategy, point in ((fedavg(), naive), (fednova(), fair)):
        federation = federate(problem(), strategy, steps=8, lr=lr, limits=dict(enumerate(work)), x0=point)
        np.testing.assert_allclose(run(federation, 1)[0], point, atol=1e-13)
    assert np.linalg.norm(naive - problem().optimum(work)) < 0.02
    assert np.linalg.norm(naive - problem().optimum()) > 0.5
    assert np.linalg.norm(fair - problem().optimum()) < 0.02
