from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from fedsim.errors import AllRefused
from fedsim.federation import Federation
from fedsim.local import LocalSpec
from fedsim.strategies.fedgamma import fedgamma
from fedsim.strategies.fedsam import fedsam
from fedsim.strategies.scaffold import scaffold
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
    server_held,
)

PLACES: tuple[Literal["client", "server"], ...] = ("client", "server")
CONTROLS: tuple[Literal["delta", "gradients"], ...] = ("delta", "gradients")
COHORTS = [[0, 1, 4], [2, 3, 5], [1], [0, 2, 4, 5]]
LIMITS = {1: 2, 4: 1, 5: 0}


def uphill(problem: Quadratics, client: int, x: Array, rho: float) -> Array:
    """g2."""
    g = problem.gradient(client, x)
    return problem.gradient(client, x + rho * g / (np.linalg.norm(g) + 1e-7))


def controls(federation: Federation, place: str) -> Array:
    """[N, d] every c_i, wherever it is."""
    return client_held(federation) if place == "client" else server_held(federation, "control")


@pytest.mark.parametrize("engine", ENGINES)
def test_one_round_by_hand(engine: str) -> None:
    """Curvatures 1, ρ = 0.5: gradients (-3, -4, 0), (0, 0, 2) become (-3.3, -4.4, 0), (0, 0, 2.5).

    These are the new c_i, and c their mean; x = 0.1 · (1.65, 2.2, -1.25).
    """
    pair = diagonal([[1, 1, 1], [1, 1, 1]], [[3, 4, 0], [0, 0, -2]], sizes=[1, 3])
    federation = federate(pair, fedgamma(rho=0.5), engine=engine)
    np.testing.assert_allclose(run(federation, 1)[0], [0.165, 0.22, -0.125], atol=1e-7)
    np.testing.assert_allclose(client_held(federation), [[-3.3, -4.4, 0], [0, 0, 2.5]], atol=1e-6)
    np.testing.assert_allclose(federation.state.strategy.c, [-1.65, -2.2, 1.25], atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("control", CONTROLS)
def test_it_follows_the_equations_round_by_round(
    engine: str, place: Literal["client", "server"], control: Literal["delta", "gradients"]
) -> None:
    problem, rho, eta_g = heterogeneous(sizes=[1, 5, 2, 4, 3, 6]), 0.4, 0.8
    strategy = fedgamma(rho=rho, server_lr=eta_g, state_at=place, control=control)
    federation = federate(problem, strategy, engine=engine, steps=5, cohorts=COHORTS, limits=LIMITS)
    x, c, held = np.zeros(4), np.zeros(4), np.zeros((6, 4))
    for r in range(6):
        deltas, change = [], np.zeros(4)
        for i in COHORTS[r % 4]:
            y, gradients, steps = x, [], LIMITS.get(i, 5)
            for _ in range(steps):
                gradients.append(uphill(problem, i, y, rho))
                y = y - 0.1 * (gradients[-1] - held[i] + c)
            new = held[i]
            if steps and control == "delta":
                new = held[i] - c + (x - y) / (steps * 0.1)
            elif steps:
                new = np.mean(gradients, axis=0)
            deltas.append(y - x)
            change, held[i] = change + new - held[i], new
        x, c = x + eta_g * np.mean(deltas, axis=0), c + change / 6
        np.testing.assert_allclose(run(federation, 1)[0], x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(controls(federation, place), held, rtol=0, atol=1e-10)
        np.testing.assert_allclose(federation.state.strategy.c, c, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("place", PLACES)
def test_without_a_radius_it_is_scaffold(
    engine: str, control: Literal["delta", "gradients"], place: Literal["client", "server"]
) -> None:
    one, two = (
        run(federate(heterogeneous(), strategy, engine=engine, steps=4, cohorts=COHORTS), 5)
        for strategy in (
            fedgamma(rho=0.0, control=control, state_at=place),
            scaffold(control=control, state_at=place),
        )
    )
    np.testing.assert_array_equal(one, two)


def test_the_first_window_is_fedsam() -> None:
    one = run(federate(heterogeneous(), fedgamma(rho=0.3), steps=5, cohorts=COHORTS), 1)
    two = run(federate(heterogeneous(), fedsam(rho=0.3, weighting="uniform"), steps=5, cohorts=COHORTS), 1)
    np.testing.assert_array_equal(one, two)


def test_identical_clients_run_as_fedsam() -> None:
    one = heterogeneous(clients=1)
    same = Quadratics(one.A.repeat(3, axis=0), one.b.repeat(3, axis=0), np.ones(3, np.int64))
    models = run(federate(same, fedgamma(rho=0.3), steps=5), 6)
    expected = run(federate(same, fedsam(rho=0.3, weighting="uniform"), steps=5), 6)
    np.testing.assert_allclose(models, expected, atol=1e-13)


@pytest.mark.parametrize("place", PLACES)
def test_the_server_control_is_always_the_mean_over_the_population(
    place: Literal["client", "server"],
) -> None:
    strategy = fedgamma(state_at=place)
    federation = federate(heterogeneous(), strategy, steps=4, cohorts=[*COHORTS, []], limits={2: 0})
    for _ in range(7):
        run(federation, 1)
        mean = controls(federation, place).mean(axis=0)
        np.testing.assert_allclose(federation.state.strategy.c, mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("control", CONTROLS)
def test_both_placements_give_the_same_trajectory(control: Literal["delta", "gradients"]) -> None:
    spec = LocalSpec(epochs=2, batch_size=2, lr=0.05, momentum=0.9, weight_decay=0.01, clip_norm=5.0)
    one, two = (
        run(federate(heterogeneous(), fedgamma(state_at=p, control=control), spec=spec, cohorts=COHORTS), 6)
        for p in PLACES
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


def test_corrected_clients_come_to_rest_nearer_to_the_optimum_than_uncorrected_ones() -> None:
    problem = heterogeneous(clients=4, dimensions=3, seed=3)
    corrected, plain = (
        run(federate(problem, strategy, engine="stacked", steps=8), 50)[-1]
        for strategy in (fedgamma(rho=0.01), fedsam(rho=0.01))
    )
    optimum = problem.optimum()
    assert np.linalg.norm(corrected - optimum) == pytest.approx(0.0033, abs=1e-4)
    assert np.linalg.norm(plain - optimum) == pytest.approx(0.397, abs=1e-3)


def test_only_controls_from_the_distance_need_step_lengths() -> None:
    spec = LocalSpec(steps=3, batch_size=1, lr=0.1, optimizer="adam")
    assert isinstance(federate(heterogeneous(), fedgamma(), spec=spec).run_window().error, AllRefused)
    federation = federate(heterogeneous(), fedgamma(control="gradients"), spec=spec)
    run(federation, 2)
    assert np.isfinite(client_held(federation)).all()


def test_the_gradient_that_is_declared_is_taken_uphill_only_where_there_is_a_radius() -> None:
    for rho in (0.0, 0.1):
        gradient = fedgamma(rho=rho).local(quadratic_grad, LocalSpec()).gradient
        assert (gradient is quadratic_grad) == (rho == 0.0)
        assert isinstance(gradient, UphillGradient) == (rho > 0.0)


def test_an_empty_window_changes_nothing() -> None:
    models = run(federate(heterogeneous(), fedgamma(), cohorts=[[0, 1], []]), 2)
    np.testing.assert_array_equal(models[0], models[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_keeps_its_dtype(dtype: torch.dtype) -> None:
    federation = federate(heterogeneous(), fedgamma(), steps=2, dtype=dtype)
    run(federation, 2)
    assert (federation.model.dtype, federation.state.strategy.c.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("rho", [-0.1, float("nan")])
def test_a_radius_out_of_its_range_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        fedgamma(rho=rho)
