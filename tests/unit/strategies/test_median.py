from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedsim.reduce import Rows
from fedsim.strategies.fedavg import State, fedavg
from fedsim.strategies.median import column_median, median
from fedsim.types import UpdateBlock
from tests.quadratics import ENGINES, Quadratics, diagonal, federate, heterogeneous, run, window

# Deltas of one step of rate 0.1 from x = 0: a tenth of the optima.
TRIPLE = diagonal([[1, 1, 1]] * 3, [[1, 0, 2], [3, -2, 0], [-50, -1, 1]], sizes=[1, 9, 1])
matrices = arrays(
    np.float64, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(-1e6, 1e6, width=32)
)


def rows_of(*blocks: tuple[list[int], np.ndarray]) -> Rows:
    """What the reducer hands over of answers that came in these blocks of (ids, deltas)."""
    rows = Rows()
    for ids, deltas in blocks:
        b, none = len(ids), np.zeros(len(ids), np.int64)
        vectors = {"delta": torch.from_numpy(deltas)}
        rows.add(
            UpdateBlock(np.array(ids), none, none + 1, none + 1, none + 0.1, none + 0.0, vectors), np.ones(b)
        )
    return rows


@pytest.mark.parametrize("engine", ENGINES)
def test_three_clients_by_hand(engine: str) -> None:
    x = run(federate(TRIPLE, median(), engine=engine), 1)[0]
    np.testing.assert_allclose(x, [0.1, -0.1, 0.1], atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_of_an_even_number_it_is_the_mean_of_the_middle_two(engine: str) -> None:
    x = run(federate(TRIPLE, median(server_lr=0.5), engine=engine, cohorts=[[0, 1]]), 1)[0]
    np.testing.assert_allclose(x, [0.1, -0.05, 0.05], atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_follows_numpy_round_by_round(engine: str) -> None:
    problem, cohorts = (
        heterogeneous(sizes=[4, 1, 3, 2, 5, 2]),
        [[0, 1, 4], [2, 3, 5, 0], [1], [0, 1, 2, 3, 4, 5]],
    )
    federation = federate(problem, median(server_lr=0.9), engine=engine, steps=4, cohorts=cohorts, block=2)
    x = np.zeros(4)
    for r, model in enumerate(run(federation, 8)):
        deltas = [problem.descend(i, x, steps=4, lr=0.1) - x for i in cohorts[r % 4]]
        x = x + 0.9 * np.median(deltas, axis=0)
        np.testing.assert_allclose(model, x, rtol=0, atol=1e-10)


def test_one_or_two_clients_are_uniform_fedavg() -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    cohorts = [[0, 1], [4], [2, 5]]
    one, two = (
        run(federate(problem, s, steps=4, cohorts=cohorts), 3)
        for s in (median(), fedavg(weighting="uniform"))
    )
    np.testing.assert_allclose(one, two, atol=1e-14)


@given(matrix=matrices)
def test_it_is_the_median_of_every_column(matrix: np.ndarray) -> None:
    np.testing.assert_allclose(column_median(torch.from_numpy(matrix)), np.median(matrix, axis=0), rtol=1e-15)


@given(matrix=matrices, outlier=st.floats(-1e12, 1e12), data=st.data())
def test_fewer_than_half_arbitrary_rows_stay_within_the_range_of_the_others(
    matrix: np.ndarray, outlier: float, data: st.DataObject
) -> None:
    n = len(matrix)
    bad = data.draw(st.permutations(range(n)))[: (n - 1) // 2]
    honest = np.delete(matrix, bad, axis=0)
    attacked = matrix.copy()
    attacked[bad] = outlier
    found = column_median(torch.from_numpy(attacked)).numpy()
    assert (found >= honest.min(axis=0)).all()
    assert (found <= honest.max(axis=0)).all()


def test_relabelled_clients_give_the_same_model() -> None:
    problem, order = heterogeneous(), np.array([3, 0, 5, 1, 4, 2])
    other = Quadratics(problem.A[order], problem.b[order], problem.sizes[order])
    one, two = (run(federate(p, median(), steps=4), 3) for p in (problem, other))
    np.testing.assert_array_equal(one, two)


def test_blocks_of_clients_and_blocks_of_columns_do_not_show() -> None:
    """More columns than one column block holds, answers in three blocks and not in order of id."""
    deltas = np.random.default_rng(0).normal(size=(5, 5000))
    rows = rows_of(([4, 1], deltas[[4, 1]]), ([0], deltas[[0]]), ([3, 2], deltas[[3, 2]]))
    state, _ = median().apply(State(torch.zeros(5000, dtype=torch.float64), 0), rows, window(5))
    np.testing.assert_array_equal(state.x.numpy(), np.median(deltas, axis=0))


def test_an_empty_window_leaves_the_model() -> None:
    models = run(federate(TRIPLE, median(), cohorts=[[0, 1, 2], []]), 2)
    np.testing.assert_array_equal(models[0], models[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_keeps_its_dtype(dtype: torch.dtype) -> None:
    federation = federate(heterogeneous(), median(), steps=2, dtype=dtype)
    run(federation, 2)
    assert federation.model.dtype == dtype
