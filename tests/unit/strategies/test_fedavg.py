from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.flat import ParamSpec
from fedsim.local import LocalSpec
from fedsim.strategies.fedavg import fedavg
from fedsim.types import Population
from tests.quadratics import ENGINES, Quadratics, diagonal, federate, heterogeneous, run

# At x = 0 the gradients are (-1, 0, -2) and (-3, 2, 0); one step of rate 0.1 gives the deltas
# (0.1, 0, 0.2) and (0.3, -0.2, 0). The clients hold 1 and 3 examples.
PAIR = diagonal([[1, 2, 1], [1, 1, 2]], [[1, 0, 2], [3, -2, 0]], sizes=[1, 3])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("examples", [0.25, -0.15, 0.05]),  # (Δ0 + 3 Δ1) / 4
        ("uniform", [0.2, -0.1, 0.1]),  # (Δ0 + Δ1) / 2
        ("population", [0.2, -0.1, 0.1]),  # p_i N / |S| = 1/2 · 2 / 2
        ("all", [0.2, -0.1, 0.1]),  # 1 / N
    ],
)
def test_one_round_by_hand(engine: str, weighting: str, expected: list[float]) -> None:
    x = run(federate(PAIR, fedavg(weighting=weighting), engine=engine), 1)[0]
    np.testing.assert_allclose(x, expected, atol=1e-15)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"weighting": "examples"}, [0.3, -0.2, 0.0]),
        ({"weighting": "population"}, [0.3, -0.2, 0.0]),  # 1/2 · 2 / 1
        ({"weighting": "all"}, [0.15, -0.1, 0.0]),  # Δ1 / 2
        ({"weighting": "population", "importance": "examples"}, [0.45, -0.3, 0.0]),  # 3/4 · 2 / 1
        ({"weighting": "uniform", "server_lr": 0.5}, [0.15, -0.1, 0.0]),
    ],
)
def test_one_of_two_clients_by_hand(parameters: dict[str, object], expected: list[float]) -> None:
    x = run(federate(PAIR, fedavg(**parameters), cohorts=[[1]]), 1)[0]
    np.testing.assert_allclose(x, expected, atol=1e-15)


def test_population_weights_are_unbiased_over_all_cohorts_of_one_size() -> None:
    problem = heterogeneous(clients=4, sizes=[1, 2, 3, 4])
    everybody = run(federate(problem, fedavg(weighting="examples"), steps=3), 1)[0]
    pairs = [[i, j] for i in range(4) for j in range(i)]
    strategy = fedavg(weighting="population", importance="examples")
    each = [run(federate(problem, strategy, steps=3, cohorts=[pair]), 1)[0] for pair in pairs]
    np.testing.assert_allclose(np.mean(each, axis=0), everybody, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_follows_the_average_of_the_models_round_by_round(engine: str) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    cohorts, limits = [[0, 1, 4], [2, 3, 5], [1]], {1: 2, 4: 1}
    models = run(federate(problem, fedavg(), engine=engine, steps=5, cohorts=cohorts, limits=limits), 6)
    x = np.zeros(4)
    for r, model in enumerate(models):
        cohort = cohorts[r % 3]
        local = [problem.descend(i, x, steps=limits.get(i, 5), lr=0.1) for i in cohort]
        x = np.average(local, axis=0, weights=problem.sizes[cohort])
        np.testing.assert_allclose(model, x, rtol=0, atol=1e-10)


def test_relabelled_clients_give_the_same_model() -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    order = np.array([3, 0, 5, 1, 4, 2])
    other = Quadratics(problem.A[order], problem.b[order], problem.sizes[order])
    one, two = (run(federate(p, fedavg(), steps=4), 3) for p in (problem, other))
    np.testing.assert_allclose(one, two, atol=1e-13)


def test_a_shift_of_everything_shifts_the_model() -> None:
    problem, shift = heterogeneous(), np.array([5.0, -1.0, 2.0, 0.5])
    moved = Quadratics(problem.A, problem.b + shift, problem.sizes)
    one = run(federate(problem, fedavg(), steps=4), 3)
    two = run(federate(moved, fedavg(), steps=4, x0=shift), 3)
    np.testing.assert_allclose(two, one + shift, atol=1e-12)


def test_clients_that_agree_are_followed_exactly() -> None:
    one = heterogeneous(clients=1)
    same = Quadratics(one.A.repeat(3, axis=0), one.b.repeat(3, axis=0), np.array([1, 5, 2]))
    x = run(federate(same, fedavg(), steps=4), 1)[0]
    np.testing.assert_allclose(x, one.descend(0, np.zeros(4), steps=4, lr=0.1), atol=1e-14)


def test_one_full_step_is_gradient_descent_on_all_data() -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    models = run(federate(problem, fedavg(), spec=LocalSpec(epochs=1, batch_size=0, lr=0.2)), 4)
    x, share = np.zeros(4), problem.sizes / problem.sizes.sum()
    for model in models:
        x = x - 0.2 * sum(p * problem.gradient(i, x) for i, p in enumerate(share))
        np.testing.assert_allclose(model, x, atol=1e-13)


def test_a_client_without_examples_is_dropped() -> None:
    problem = heterogeneous(clients=3)
    without = Quadratics(problem.A, problem.b, np.array([2, 0, 1]))
    federation = federate(without, fedavg(weighting="uniform"), steps=4)
    outcome = federation.run_window()
    assert (outcome.record["received"], outcome.record["refused"]) == (2, 1)
    expected = run(federate(problem, fedavg(weighting="uniform"), steps=4, cohorts=[[0, 2]]), 1)[0]
    np.testing.assert_array_equal(federation.model.numpy(), expected)


def test_the_only_participant_becomes_the_model() -> None:
    problem = heterogeneous()
    x = run(federate(problem, fedavg(), steps=7, cohorts=[[2]]), 1)[0]
    np.testing.assert_allclose(x, problem.descend(2, np.zeros(4), steps=7, lr=0.1), rtol=1e-15)


def test_an_empty_window_leaves_the_model() -> None:
    models = run(federate(heterogeneous(), fedavg(weighting="all"), cohorts=[[0, 1], []]), 2)
    np.testing.assert_array_equal(models[0], models[1])


def test_importance_by_examples_needs_the_number_of_examples() -> None:
    strategy = fedavg(weighting="population", importance="examples")
    with pytest.raises(ConfigError, match="number of examples of every registered client"):
        strategy.init(torch.zeros(3), ParamSpec(("x",), ((3,),), torch.float32), Population(5))


def test_an_infinite_server_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="server_lr"):
        fedavg(server_lr=float("inf"))
