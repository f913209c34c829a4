"""Columns become the very bytes that one record after the other would."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.runs import columns as columns_module
from fedsim.runs.columns import encode_columns
from fedsim.runs.lines import CLIENT_KEYS, encode, ordered

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
CELLS = {
    "numbers": NUMBERS,
    "whole": st.integers(-(1 << 70), 1 << 70),
    "words": st.text(max_size=6),
    "percent": st.sampled_from(["%d", "100 %", '"', "é", "\n"]),
    "holes": st.one_of(st.none(), NUMBERS, st.text(max_size=3)),
    "truth": st.one_of(st.booleans(), st.integers(0, 1)),
    "zeros": st.sampled_from([0.0, -0.0]),
    "nested": st.lists(NUMBERS, max_size=2),
}


def one_by_one(columns: dict[str, Any]) -> bytes:
    rows = zip(*columns.values(), strict=True)
    return b"".join(encode(ordered(dict(zip(columns, row, strict=True)), CLIENT_KEYS)) for row in rows)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(0, 5))
    names = draw(st.lists(st.sampled_from([*CLIENT_KEYS, "a%s", "zz", "time", "é"]), unique=True, max_size=6))
    columns: dict[str, Any] = {}
    for name in names:
        cell = CELLS[draw(st.sampled_from(sorted(CELLS)))]
        same = draw(st.booleans())
        columns[name] = [draw(cell)] * count if same else [draw(cell) for _ in range(count)]
    return columns


@settings(max_examples=300, deadline=None)
@given(tables())
def test_the_bytes_are_those_of_one_record_after_the_other(columns: dict[str, Any]) -> None:
    assert encode_columns(columns, CLIENT_KEYS) == one_by_one(columns)


def test_arrays_are_columns_too() -> None:
    columns = {
        "client": np.arange(3),
        "norm": np.array([0.1, 1e-7, 1e22]),
        "loss": np.array([1.0, math.nan, 2.0]),
        "ok": np.array([True, False, True]),
    }
    assert encode_columns(columns, CLIENT_KEYS) == one_by_one(columns)


def test_columns_of_several_numbers_each_go_the_long_way() -> None:
    for numbers in (np.arange(6).reshape(3, 2), np.ones((3, 2)), np.full((3, 1), 4)):
        columns = {"client": np.arange(3), "several": numbers, "norm": np.array([0.5, 1e-5, 3.0])}
        assert encode_columns(columns, CLIENT_KEYS) == one_by_one(columns)


def test_a_usual_round_makes_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise AssertionError("a record was made")

    columns = {"round": [4, 4], "client": [1, 9], "loss": [0.5, 0.25], "reason": [None, "late"]}
    expected = one_by_one(columns)
    monkeypatch.setattr(columns_module, "_long_way", refuse)
    assert encode_columns(columns, CLIENT_KEYS) == expected


def test_only_the_lines_that_are_not_finite_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    long_way = columns_module._long_way

    def recording(columns: Any, head: Any, row: int) -> bytes:
        taken.append(row)
        return long_way(columns, head, row)

    monkeypatch.setattr(columns_module, "_long_way", recording)
    columns = {"client": [1, 2, 3], "loss": [0.5, math.inf, 0.25]}
    assert encode_columns(columns, CLIENT_KEYS) == one_by_one(columns)
    assert taken == [1]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        encode_columns({"round": [1, 1], "client": [0]}, CLIENT_KEYS)
