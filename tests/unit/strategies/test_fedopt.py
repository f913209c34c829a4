from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.flat import ParamSpec
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.fedopt import State, fedadagrad, fedadam, fedyogi, yogi_moment
from fedsim.strategy import Strategy
from fedsim.types import Population
from tests.quadratics import ENGINES, diagonal, federate, heterogeneous, mean_of, run, window

FACTORIES: dict[str, Callable[..., Strategy]] = {
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
}
# Uniform mean delta of the first round from x = 0 with rate 0.1: (0.2, -0.1, 0).
PAIR = diagonal([[1, 1, 1], [1, 1, 1]], [[1, 0, 2], [3, -2, -2]], sizes=[1, 1])


def start(strategy: Strategy, dtype: torch.dtype = torch.float64) -> State:
    state = strategy.init(torch.zeros(3, dtype=dtype), ParamSpec(("x",), ((3,),), dtype), Population(2))
    assert isinstance(state, State)
    return state


def after(strategy: Strategy, deltas: np.ndarray | list[list[float]]) -> State:
    state = start(strategy)
    for delta in deltas:
        state, _ = strategy.apply(state, mean_of(delta), window(2))
    return state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        # m = Δ̄, v = 0.01 + Δ̄² = (0.05, 0.02, 0.01)
        (
            fedadagrad(server_lr=0.1, tau=0.1),
            [0.02 / (math.sqrt(0.05) + 0.1), -0.01 / (math.sqrt(0.02) + 0.1), 0.0],
        ),
        # m = Δ̄ / 2, v = 0.75 · 0.01 + 0.25 (0.04, 0.01, 0) = (0.0175, 0.01, 0.0075)
        (
            fedadam(server_lr=0.1, beta1=0.5, beta2=0.75, tau=0.1),
            [0.01 / (math.sqrt(0.0175) + 0.1), -0.005 / (0.1 + 0.1), 0.0],
        ),
        # m = Δ̄ / 2, v = 0.01 - 0.25 (0.04 · -1, 0.01 · 0, 0) = (0.02, 0.01, 0.01)
        (
            fedyogi(server_lr=0.1, beta1=0.5, beta2=0.75, tau=0.1),
            [0.01 / (math.sqrt(0.02) + 0.1), -0.005 / (0.1 + 0.1), 0.0],
        ),
    ],
)
def test_one_round_by_hand(engine: str, strategy: Strategy, expected: list[float]) -> None:
    x = run(federate(PAIR, strategy, engine=engine), 1)[0]
    np.testing.assert_allclose(x, expected, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("v_init", ["tau_sq", "zero"])
@pytest.mark.parametrize(
    ("name", "correction"),
    [
        ("fedadagrad", "none"),
        ("fedadagrad", "standard"),
        ("fedadam", "none"),
        ("fedadam", "standard"),
        ("fedadam", "shifted"),
        ("fedyogi", "none"),
        ("fedyogi", "standard"),
    ],
)
def test_it_follows_the_equations_round_by_round(
    engine: str, name: str, correction: str, v_init: str
) -> None:
    problem, cohorts = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), [[0, 1, 4], [2, 3, 5], [1]]
    eta, beta1, beta2, tau = 0.3, 0.8, 0.95, 0.05
    betas = {"beta1": beta1} if name == "fedadagrad" else {"beta1": beta1, "beta2": beta2}
    strategy = FACTORIES[name](server_lr=eta, tau=tau, v_init=v_init, bias_correction=correction, **betas)
    models = run(federate(problem, strategy, engine=engine, steps=3, cohorts=cohorts), 5)
    x, m = np.zeros(4), np.zeros(4)
    v = np.full(4, tau**2 if v_init == "tau_sq" else 0.0)
    for r, model in enumerate(models):
        cohort = cohorts[r % 3]
        deltas = [problem.descend(i, x, steps=3, lr=0.1) - x for i in cohort]
        d = np.average(deltas, axis=0, weights=problem.sizes[cohort])
        m = beta1 * m + (1 - beta1) * d
        if name == "fedadagrad":
            v = v + d**2
        elif name == "fedadam":
            v = beta2 * v + (1 - beta2) * d**2
        else:
            v = v - (1 - beta2) * d**2 * np.sign(v - d**2)
        rate, power = eta, r + 1 + (correction == "shifted")
        if correction != "none":
            rate /= 1 - beta1**power
            rate *= 1.0 if name == "fedadagrad" else math.sqrt(1 - beta2**power)
        x = x + rate * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(model, x, rtol=0, atol=1e-10)


def test_fedadam_with_the_standard_correction_is_torch_adam_on_the_negated_delta() -> None:
    deltas = np.random.default_rng(1).normal(size=(6, 3))
    strategy = fedadam(server_lr=0.1, tau=1e-13, v_init="zero", bias_correction="standard")
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=0.1, betas=(0.9, 0.99), eps=1e-13)
    for delta in deltas:
        weights.grad = torch.from_numpy(-delta)
        adam.step()
    np.testing.assert_allclose(after(strategy, deltas).x.numpy(), weights.detach().numpy(), atol=1e-11)


def test_fedadagrad_from_zero_is_torch_adagrad_on_the_negated_delta() -> None:
    deltas = np.random.default_rng(1).normal(size=(6, 3))
    strategy = fedadagrad(server_lr=0.1, tau=1e-10, v_init="zero")
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adagrad = torch.optim.Adagrad([weights], lr=0.1, eps=1e-10)
    for delta in deltas:
        weights.grad = torch.from_numpy(-delta)
        adagrad.step()
    np.testing.assert_allclose(after(strategy, deltas).x.numpy(), weights.detach().numpy(), atol=1e-12)


@given(
    v=st.floats(0.0, 1e6),
    squares=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20),
    beta2=st.floats(0.0, 0.999),
)
def test_the_second_moment_of_yogi_is_never_negative(v: float, squares: list[float], beta2: float) -> None:
    moment, value = yogi_moment(beta2), torch.tensor([v], dtype=torch.float64)
    for square in squares:
        value = moment(value, torch.tensor([square], dtype=torch.float64))
        assert float(value) >= 0.0


def test_after_one_window_from_zero_adam_and_yogi_coincide() -> None:
    parameters = {"server_lr": 0.1, "v_init": "zero"}
    one, two = (after(f(**parameters), [[0.3, -2.0, 0.0]]) for f in (fedadam, fedyogi))
    np.testing.assert_allclose(one.x.numpy(), two.x.numpy(), rtol=1e-15)
    np.testing.assert_allclose(one.v.numpy(), two.v.numpy(), rtol=1e-15)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_large_tau_makes_it_fedavg(name: str) -> None:
    problem, tau, c = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), 1e9, 0.7
    strategy = FACTORIES[name](server_lr=tau * c, tau=tau, beta1=0.0, v_init="zero")
    one, two = (run(federate(problem, s, steps=3), 4) for s in (strategy, fedavg(server_lr=c)))
    np.testing.assert_allclose(one, two, rtol=1e-7)


@pytest.mark.parametrize("name", FACTORIES)
def test_opposite_deltas_give_the_opposite_model(name: str) -> None:
    deltas = np.random.default_rng(2).normal(size=(5, 3))
    one, two = (after(FACTORIES[name](), sign * deltas).x.numpy() for sign in (1, -1))
    np.testing.assert_array_equal(one, -two)


@pytest.mark.parametrize("name", FACTORIES)
def test_the_scale_of_the_deltas_does_not_matter_to_the_first_step_without_tau(name: str) -> None:
    strategy = FACTORIES[name](tau=1e-30, v_init="zero")
    one, two = (after(strategy, [[0.3 * s, -2.0 * s, 1e-3 * s]]).x.numpy() for s in (1.0, 1e4))
    np.testing.assert_allclose(one, two, rtol=1e-13)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_coordinate_that_never_moved_stays_and_is_a_number(name: str) -> None:
    state = after(FACTORIES[name](v_init="zero"), [[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    assert state.x[0] == 0.0
    assert bool(torch.isfinite(state.x).all())


@pytest.mark.parametrize("name", FACTORIES)
def test_an_empty_window_changes_nothing_and_is_not_counted(name: str) -> None:
    strategy = FACTORIES[name](bias_correction="standard")
    one = run(federate(PAIR, strategy, cohorts=[[0, 1], [], [], [1]]), 4)
    two = run(federate(PAIR, strategy, cohorts=[[0, 1], [1]]), 2)
    np.testing.assert_array_equal(one[0], one[2])
    np.testing.assert_array_equal(one[3], two[1])


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_keeps_its_dtype_and_the_moments_have_at_least_single_precision(
    name: str, dtype: torch.dtype
) -> None:
    strategy = FACTORIES[name]()
    state, _ = strategy.apply(start(strategy, dtype), mean_of([1.0, -2.0, 0.5]), window(2))
    assert (state.x.dtype, state.m.dtype, state.v.dtype) == (dtype, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fedadagrad", {"tau": 0.0}),
        ("fedadam", {"beta2": 1.0}),
        ("fedyogi", {"beta1": -0.1}),
        ("fedadam", {"server_lr": float("nan")}),
    ],
)
def test_parameters_outside_their_range_are_refused(name: str, parameters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        FACTORIES[name](**parameters)
