"""The default configuration learns, whatever the seed."""

from __future__ import annotations

import statistics

import pytest

import fedsim


@pytest.mark.slow
def test_the_default_configuration_reaches_its_accuracy_over_five_seeds() -> None:
    finals = []
    for seed in range(1, 6):
        records = list(fedsim.Simulation(seed=seed))
        finals.append(records[-1]["accuracy"])
    assert statistics.median(finals) >= 0.95
    assert min(finals) >= 0.93
