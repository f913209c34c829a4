"""Who could take part: shares, periods, and independence of who else is asked."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.availability import Availability, always, bernoulli, cyclic

MODELS = {
    "always": always(),
    "bernoulli": bernoulli(probability=0.3, seed=1),
    "cyclic": cyclic(period=10, share=0.3, seed=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_answer_for_a_client_does_not_depend_on_who_else_is_asked(name: str) -> None:
    model: Availability = MODELS[name]
    ids = np.arange(50)
    order = np.random.default_rng(0).permutation(50)[:20]
    for window in range(5):
        whole = model(ids, window)
        assert whole.dtype == bool
        assert np.array_equal(model(order, window), whole[order])
        assert np.array_equal(model(ids, window), whole)


def test_always_is_everyone() -> None:
    assert MODELS["always"](np.arange(5), 3).all()


def test_bernoulli_has_its_share_in_every_round_and_rounds_are_independent() -> None:
    there = np.stack([MODELS["bernoulli"](np.arange(4000), window) for window in range(20)])
    # Standard deviation of one round's share: 0.0072.
    assert (np.abs(there.mean(axis=1) - 0.3) < 0.033).all()
    both = (there[1:] & there[:-1]).mean()
    assert abs(both - 0.09) < 0.006


def test_a_cycle_is_on_for_consecutive_rounds_of_every_period() -> None:
    there = np.stack([MODELS["cyclic"](np.arange(200), window) for window in range(30)])
    assert np.array_equal(there[:10], there[10:20])
    assert (there[:10].sum(axis=0) == 3).all()
    for client in there.T:
        starts = np.flatnonzero(client[1:11] & ~client[:10])
        assert len(starts) == 1
    phases = {tuple(client[:10]) for client in there.T}
    assert len(phases) == 10


def test_a_small_share_of_a_period_is_still_one_round() -> None:
    there = np.stack([cyclic(period=4, share=0.01)(np.arange(30), window) for window in range(4)])
    assert (there.sum(axis=0) == 1).all()


def test_other_seeds_are_other_clients() -> None:
    ids = np.arange(100)
    for make in (lambda s: bernoulli(probability=0.5, seed=s), lambda s: cyclic(period=5, share=0.4, seed=s)):
        assert not np.array_equal(make(0)(ids, 0), make(1)(ids, 0))


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, float("nan")])
def test_a_probability_outside_its_range_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        bernoulli(probability=probability)


@pytest.mark.parametrize(("period", "share"), [(0, 0.5), (5, 0.0), (5, 1.1), (5, float("nan"))])
def test_a_cycle_out_of_range_is_refused(period: int, share: float) -> None:
    with pytest.raises(ValueError, match="period"):
        cyclic(period=period, share=share)
