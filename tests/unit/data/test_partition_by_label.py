"""Label skew: distributions against their moments, limits of the concentration, decks, shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.data.partition_by_label import dirichlet, dirichlet_client, pathological, shards
from fedsim.data.partition_scheme import Divide, log_gamma_draws, normalised, proportional_sizes
from fedsim.errors import ConfigError

MNIST_LIKE = np.random.default_rng(0).integers(0, 10, 60_000)


def counts(divide: Divide, labels: np.ndarray, clients: int, *, seed: int = 0) -> np.ndarray:
    """[N, K] examples of each class at each client."""
    assignment = divide(labels, None, clients, np.random.default_rng(seed))
    assert isinstance(assignment, np.ndarray)
    classes = int(labels.max()) + 1
    flat = np.bincount(assignment * classes + labels, minlength=clients * classes)
    return flat.reshape(clients, classes)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_shares_of_a_class_have_the_variance_of_the_distribution(alpha: float) -> None:
    labels = np.repeat(np.arange(400), 1000)
    shares = counts(dirichlet(alpha=alpha), labels, 10) / 1000
    assert shares.sum(axis=0) == pytest.approx(np.ones(400))
    # Var p = (N - 1) / (N^2 (N alpha + 1)) for N = 10 clients; 4,000 shares estimate it.
    expected = 9 / (100 * (10 * alpha + 1))
    assert shares.var() == pytest.approx(expected, rel=0.1)


def test_dirichlet_client_mixes_have_the_concentration_of_the_distribution() -> None:
    labels = np.repeat(np.arange(10), 20_000)
    mixes = counts(dirichlet_client(alpha=1.0), labels, 1000) / 200
    # E sum q^2 = (alpha + 1) / (K alpha + 1), plus (1 - that) / 200 from 200 draws per client.
    clean = 2 / 11
    expected = clean + (1 - clean) / 200
    assert (mixes**2).sum(axis=1).mean() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("factory", [dirichlet, dirichlet_client])
def test_a_huge_alpha_approaches_iid(factory: type) -> None:
    histogram = counts(factory(alpha=1e7), np.repeat(np.arange(10), 2000), 10)
    spread = np.abs(histogram - 200)
    # By class only rounding is left; by client the classes are still drawn (4 deviations of 13).
    assert spread.max() <= (1 if factory is dirichlet else 54)


def test_a_small_alpha_concentrates_each_class_on_few_clients() -> None:
    histogram = counts(dirichlet(alpha=0.01), MNIST_LIKE, 20)
    assert (histogram.max(axis=0) / histogram.sum(axis=0)).mean() > 0.8


def test_a_small_alpha_concentrates_each_client_on_few_classes() -> None:
    histogram = counts(dirichlet_client(alpha=0.01), MNIST_LIKE, 200)
    # Not all: the examples handed out last come from the classes that are left.
    assert np.median(histogram.max(axis=1) / histogram.sum(axis=1)) > 0.8


@pytest.mark.parametrize("alpha", [1e-300, 1e-8, 1e8])
@pytest.mark.parametrize("factory", [dirichlet, dirichlet_client])
def test_extreme_alphas_still_assign_every_example(factory: type, alpha: float) -> None:
    assert counts(factory(alpha=alpha), np.arange(500) % 7, 30).sum() == 500


def test_log_gamma_draws_have_the_mean_of_the_gamma_distribution() -> None:
    draws = np.exp(log_gamma_draws(0.5, 200_000, np.random.default_rng(0)))
    assert draws.mean() == pytest.approx(0.5, rel=0.02)
    assert draws.var() == pytest.approx(0.5, rel=0.03)


@given(logs=st.lists(st.floats(-1e6, 1e3), min_size=1, max_size=50), total=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_proportional_sizes_sum_exactly_and_stay_within_one(logs: list[float], total: int) -> None:
    shares = normalised(np.array(logs))
    sizes = proportional_sizes(shares, total)
    assert sizes.sum() == total
    assert (sizes >= 0).all()
    assert np.abs(sizes - shares * total).max() <= 1 + 1e-6


def test_shards_are_the_split_of_the_fedavg_paper() -> None:
    histogram = counts(shards(), np.repeat(np.arange(10), 6000), 100)
    assert (histogram.sum(axis=1) == 600).all()
    # 200 shards of 300 from classes of 6,000: every shard holds one class.
    assert set(np.unique(histogram)) <= {0, 300, 600}
    assert ((histogram > 0).sum(axis=1) <= 2).all()


@pytest.mark.parametrize("shards_per_client", [1, 3])
def test_shards_divide_unequal_classes_into_equal_sizes(shards_per_client: int) -> None:
    sizes = counts(shards(shards_per_client=shards_per_client), MNIST_LIKE, 37).sum(axis=1)
    assert sizes.max() - sizes.min() <= shards_per_client


@given(
    classes=st.integers(1, 30),
    clients=st.integers(1, 80),
    data=st.data(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pathological_clients_own_exactly_that_many_classes(
    classes: int, clients: int, data: st.DataObject, seed: int
) -> None:
    each = data.draw(st.integers(-(-classes // clients), classes))
    labels = np.repeat(np.arange(classes), 100)  # enough for an example of each to every owner
    histogram = counts(pathological(classes_per_client=each), labels, clients, seed=seed)
    assert ((histogram > 0).sum(axis=1) == each).all()
    owners = (histogram > 0).sum(axis=0)
    assert owners.max() - owners.min() <= 1
    for column in histogram.T:
        held = column[column > 0]
        assert held.max() - held.min() <= 1


def test_pathological_clients_do_not_all_own_neighbouring_classes() -> None:
    histogram = counts(pathological(classes_per_client=2), MNIST_LIKE, 500) > 0
    pairs = {tuple(np.flatnonzero(row)) for row in histogram}
    assert len(pairs) == 45  # every pair of ten classes


def test_more_classes_per_client_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="classes_per_client") as caught:
        pathological(classes_per_client=11)(MNIST_LIKE, None, 5, np.random.default_rng(0))
    assert caught.value.code == "FS-DAT-044"


def test_too_few_clients_for_all_classes_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        pathological(classes_per_client=2)(MNIST_LIKE, None, 4, np.random.default_rng(0))
    assert "at least 3" in str(caught.value.why)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), True, "0.3"])
@pytest.mark.parametrize("factory", [dirichlet, dirichlet_client])
def test_an_alpha_that_is_no_positive_number_is_refused(factory: type, alpha: object) -> None:
    with pytest.raises(ConfigError) as caught:
        factory(alpha=alpha)
    assert caught.value.code == "FS-DAT-044"
    assert caught.value.where == "data.partition.alpha"
