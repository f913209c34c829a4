"""Sets of ids by sorting: what NumPy's own functions answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim import ids as ids_module
from fedsim.ids import among, ascending, distinct

IDS = st.lists(st.integers(-3, 8), max_size=12).map(lambda values: np.array(values, np.int64))


@given(IDS)
def test_distinct_ids_ascend(ids: np.ndarray) -> None:
    assert distinct(ids).tolist() == sorted(set(ids.tolist()))
    assert ascending(ids) == (ids.tolist() == sorted(set(ids.tolist())))


@pytest.mark.parametrize("pairs", [0, 1 << 15], ids=["by sorting", "by comparing"])
def test_among_is_membership(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_module, "_PAIRS", pairs)

    @given(IDS, IDS)
    def check(ids: np.ndarray, some: np.ndarray) -> None:
        assert among(ids, some).tolist() == np.isin(ids, some).tolist()

    check()
