from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.flat import ParamSpec
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.fedavgm import State, fedavgm
from fedsim.types import Population
from tests.quadratics import ENGINES, diagonal, federate, heterogeneous, mean_of, run, window

# Deltas of the first round from x = 0 with rate 0.1: (0.1, 0, 0.2) and (0.3, -0.2, 0); uniform mean
# (0.2, -0.1, 0.1). The curvatures are 1 and the optima (1, 0, 2), (3, -2, 0): mean optimum (2, -1, 1).
PAIR = diagonal([[1, 1, 1], [1, 1, 1]], [[1, 0, 2], [3, -2, 0]], sizes=[1, 1])


def start(dtype: torch.dtype = torch.float64) -> State:
    layout = ParamSpec(("x",), ((3,),), dtype)
    state = fedavgm().init(torch.zeros(3, dtype=dtype), layout, Population(2))
    assert isinstance(state, State)
    return state


@pytest.mark.parametrize("engine", ENGINES)
def test_two_rounds_by_hand(engine: str) -> None:
    models = run(federate(PAIR, fedavgm(momentum=0.5), engine=engine), 2)
    np.testing.assert_allclose(models[0], [0.2, -0.1, 0.1], atol=1e-15)  # v = Δ̄
    # Δ̄ = 0.1 ((2, -1, 1) - x) = (0.18, -0.09, 0.09); v = 0.5 (0.2, -0.1, 0.1) + Δ̄ = (0.28, -0.14, 0.14)
    np.testing.assert_allclose(models[1], [0.48, -0.24, 0.24], atol=1e-15)


def test_two_nesterov_rounds_by_hand() -> None:
    models = run(federate(PAIR, fedavgm(momentum=0.5, nesterov=True)), 2)
    np.testing.assert_allclose(models[0], [0.3, -0.15, 0.15], atol=1e-15)  # Δ̄ + 0.5 Δ̄
    # Δ̄ = (0.17, -0.085, 0.085); v = (0.27, -0.135, 0.135); step Δ̄ + v / 2 = (0.305, -0.1525, 0.1525)
    np.testing.assert_allclose(models[1], [0.605, -0.3025, 0.3025], atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_it_follows_the_equations_round_by_round(engine: str, nesterov: bool) -> None:
    problem, cohorts = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), [[0, 1, 4], [2, 3, 5], [1]]
    strategy = fedavgm(server_lr=0.7, momentum=0.8, nesterov=nesterov)
    models = run(federate(problem, strategy, engine=engine, steps=4, cohorts=cohorts), 6)
    x, v = np.zeros(4), np.zeros(4)
    for r, model in enumerate(models):
        cohort = cohorts[r % 3]
        deltas = [problem.descend(i, x, steps=4, lr=0.1) - x for i in cohort]
        delta = np.average(deltas, axis=0, weights=problem.sizes[cohort])
        v = 0.8 * v + delta
        x = x + 0.7 * (delta + 0.8 * v if nesterov else v)
        np.testing.assert_allclose(model, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_without_momentum_it_is_fedavg(weighting: str) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    one = run(federate(problem, fedavgm(momentum=0.0, server_lr=0.9, weighting=weighting), steps=4), 3)
    two = run(federate(problem, fedavg(server_lr=0.9, weighting=weighting), steps=4), 3)
    np.testing.assert_array_equal(one, two)


def test_a_constant_delta_is_amplified_by_one_over_one_minus_beta() -> None:
    strategy, state = fedavgm(momentum=0.9, server_lr=0.5), start()
    for _ in range(400):
        before = state.x
        state, _ = strategy.apply(state, mean_of([1.0, -2.0, 0.0]), window(2))
    np.testing.assert_allclose((state.x - before).numpy(), [5.0, -10.0, 0.0], rtol=1e-12)


def test_the_velocity_is_the_discounted_sum_of_all_deltas() -> None:
    strategy, state = fedavgm(momentum=0.7), start()
    deltas = np.random.default_rng(0).normal(size=(9, 3))
    for delta in deltas:
        state, _ = strategy.apply(state, mean_of(delta), window(2))
    expected = sum(0.7 ** (8 - s) * delta for s, delta in enumerate(deltas))
    np.testing.assert_allclose(state.v.numpy(), expected, atol=1e-14)


def test_an_empty_window_moves_nothing_and_does_not_decay_the_velocity() -> None:
    federation = federate(PAIR, fedavgm(), cohorts=[[0, 1], []])
    run(federation, 1)
    before = federation.state.strategy
    run(federation, 1)
    after = federation.state.strategy
    torch.testing.assert_close(after.x, before.x, rtol=0, atol=0)
    torch.testing.assert_close(after.v, before.v, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_keeps_its_dtype_and_the_velocity_has_at_least_single_precision(dtype: torch.dtype) -> None:
    state, _ = fedavgm().apply(start(dtype), mean_of([1.0, -2.0, 0.5]), window(2))
    assert (state.x.dtype, state.v.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_outside_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        fedavgm(momentum=momentum)
