"""Amounts with a unit."""

from __future__ import annotations

import pytest

from fedsim.units import parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90.0), ("10m", 600.0), ("10min", 600.0), ("1h30m", 5400.0), ("250ms", 0.25), ("1.5h", 5400.0)],
)
def test_times_are_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["", "10", "m", "10x", "10m!", "1h 30", "-5s", "s10"])
def test_a_text_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a time is"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "count"), [("500MB", 500_000_000), ("2GiB", 2**31), ("1 kB", 1000), ("1.5KiB", 1536), ("7B", 7)]
)
def test_sizes_are_read_in_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "5", "GiB", "5XB", "2GiB3"])
def test_a_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_bytes(text)
