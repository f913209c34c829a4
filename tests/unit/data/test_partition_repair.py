"""Filling short clients, against the rule carried out one example at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedsim.data.partition_repair import (
    fill_short_clients,
    missing_examples,
    without_clients,
)
from fedsim.data.partition_scheme import offsets_of

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=25)


def one_at_a_time(sizes: list[int], min_examples: int, *, keep_empty: bool) -> list[int]:
    """The rule in words: the largest gives one, until nobody is short."""
    now = list(sizes)
    short = [i for i, n in enumerate(now) if n < min_examples and not (keep_empty and n == 0)]
    for client in short:
        while now[client] < min_examples:
            now[now.index(max(now))] -= 1
            now[client] += 1
    return now


@given(sizes=SIZES, min_examples=st.integers(1, 8), keep_empty=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filling_ends_with_the_sizes_of_the_rule_and_moves_no_more_than_needed(
    sizes: list[int], min_examples: int, keep_empty: bool, seed: int
) -> None:
    before = np.array(sizes)
    assume(missing_examples(before, min_examples, keep_empty=keep_empty) == 0)
    offsets = offsets_of(before)
    index = np.random.default_rng(seed).permutation(int(offsets[-1]))
    filled = fill_short_clients(
        index,
        offsets,
        min_examples=min_examples,
        keep_empty=keep_empty,
        rng=np.random.default_rng(seed),
    )
    after = np.diff(filled.offsets)
    assert sorted(after) == sorted(one_at_a_time(sizes, min_examples, keep_empty=keep_empty))
    assert np.array_equal(np.sort(filled.index), np.sort(index))
    assert filled.moved == int(np.maximum(before - after, 0).sum())
    for client, size in enumerate(sizes):
        old = set(index[offsets[client] : offsets[client + 1]].tolist())
        new = set(filled.index[filled.offsets[client] : filled.offsets[client + 1]].tolist())
        assert old <= new if after[client] >= size else new < old


@given(sizes=SIZES, min_examples=st.integers(0, 8))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_rule_is_possible_exactly_when_there_are_enough_examples(
    sizes: list[int], min_examples: int
) -> None:
    lacking = missing_examples(np.array(sizes), min_examples, keep_empty=False)
    assert (lacking == 0) == (sum(sizes) >= len(sizes) * min_examples)


def test_a_filled_client_gets_the_skew_of_its_donor() -> None:
    labels = np.repeat([0, 1, 2], [100, 90, 5])
    offsets = offsets_of(np.array([100, 90, 5, 0]))
    filled = fill_short_clients(
        np.arange(195), offsets, min_examples=5, keep_empty=False, rng=np.random.default_rng(0)
    )
    got = labels[filled.index[filled.offsets[3] : filled.offsets[4]]]
    assert got.tolist() == [0] * 5


def test_dropping_clients_keeps_the_rows_of_the_others() -> None:
    index, offsets = without_clients(np.array([5, 6, 7, 8, 9]), np.array([0, 2, 2, 3, 5]), np.array([0, 3]))
    assert index.tolist() == [5, 6, 8, 9]
    assert offsets.tolist() == [0, 2, 4]
