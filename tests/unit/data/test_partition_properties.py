"""What every partitioner promises, whatever the labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.data.partition_answer import checked_division
from fedsim.data.partition_scheme import Scheme
from fedsim.registry import load, names

COVERING: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"alpha": 0.3},
    "dirichlet_client": {"alpha": 0.3},
    "shards": {},
    "pathological": {"classes_per_client": 2},
    "quantity_skew": {"beta": 0.5},
    "quantity_lognormal": {"sigma": 1.0},
    "feature_noise": {"sigma": 0.1},
    "natural": {},
}
EQUAL_SIZES = ("iid", "dirichlet_client", "feature_noise")


def divided(
    name: str, labels: np.ndarray, clients: int, *, seed: int = 0, **params: Any
) -> tuple[np.ndarray, np.ndarray]:
    partitioner = load("partitioners", name)(**params)
    scheme = partitioner if isinstance(partitioner, Scheme) else Scheme(partitioner)
    owners = (np.arange(len(labels)) * 7) % clients
    answer = scheme(labels, owners, clients, np.random.default_rng(seed))
    return checked_division(answer, labels, clients, scheme, name)


@st.composite
def label_arrays(draw: Callable[..., Any]) -> np.ndarray:
    n = draw(st.integers(1, 300))
    classes = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**32))
    # Gaps between the values: a partitioner must not assume that every class occurs.
    gap: int = draw(st.integers(1, 5))
    labels: np.ndarray = np.random.default_rng(seed).integers(0, classes, n) * gap
    return labels


def test_every_built_in_partitioner_is_covered_by_these_tests() -> None:
    built_in = {n for n in names("partitioners") if load("partitioners", n).__module__.startswith("fedsim.")}
    assert built_in == {*COVERING, "fixed_size", "flower"}


@pytest.mark.parametrize("name", COVERING)
@given(labels=label_arrays(), clients=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_example_has_exactly_one_client(name: str, labels: np.ndarray, clients: int, seed: int) -> None:
    params = COVERING[name]
    if name == "pathological":
        occurring = len(np.unique(labels))
        params = {"classes_per_client": min(occurring, max(2, -(-occurring // clients)))}
    index, offsets = divided(name, labels, clients, seed=seed, **params)
    assert np.array_equal(np.sort(index), np.arange(len(labels)))
    assert offsets[0] == 0
    assert offsets[-1] == len(labels)
    assert (np.diff(offsets) >= 0).all()
    assert index.dtype == offsets.dtype == np.int64


@pytest.mark.parametrize("name", EQUAL_SIZES)
@given(labels=label_arrays(), clients=st.integers(1, 40))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sizes_differ_by_at_most_one_where_equal_sizes_are_promised(
    name: str, labels: np.ndarray, clients: int
) -> None:
    sizes = np.diff(divided(name, labels, clients, **COVERING[name])[1])
    assert sizes.max() - sizes.min() <= 1


@given(
    n=st.integers(1, 60),
    clients=st.integers(1, 50),
    data=st.data(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fixed_size_gives_different_rows_and_uses_all_rows_evenly(
    n: int, clients: int, data: st.DataObject, seed: int
) -> None:
    examples = data.draw(st.integers(1, n))
    index, offsets = divided("fixed_size", np.zeros(n, np.int64), clients, seed=seed, examples=examples)
    hands = index.reshape(clients, examples)
    assert (np.diff(offsets) == examples).all()
    assert all(len(set(hand)) == examples for hand in hands.tolist())
    used = np.bincount(index, minlength=n)
    assert used.max() - used.min() <= 1


@pytest.mark.parametrize("name", [*COVERING, "fixed_size"])
def test_the_same_seed_gives_the_same_division_and_another_seed_another(name: str) -> None:
    labels = np.arange(500) % 10
    params = COVERING.get(name, {"examples": 8})
    first, again, other = (divided(name, labels, 20, seed=seed, **params) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    if name != "natural":
        assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("name", [*COVERING, "fixed_size"])
def test_no_partitioner_draws_from_the_global_generator(name: str) -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    divided(name, np.arange(300) % 10, 10, **COVERING.get(name, {"examples": 8}))
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


# Made by `division_digest` below with NumPy 2.4.6; they fix what a partition seed means. If a new
# NumPy changes its distributions, the digests change with it and the changelog says so.
GOLDEN = {
    "iid": "0887c18f23ae3f33",
    "dirichlet": "2354835f95681ed9",
    "dirichlet_client": "235d66471636059f",
    "shards": "3ca83f1994c7ffbf",
    "pathological": "55019c4b384dcc3d",
    "quantity_skew": "3382de320f5f994d",
    "quantity_lognormal": "e02a24657176a449",
    "feature_noise": "0887c18f23ae3f33",
    "natural": "f6fab74056aa278c",
    "fixed_size": "d4b12c886f453edb",
}


def division_digest(name: str) -> str:
    params = COVERING.get(name, {"examples": 8})
    index, offsets = divided(name, (np.arange(1000) ** 2) % 11, 30, seed=7, **params)
    return hashlib.sha256(index.astype("<i8").tobytes() + offsets.astype("<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", [*COVERING, "fixed_size"])
def test_a_seed_keeps_its_meaning(name: str) -> None:
    assert division_digest(name) == GOLDEN[name]
