"""Mini-batches: every example once a pass, and nobody's draw depends on anybody else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.batching import batch_positions, batches_per_epoch, pass_positions, step_counts
from fedsim.local import LocalSpec
from fedsim.types import Ids

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6)


def draw(
    ids: Ids, sizes: Ids, spec: LocalSpec, *, limit: Ids | None = None, window: int = 3
) -> list[list[list[int]]]:
    """Per client, per step, the positions without padding."""
    steps = step_counts(sizes, spec, limit)
    positions = batch_positions(1, window, ids, sizes, spec, steps)
    return [
        [[p for p in row if p >= 0] for row in client[:count]]
        for client, count in zip(positions.tolist(), steps.tolist(), strict=True)
    ]


@settings(deadline=None)
@given(sizes=SIZES, batch_size=st.integers(0, 7), epochs=st.integers(1, 3))
def test_every_example_occurs_once_in_every_pass_and_the_short_batch_is_kept(
    sizes: list[int], batch_size: int, epochs: int
) -> None:
    ids, n = np.arange(len(sizes)), np.array(sizes)
    spec = LocalSpec(epochs=epochs, batch_size=batch_size)
    for size, client in zip(sizes, draw(ids, n, spec), strict=True):
        width = batch_size or max(size, 1)
        per_pass = -(-size // width)
        assert len(client) == epochs * per_pass
        for epoch in range(epochs):
            batches = client[epoch * per_pass : (epoch + 1) * per_pass]
            assert sorted(p for b in batches for p in b) == list(range(size))
            assert [len(b) for b in batches] == [width] * (size // width) + (
                [size % width] if size % width else []
            )


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=2, max_size=6),
    mode=st.sampled_from([{"epochs": 2}, {"steps": 5}, {"steps": 1}]),
    batch_size=st.integers(0, 5),
    limits=st.lists(st.integers(1, 9), min_size=6, max_size=6) | st.none(),
    data=st.data(),
)
def test_a_client_sees_the_same_batches_in_any_block_and_order(
    sizes: list[int], mode: dict[str, int], batch_size: int, limits: list[int] | None, data: st.DataObject
) -> None:
    n, ids = np.array(sizes), np.arange(len(sizes)) * 7
    spec = LocalSpec(batch_size=batch_size, **mode)  # type: ignore[arg-type]
    limit = None if limits is None else np.array(limits[: len(sizes)])
    whole = draw(ids, n, spec, limit=limit)
    rows = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(1, len(sizes)))]
    some = draw(ids[rows], n[rows], spec, limit=None if limit is None else limit[rows])
    assert some == [whole[row] for row in rows]


def test_a_client_without_examples_beside_others_takes_no_step() -> None:
    assert draw(np.arange(3), np.array([0, 5, 0]), LocalSpec(epochs=1, batch_size=5))[0::2] == [[], []]


def test_steps_go_on_over_passes_and_reshuffle_at_each() -> None:
    (client,) = draw(np.array([0]), np.array([6]), LocalSpec(steps=7, batch_size=2))
    assert len(client) == 7
    passes = [client[0:3], client[3:6]]
    assert all(sorted(sum(p, [])) == list(range(6)) for p in passes)
    assert passes[0] != passes[1]


def test_batch_size_zero_is_all_data_at_each_step() -> None:
    clients = draw(np.arange(2), np.array([3, 5]), LocalSpec(steps=4, batch_size=0))
    assert [[sorted(b) for b in c] for c in clients] == [[[0, 1, 2]] * 4, [[0, 1, 2, 3, 4]] * 4]


def test_rounds_clients_and_seeds_shuffle_differently() -> None:
    spec, n = LocalSpec(batch_size=20), np.array([20])

    def order(seed: int, window: int, client: int) -> tuple[int, ...]:
        steps = step_counts(n, spec)
        return tuple(batch_positions(seed, window, np.array([client]), n, spec, steps)[0, 0].tolist())

    names = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({order(*name) for name in names}) == len(names)
    assert order(0, 0, 0) == order(0, 0, 0)


def test_each_order_of_three_examples_is_equally_likely() -> None:
    ids = np.arange(6000)
    positions = batch_positions(0, 0, ids, np.full(6000, 3), LocalSpec(batch_size=3), np.ones(6000, np.int64))
    codes = positions[:, 0] @ np.array([9, 3, 1])
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 6
    # 5 degrees of freedom, quantile 0.999.
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(4, [0, 1, 1, 2]), (0, [0, 1, 1, 1]), (1, [0, 1, 4, 5])]
)
def test_batches_of_a_pass_are_counted_rounding_up(batch_size: int, expected: list[int]) -> None:
    assert batches_per_epoch(np.array([0, 1, 4, 5]), LocalSpec(batch_size=batch_size)).tolist() == expected


def test_steps_are_passes_or_a_number_or_a_limit_and_none_without_examples() -> None:
    n = np.array([0, 5, 8])
    assert step_counts(n, LocalSpec(epochs=3, batch_size=4)).tolist() == [0, 6, 6]
    assert step_counts(n, LocalSpec(epochs=3, steps=2, batch_size=4)).tolist() == [0, 2, 2]
    assert step_counts(n, LocalSpec(epochs=3, batch_size=4), np.array([1, 1, 4])).tolist() == [0, 1, 4]


@settings(deadline=None)
@given(sizes=SIZES, batch_size=st.integers(0, 7))
def test_a_full_pass_takes_every_example_once_in_order(sizes: list[int], batch_size: int) -> None:
    positions = pass_positions(np.array(sizes), LocalSpec(batch_size=batch_size))
    for size, client in zip(sizes, positions, strict=True):
        assert client[client >= 0].tolist() == list(range(size))
