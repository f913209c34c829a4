"""JSON lines: one record per line, appended whole, readable after a kill at any byte.

Values that JSON cannot hold are null, and their names stand in ``nonfinite``. What depends on the
machine is in the sub-object ``time`` and nowhere else, so that a line without it is the same bytes
whenever the run is the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import EnvironmentProblem
from fedsim.storage import append_whole, problem, unreadable

Record = dict[str, Any]  # Any: whatever JSON holds

ROUND_KEYS = (
    "round", "version", "outcome", "cohort", "received", "refused", "late", "lost",
    "accuracy", "loss", "train_loss",
)  # fmt: skip
"""Keys of a round that come first, in this order."""
ROUND_TAIL = ("bytes_down", "bytes_up", "clock_seconds")
CLIENT_KEYS = (
    "round", "client", "verdict", "reason", "examples", "steps", "norm", "loss", "seconds",
    "bytes_down", "bytes_up",
)  # fmt: skip


def ordered(record: Mapping[str, Any], head: Sequence[str], *, tail: Sequence[str] = ()) -> Record:
    """The record in stable order: `head`, other keys by name, `tail`, ``nonfinite``, ``time``.

    Numbers that are NaN or infinite become null, and their names are listed in ``nonfinite``; those
    inside the object ``time`` in ``time.nonfinite``, because whether they occur depends on the machine.
    """
    timed = isinstance(record.get("time"), Mapping)  # else a value like others, of a user's own
    last = {*tail, "nonfinite", "time"} if timed else {*tail, "nonfinite"}
    names = [name for name in head if name in record and name not in last]
    names += sorted(name for name in record if name not in {*head, *last})
    names += [name for name in tail if name in record]
    lacking: list[str] = [str(name) for name in record.get("nonfinite") or ()]
    result = {name: _finite(record[name], name, lacking) for name in names}
    if lacking:
        result["nonfinite"] = sorted(set(lacking))
    if timed:
        slow: list[str] = []
        time = _finite(record["time"], "", slow)
        result["time"] = time | {"nonfinite": slow} if slow else time
    return result


def _finite(value: Any, name: str, lacking: list[str]) -> Any:
    """`value` as plain JSON; names of what is not finite are added to `lacking`."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        lacking.append(name)
        return None
    if isinstance(value, Mapping):
        dot = f"{name}." if name else ""
        return {str(k): _finite(v, f"{dot}{k}", lacking) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_finite(v, f"{name}.{i}", lacking) for i, v in enumerate(value)]
    return value


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of ASCII with its newline; numbers with all their digits.

    Raises:
        ValueError: a value that is not finite, see `ordered`.
    """
    return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add the records in one write, all or none.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022.
    """
    append_whole(path, b"".join(encode(record) for record in records))


def without_time(line: bytes) -> bytes:
    """A line as it is compared between two runs of one seed: without ``time``."""
    record = json.loads(line)
    record.pop("time", None)
    return encode(record)


def read(path: Path) -> list[Record]:
    """The records of a file, in order; a torn last line is left out, no file is no record.

    Raises:
        EnvironmentProblem: FS-ENV-023, a line that is not the last is damaged.
    """
    return [record for record, _ in scan(path)]


def scan(path: Path, *, skip: bytes | None = None) -> Iterator[tuple[Record, int]]:
    """Each record with the offset at which its line ends; see `read`.

    Args:
        skip: lines that contain this are passed over unread, which saves their decoding.
    """
    damaged: int | None = None
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                offset += len(line)
                if skip is not None and skip in line:
                    continue
                record = parse(line)
                if record is None:
                    damaged = damaged or number
                elif damaged is not None:
                    raise _damaged(path, damaged)
                else:
                    yield record, offset
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(error, path) from error


def parse(line: bytes) -> Record | None:
    """The record of a line, None when the line is torn or is no JSON object."""
    try:
        record = json.loads(line)
    except ValueError:  # also UnicodeDecodeError: half of a character
        return None
    return record if isinstance(record, dict) else None


def repair(path: Path) -> int:
    """Drop a torn end of the file and return how many bytes that were.

    A last record that is whole and lacks only its newline is kept and gets it.

    Raises:
        EnvironmentProblem: FS-ENV-023, damage before the last line, which no kill can cause.
    """
    return _cut(path, None)


def truncate(path: Path, round_index: int) -> int:
    """Drop everything after the last record of `round_index`, torn end included; the bytes dropped."""
    return _cut(path, round_index)


def _cut(path: Path, round_index: int | None) -> int:
    end = 0
    for record, stop in scan(path):
        if round_index is not None and int(record.get("round", 0)) > round_index:
            break
        end = stop
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.truncate(end)
            file.seek(max(0, end - 1))
            if end and file.read() != b"\n":
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise problem(error, path) from error
    return size - end


def _damaged(path: Path, number: int) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"line {number} of {path.name} is damaged",
        code="FS-ENV-023",
        where=f"{path}, line {number}",
        why="it is not a JSON object, and whole lines follow it: a stopped run tears only the last line",
        hint="restore the file from a copy, or remove the damaged line to go on without it",
    )
