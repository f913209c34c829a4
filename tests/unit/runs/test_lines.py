from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import EnvironmentProblem
from fedsim.runs import lines

Record = dict[str, Any]


def write(path: Path, records: list[Record]) -> bytes:
    lines.append(path, [lines.ordered(r, lines.ROUND_KEYS, tail=lines.ROUND_TAIL) for r in records])
    return path.read_bytes()


def test_a_value_that_is_not_finite_becomes_null_and_is_named() -> None:
    record = {
        "round": 1,
        "loss": math.nan,
        "accuracy": 0.5,
        "norms": [1.0, math.inf],
        "inner": {"x": -math.inf},
    }
    line = lines.ordered(record, lines.ROUND_KEYS)
    assert line["loss"] is None
    assert line["norms"] == [1.0, None]
    assert line["inner"] == {"x": None}
    assert line["nonfinite"] == ["inner.x", "loss", "norms.1"]


def test_names_that_were_already_listed_as_not_finite_stay_listed() -> None:
    line = lines.ordered({"round": 1, "loss": None, "auc": math.nan, "nonfinite": ["loss"]}, lines.ROUND_KEYS)
    assert line["nonfinite"] == ["auc", "loss"]


def test_a_time_that_is_not_finite_is_named_inside_time_only() -> None:
    line = lines.ordered({"round": 1, "time": {"seconds": math.nan}}, lines.ROUND_KEYS)
    assert line == {"round": 1, "time": {"seconds": None, "nonfinite": ["seconds"]}}


def test_numbers_of_numpy_become_plain_numbers() -> None:
    record = {"round": np.int64(3), "loss": np.float32(0.5), "flag": np.bool_(True), "x": np.array([1, 2])}
    assert json.loads(lines.encode(lines.ordered(record, ()))) == {
        "flag": True,
        "loss": 0.5,
        "round": 3,
        "x": [1, 2],
    }


def test_keys_stand_in_one_order_whatever_order_they_came_in(records: list[Record]) -> None:
    record = records[2] | {"zeta": 1.0, "alpha": 2.0, "nonfinite": ["auc"]}
    backwards = dict(reversed(record.items()))
    line = lines.encode(lines.ordered(backwards, lines.ROUND_KEYS, tail=lines.ROUND_TAIL))
    assert line == lines.encode(lines.ordered(record, lines.ROUND_KEYS, tail=lines.ROUND_TAIL))
    assert list(json.loads(line)) == [
        "round", "version", "outcome", "cohort", "received", "refused", "late", "lost", "accuracy", "loss",
        "train_loss", "alpha", "zeta", "bytes_down", "bytes_up", "clock_seconds", "nonfinite", "time",
    ]  # fmt: skip


def test_two_writes_of_the_same_records_are_the_same_bytes(tmp_path: Path, records: list[Record]) -> None:
    assert write(tmp_path / "a", records) == write(tmp_path / "b", records)


def test_lines_of_two_machines_are_equal_without_their_time(records: list[Record]) -> None:
    slow = records[1] | {"time": {"seconds": 99.0}}
    assert lines.encode(slow) != lines.encode(records[1])
    assert lines.without_time(lines.encode(slow)) == lines.without_time(lines.encode(records[1]))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_keeps_all_its_digits(value: float) -> None:
    assert json.loads(lines.encode({"loss": value}))["loss"] == value


@given(st.text())
def test_any_text_is_one_line_and_comes_back(text: str) -> None:
    line = lines.encode({"reason": text})
    assert line.count(b"\n") == 1
    assert lines.parse(line) == {"reason": text}


def test_a_line_torn_at_any_byte_is_repaired_and_the_lines_before_it_stay(
    tmp_path: Path, records: list[Record]
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = write(path, records)
    start = whole[:-1].rfind(b"\n") + 1
    for stop in range(start, len(whole) + 1):
        path.write_bytes(whole[:stop])
        # Only the last byte, the newline, may be missing without the record being lost.
        kept = records if stop >= len(whole) - 1 else records[:-1]
        assert lines.read(path) == kept, stop
        lines.repair(path)
        assert path.read_bytes() == (whole if kept is records else whole[:start]), stop
        assert lines.repair(path) == 0


def test_a_resumed_run_writes_the_same_bytes_after_a_line_torn_at_any_byte(
    tmp_path: Path, records: list[Record]
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = write(path, records)
    start = whole[:-1].rfind(b"\n") + 1
    for stop in range(start, len(whole) + 1):
        path.write_bytes(whole[:stop])
        lines.truncate(path, 2)
        assert lines.read(path) == records[:3]
        assert write(path, records[3:]) == whole


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\xff\xfe", b'{"round": 5', b"17\n", b"\n"])
def test_an_end_that_is_no_record_is_dropped(tmp_path: Path, records: list[Record], tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = write(path, records)
    path.write_bytes(whole + tail)
    assert lines.repair(path) == len(tail)
    assert path.read_bytes() == whole


def test_truncating_keeps_the_attempts_of_the_round_and_drops_all_later_ones(
    tmp_path: Path, records: list[Record]
) -> None:
    path = tmp_path / "metrics.jsonl"
    failed = records[2] | {"outcome": "failed"}
    write(path, [*records[:2], failed, records[2], records[3] | {"outcome": "failed"}, records[3]])
    lines.truncate(path, 2)
    assert [(r["round"], r["outcome"]) for r in lines.read(path)] == [
        (0, "start"), (1, "ok"), (2, "failed"), (2, "ok"),
    ]  # fmt: skip


def test_truncating_before_the_first_round_leaves_an_empty_file(
    tmp_path: Path, records: list[Record]
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, records)
    lines.truncate(path, -1)
    assert path.read_bytes() == b""


def test_a_file_that_is_not_there_has_no_records_and_needs_no_repair(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert lines.read(path) == []
    assert lines.repair(path) == 0
    assert lines.truncate(path, 3) == 0
    assert not path.exists()


def test_damage_before_the_last_line_is_an_error_that_names_the_line(
    tmp_path: Path, records: list[Record]
) -> None:
    path = tmp_path / "metrics.jsonl"
    parts = write(path, records).splitlines(keepends=True)
    parts[1] = b"{broken}\n"
    path.write_bytes(b"".join(parts))
    for act in (lines.read, lines.repair):
        with pytest.raises(EnvironmentProblem) as caught:
            act(path)
        assert caught.value.code == "FS-ENV-023"
        assert caught.value.where is not None
        assert caught.value.where.endswith("line 2")
    assert path.read_bytes() == b"".join(parts)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        lines.read(tmp_path)  # a folder
    assert caught.value.code == "FS-ENV-024"


@pytest.mark.parametrize(
    ("value", "lacking"), [(float("nan"), ["time"]), ([float("inf")], ["time.0"]), (None, None), (1.5, None)]
)
def test_a_metric_of_the_users_own_may_be_called_time(value: Any, lacking: list[str] | None) -> None:
    record = lines.ordered({"round": 1, "time": value}, ("round",))
    assert record.get("nonfinite") == lacking
    assert lines.encode(record)
