"""Device models: speeds, dropouts and stragglers as functions of (seed, round, client)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedsim.simulation.devices import DeviceModel, instant, lognormal

IDS = np.arange(4000)
STEPS = np.full(4000, 20)


def test_an_instant_device_answers_at_once_and_never_fails() -> None:
    model = instant()
    assert not model.seconds(IDS, STEPS, 3).any()
    assert not model.lost(IDS, 3).any()
    assert np.array_equal(model.limit(IDS, STEPS, 3), STEPS)


@pytest.mark.parametrize(
    "model",
    [
        lognormal(spread=0.5, dropout=0.3, stragglers=0.2, seed=1),
        lognormal(spread=0.5, dropout=0.3, stragglers=0.2, partial_work=True, seed=1),
    ],
)
def test_a_device_does_not_depend_on_who_else_is_in_the_cohort(model: DeviceModel) -> None:
    some = np.random.default_rng(0).permutation(4000)[:50]
    assert np.array_equal(model.seconds(some, STEPS[:50], 2), model.seconds(IDS, STEPS, 2)[some])
    assert np.array_equal(model.lost(some, 2), model.lost(IDS, 2)[some])
    assert np.array_equal(model.limit(some, STEPS[:50], 2), model.limit(IDS, STEPS, 2)[some])


def test_speed_is_log_normal_over_devices_and_fixed_for_each() -> None:
    model = lognormal(step_seconds=0.5, spread=0.8, start_seconds=3.0)
    seconds = model.seconds(IDS, STEPS, 0)
    logs = np.log((seconds - 3.0) / (0.5 * 20))
    assert abs(logs.mean()) < 0.06
    assert abs(logs.std() - 0.8) < 0.05
    assert np.array_equal(seconds, model.seconds(IDS, STEPS, 7))
    doubled = model.seconds(IDS, 2 * STEPS, 0)
    np.testing.assert_allclose(doubled - 3.0, 2 * (seconds - 3.0), rtol=1e-12)


def test_dropouts_and_stragglers_have_their_shares_and_change_from_round_to_round() -> None:
    model = lognormal(step_seconds=1.0, dropout=0.25, stragglers=0.1, slowdown=8.0)
    lost = [model.lost(IDS, window) for window in range(2)]
    assert all(abs(row.mean() - 0.25) < 0.035 for row in lost)
    assert abs((lost[0] & lost[1]).mean() - 0.0625) < 0.02
    seconds = model.seconds(IDS, STEPS, 0)
    assert set(np.unique(seconds)) == {20.0, 160.0}
    assert abs((seconds == 160.0).mean() - 0.1) < 0.025
    # Dropping out and straggling are drawn apart.
    assert abs((lost[0] & (seconds == 160.0)).mean() - 0.025) < 0.0125


def test_a_straggler_that_does_part_of_the_work_takes_its_usual_time() -> None:
    model = lognormal(step_seconds=1.0, stragglers=0.5, slowdown=8.0, partial_work=True)
    steps = model.limit(IDS, STEPS, 0)
    assert set(np.unique(steps)) == {2, 20}
    assert steps.dtype == np.int64
    few = model.limit(IDS, np.full(4000, 3), 0)
    assert set(np.unique(few)) == {1, 3}
    assert set(np.unique(model.seconds(IDS, STEPS, 0))) == {20.0}


def test_a_client_without_data_gets_no_step_from_straggling() -> None:
    model = lognormal(stragglers=1.0, slowdown=8.0, partial_work=True)
    assert not model.limit(IDS, np.zeros(4000, np.int64), 0).any()


def test_without_a_limit_the_work_is_what_was_planned() -> None:
    model = lognormal(stragglers=1.0)
    assert np.array_equal(model.limit(IDS, STEPS, 0), STEPS)


@pytest.mark.parametrize(
    "parameters",
    [
        {"step_seconds": -1.0},
        {"spread": -0.1},
        {"start_seconds": -1.0},
        {"slowdown": 0.5},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"stragglers": 1.1},
        {"step_seconds": float("nan")},
        {"spread": float("nan")},
        {"dropout": float("nan")},
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        lognormal(**parameters)
