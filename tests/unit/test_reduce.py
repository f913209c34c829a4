"""Reduction: streamed sums in float64, and rows in client-id order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.reduce import Rows, Sums
from fedsim.strategy import fold_deltas, moved, weighted_sum
from fedsim.types import UpdateBlock


def block(ids: list[int], deltas: torch.Tensor) -> UpdateBlock:
    count = len(ids)
    return UpdateBlock(
        np.array(ids, np.int64),
        np.zeros(count, np.int64),
        np.ones(count, np.int64),
        np.ones(count, np.int64),
        np.ones(count),
        np.zeros(count),
        {"delta": deltas},
    )


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_sums_over_blocks_are_the_sum_over_all(clients: int, size: int, data: st.DataObject) -> None:
    draw = torch.Generator().manual_seed(clients * 10 + size)
    deltas = torch.randn(clients, 5, generator=draw)
    weights = np.random.default_rng(size).random(clients)
    total = Sums()
    for start in range(0, clients, size):
        ids = list(range(start, min(clients, start + size)))
        sums, rows = fold_deltas((), block(ids, deltas[ids]), weights[ids], None)
        assert rows == {}
        total.add(sums)
    result = total.result()
    assert result["delta"].dtype == torch.float64
    torch.testing.assert_close(
        result["delta"], torch.from_numpy(weights) @ deltas.double(), rtol=1e-12, atol=1e-12
    )
    assert float(result["weight"]) == pytest.approx(weights.sum(), rel=1e-12)
    assert float(result["count"]) == clients


def test_a_sum_does_not_write_into_what_was_given() -> None:
    first = torch.ones(3, dtype=torch.float64)
    total = Sums()
    total.add({"delta": first})
    total.add({"delta": first})
    assert torch.equal(first, torch.ones(3, dtype=torch.float64))
    assert torch.equal(total.result()["delta"], torch.full((3,), 2.0, dtype=torch.float64))


def test_small_updates_survive_a_large_one_of_single_precision() -> None:
    deltas = torch.tensor([[1e8], [1.0], [-1e8]], dtype=torch.float32)
    assert float(weighted_sum(np.ones(3), deltas)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weighted_sum_of_many_columns_is_a_matrix_product(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(70, 40_000, generator=draw).to(dtype)
    weights = np.random.default_rng(0).random(70)
    expected = torch.from_numpy(weights) @ rows.double()
    torch.testing.assert_close(weighted_sum(weights, rows), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moving_rounds_once_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -3.0], dtype=dtype)
    step = torch.tensor([1e-3, 2.0], dtype=torch.float64)
    assert moved(x, step).dtype == dtype
    assert torch.equal(moved(x, step), (x.double() + step).to(dtype))


@settings(deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12), st.integers(1, 9))
def test_rows_come_in_client_order_however_they_arrived(order: list[int], size: int, width: int) -> None:
    everything = torch.arange(12.0)[:, None] * 100 + torch.arange(7.0)
    rows = Rows()
    for start in range(0, 12, size):
        ids = order[start : start + size]
        rows.add(block(ids, everything[ids]), np.array(ids, np.float64) + 0.5)
    assert rows.result() is rows
    assert len(rows) == 12
    assert rows.ids.tolist() == list(range(12))
    assert rows.weights.tolist() == [i + 0.5 for i in range(12)]
    assert torch.equal(rows.matrix(), everything)
    columns = list(rows.columns(width=width))
    assert all(part.shape[1] <= width for part in columns)
    assert torch.equal(torch.cat(columns, dim=1), everything)


def test_a_block_restricted_to_rows_keeps_every_column_aligned() -> None:
    whole = UpdateBlock(
        np.array([3, 5, 8]),
        np.array([1, 1, 2]),
        np.array([10, 20, 30]),
        np.array([1, 2, 3]),
        np.array([0.1, 0.2, 0.3]),
        np.array([1.0, 2.0, 3.0]),
        {"delta": torch.arange(6.0).reshape(3, 2)},
        {"tau": torch.tensor([7.0, 8.0, 9.0])},
        {"loss": np.array([0.5, 0.6, 0.7])},
        torch.arange(3.0)[:, None],
        torch.arange(3)[:, None],
        np.array([4, 5, 6]),
    )
    for rows in (np.array([True, False, True]), np.array([0, 2])):
        part = whole.take(rows)
        assert part.ids.tolist() == [3, 8]
        assert part.base_version.tolist() == [1, 2]
        assert part.examples.tolist() == [10, 30]
        assert part.local_steps.tolist() == [1, 3]
        assert part.normaliser.tolist() == [0.1, 0.3]
        assert part.train_seconds.tolist() == [1.0, 3.0]
        assert part.vectors["delta"].tolist() == [[0.0, 1.0], [4.0, 5.0]]
        assert part.scalars["tau"].tolist() == [7.0, 9.0]
        assert part.metrics["loss"].tolist() == [0.5, 0.7]
        assert part.buffers is not None
        assert part.int_buffers is not None
        assert part.state_version is not None
        assert part.buffers.tolist() == [[0.0], [2.0]]
        assert part.int_buffers.tolist() == [[0], [2]]
        assert part.state_version.tolist() == [4, 6]
