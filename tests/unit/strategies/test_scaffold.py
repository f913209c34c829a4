from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from fedsim.federation import Federation
from fedsim.local import LocalSpec
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.scaffold import scaffold
from tests.quadratics import (
    ENGINES,
    Quadratics,
    client_held,
    diagonal,
    federate,
    heterogeneous,
    run,
    server_held,
)

PAIR = diagonal([[1, 2, 1], [1, 1, 2]], [[1, 0, 2], [3, -2, 0]], sizes=[1, 3])
PLACES: tuple[Literal["client", "server"], ...] = ("client", "server")
COHORTS = [[0, 1, 4], [2, 3, 5], [1], [0, 2, 4, 5]]
VARIANTS: list[dict[str, Any]] = [{}, {"option": 1}, {"control": "gradients"}]


def controls(federation: Federation, place: str) -> np.ndarray:
    """[N, d] every c_i, wherever it is."""
    return client_held(federation) if place == "client" else server_held(federation, "control")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
def test_two_rounds_by_hand(engine: str, place: Literal["client", "server"]) -> None:
    """Round 1 is FedAvg's step: Δ = (0.1, 0, 0.2), (0.3, -0.2, 0), and c_i+ the gradients at 0.

    c = ((-1, 0, -2) + (-3, 2, 0)) / 2 = (-2, 1, -1). Round 2 from x = (0.2, -0.1, 0.1), client 0:
    gradient (-0.8, -0.2, -1.9) - c_0 + c = (-1.8, 0.8, -0.9); client 1: (-2.8, 1.9, 0.2) - c_1 + c
    = (-1.8, 0.9, -0.8). Mean step -0.1 (-1.8, 0.85, -0.85).
    """
    federation = federate(PAIR, scaffold(state_at=place), engine=engine)
    first = run(federation, 1)[0]
    np.testing.assert_allclose(first, [0.2, -0.1, 0.1], atol=1e-15)
    np.testing.assert_allclose(controls(federation, place), [[-1, 0, -2], [-3, 2, 0]], atol=1e-15)
    np.testing.assert_allclose(federation.state.strategy.c, [-2, 1, -1], atol=1e-15)
    np.testing.assert_allclose(run(federation, 1)[0], [0.38, -0.185, 0.185], atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_follows_the_equations_round_by_round(
    engine: str, place: Literal["client", "server"], variant: dict[str, Any]
) -> None:
    """Partial participation, unequal numbers of steps, and one client that manages none."""
    problem, limits, lr, eta_g = heterogeneous(sizes=[1, 5, 2, 4, 3, 6]), {1: 2, 4: 1, 5: 0}, 0.1, 0.8
    strategy = scaffold(server_lr=eta_g, state_at=place, **variant)
    federation = federate(problem, strategy, engine=engine, steps=5, cohorts=COHORTS, limits=limits)
    x, c, held = np.zeros(4), np.zeros(4), np.zeros((6, 4))
    for r in range(8):
        cohort, deltas, changes = COHORTS[r % 4], [], []
        for i in cohort:
            y, gradients, steps = x, [], limits.get(i, 5)
            for _ in range(steps):
                gradients.append(problem.gradient(i, y))
                y = y - lr * (gradients[-1] - held[i] + c)
            new = held[i]
            if steps:
                by_option = {
                    (): held[i] - c + (x - y) / (steps * lr),
                    ("option",): problem.gradient(i, x),
                    ("control",): np.mean(gradients, axis=0),
                }
                new = by_option[tuple(variant)]
            deltas.append(y - x)
            changes.append(new - held[i])
            held[i] = new
        x = x + eta_g * np.mean(deltas, axis=0)
        c = c + np.sum(changes, axis=0) / 6
        np.testing.assert_allclose(run(federation, 1)[0], x, rtol=0, atol=1e-10)
        np.testing.assert_allclose(controls(federation, place), held, rtol=0, atol=1e-10)
        np.testing.assert_allclose(federation.state.strategy.c, c, rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_server_control_is_always_the_mean_over_the_population(
    place: Literal["client", "server"], variant: dict[str, Any]
) -> None:
    strategy = scaffold(state_at=place, **variant)
    federation = federate(heterogeneous(), strategy, steps=4, cohorts=[*COHORTS, []], limits={2: 0})
    for _ in range(7):
        run(federation, 1)
        mean = controls(federation, place).mean(axis=0)
        np.testing.assert_allclose(federation.state.strategy.c, mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_both_placements_give_the_same_trajectory(variant: dict[str, Any], momentum: float) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    spec = LocalSpec(
        epochs=2, batch_size=2, lr=0.05, lr_decay=0.9, momentum=momentum, weight_decay=0.01, clip_norm=5.0
    )
    one, two = (
        run(federate(problem, scaffold(state_at=place, **variant), spec=spec, cohorts=COHORTS), 6)
        for place in PLACES
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


def test_after_one_step_the_control_is_the_gradient_just_computed() -> None:
    problem, x0 = heterogeneous(), np.array([1.0, -1.0, 2.0, 0.0])
    federation = federate(problem, scaffold(), steps=1, lr=0.03, x0=x0)
    x1 = run(federation, 1)[0]
    run(federation, 1)
    expected = [problem.gradient(i, x1) for i in range(6)]
    np.testing.assert_allclose(client_held(federation), expected, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
def test_the_first_window_is_fedavg(place: Literal["client", "server"]) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    one = run(federate(problem, scaffold(state_at=place), steps=5, cohorts=COHORTS), 1)
    two = run(federate(problem, fedavg(weighting="uniform"), steps=5, cohorts=COHORTS), 1)
    np.testing.assert_array_equal(one, two)


def test_identical_clients_share_the_server_control_and_run_as_fedavg() -> None:
    one = heterogeneous(clients=1)
    same = Quadratics(one.A.repeat(3, axis=0), one.b.repeat(3, axis=0), np.ones(3, np.int64))
    federation = federate(same, scaffold(), steps=5)
    models = run(federation, 6)
    expected = run(federate(same, fedavg(weighting="uniform"), steps=5), 6)
    np.testing.assert_allclose(models, expected, atol=1e-13)
    c = federation.state.strategy.c.numpy()
    np.testing.assert_allclose(client_held(federation), [c] * 3, atol=1e-13)


def test_momentum_divides_by_the_sum_of_the_coefficients_of_all_directions() -> None:
    """Two steps of momentum 0.5 at c = c_i = 0: x - y = η (1.5 g_0 + g_1) and Σ η_k = 2.5 η."""
    problem = heterogeneous(clients=1)
    spec = LocalSpec(steps=2, batch_size=1, lr=0.1, momentum=0.5)
    federation = federate(problem, scaffold(), spec=spec)
    run(federation, 1)
    g0 = problem.gradient(0, np.zeros(4))
    g1 = problem.gradient(0, -0.1 * g0)
    np.testing.assert_allclose(client_held(federation)[0], (1.5 * g0 + g1) / 2.5, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_controls_from_gradients_are_free_of_weight_decay_and_those_from_the_delta_are_not(
    engine: str,
) -> None:
    problem, x0 = heterogeneous(), np.full(4, 2.0)
    spec = LocalSpec(steps=1, batch_size=1, lr=0.1, weight_decay=0.5)
    clean, leaky = (
        federate(problem, scaffold(control=control), engine=engine, spec=spec, x0=x0)
        for control in ("gradients", "delta")
    )
    for federation in (clean, leaky):
        run(federation, 1)
    gradients = np.array([problem.gradient(i, x0) for i in range(6)])
    np.testing.assert_allclose(client_held(clean), gradients, atol=1e-12)
    np.testing.assert_allclose(client_held(leaky), gradients + 0.5 * x0, atol=1e-12)


def test_controls_from_gradients_work_with_an_optimiser_that_has_no_normaliser() -> None:
    problem = heterogeneous()
    spec = LocalSpec(steps=3, batch_size=1, lr=0.1, optimizer="adam")
    strategy = scaffold(control="gradients")
    federation = federate(problem, strategy, spec=spec)
    run(federation, 2)
    assert not strategy.traits.needs_normaliser
    assert scaffold().traits.needs_normaliser
    assert np.isfinite(client_held(federation)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_the_model_and_the_messages_keep_their_dtype(
    dtype: torch.dtype, place: Literal["client", "server"]
) -> None:
    federation = federate(heterogeneous(), scaffold(state_at=place), steps=2, dtype=dtype)
    run(federation, 2)
    message = federation.strategy.broadcast(federation.state.strategy)
    assert {federation.model.dtype, *(v.dtype for v in message.vectors.values())} == {dtype}
    assert federation.state.strategy.c.dtype == torch.float32


def test_option_one_has_no_choice_of_control() -> None:
    with pytest.raises(ValueError, match="control belongs to option 2"):
        scaffold(option=1, control="gradients")
