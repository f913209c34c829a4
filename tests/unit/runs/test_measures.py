from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsim.runs import measures
from fedsim.runs.numbers import in_bytes, in_time, short, some


def test_a_series_has_only_finite_values_and_of_a_repeated_round_the_last() -> None:
    records: list[dict[str, Any]] = [
        {"round": 0, "accuracy": 0.1},
        {"round": 1, "accuracy": None},
        {"round": 2},
        {"round": 3, "accuracy": 0.5},
        {"round": 3, "accuracy": 0.6},
        {"round": 4, "accuracy": math.nan},
    ]
    found = measures.series(records, "accuracy")
    assert found.rounds.tolist() == [0, 3]
    assert found.values.tolist() == [0.1, 0.6]
    assert not measures.series(records, "loss")


def test_the_best_of_a_loss_is_the_smallest_and_of_equal_ones_the_earliest() -> None:
    records = [{"round": k, "loss": v, "accuracy": v} for k, v in enumerate([2.0, 1.0, 3.0, 1.0, 3.0])]
    assert measures.best(records, "loss") == (1, 1.0)
    assert measures.best(records, "accuracy") == (2, 3.0)
    assert measures.best(records, "auc") is None


def test_bytes_of_failed_attempts_count_as_well() -> None:
    records: list[dict[str, Any]] = [
        {"round": 1, "bytes_up": 5, "outcome": "failed"},
        {"round": 1, "bytes_up": 7},
        {"round": 2},
    ]
    found = measures.totals(records, "bytes_up")
    assert dict(zip(found.rounds.tolist(), found.values.tolist(), strict=True)) == {1.0: 12.0, 2.0: 0.0}
    cost = measures.cost([*records, {"round": 3, "outcome": "failed"}])
    assert (cost.rounds, cost.failed, cost.bytes_up) == (2, 2, 12)


def test_fairness_of_twenty_clients_by_hand() -> None:
    values = np.arange(20) / 20  # 0, 0.05, … 0.95
    found = measures.fairness(values[::-1])
    assert found is not None
    assert found.tenth == 2
    assert found.worst == pytest.approx(0.025)
    assert found.mean == pytest.approx(0.475)
    assert found.spread == pytest.approx(math.sqrt((20**2 - 1) / 12) / 20)
    assert found.values.tolist() == values.tolist()


def test_the_worst_clients_by_loss_are_those_with_the_largest() -> None:
    found = measures.fairness([1.0, 5.0, 2.0], smaller_better=True)
    assert found is not None
    assert found.worst == 5.0
    assert found.values.tolist() == [5.0, 2.0, 1.0]


def test_clients_without_a_value_are_counted_apart() -> None:
    found = measures.fairness([0.5, math.nan, 0.7])
    assert found is not None
    assert (len(found.values), found.without) == (2, 1)
    assert measures.fairness([math.nan]) is None
    assert measures.fairness([]) is None


def test_the_main_metric_is_the_first_of_the_run_else_what_was_recorded() -> None:
    assert measures.main_metric({"metrics": ["perplexity", "loss"]}, []) == "perplexity"
    assert measures.main_metric({}, [{"round": 0, "accuracy": 0.1}]) == "accuracy"
    assert measures.main_metric({}, [{"round": 0, "loss": 0.1}]) == "loss"


def test_numbers_are_short_and_readable() -> None:
    assert [short(v) for v in (0.123456, 12345, 1e-5, None, "ok", math.inf, 0.0)] == [
        "0.1235", "12,345", "1.000e-05", "–", "ok", "inf", "0",
    ]  # fmt: skip
    assert [in_bytes(v) for v in (0, 999, 6653480, 3.3e9, 2e12)] == [
        "0 B",
        "999 B",
        "6.65 MB",
        "3.3 GB",
        "2 TB",
    ]
    assert [in_time(v) for v in (0.04, 59.96, 245, 7830)] == ["0.0 s", "60.0 s", "4 min 05 s", "2 h 10 min"]
    assert some([1, 2, 3]) == "1, 2, 3"
    assert some(list(range(1, 41))) == "1, 2, 3, 4, 5 … 40 (40 in all)"
