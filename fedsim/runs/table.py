"""``rounds.csv``: the rounds as one flat table, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedsim.runs.lines import ROUND_KEYS, ROUND_TAIL


def as_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    """The records with one column per key, in the order of a line; nested keys as ``time.seconds``."""
    rows = [dict(flat(record)) for record in records]
    header = sorted({name for row in rows for name in row}, key=_place)
    return csv_bytes(header, ([row.get(name) for name in header] for row in rows))


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The record's entries with dotted names; lists as one text, parted by ``;``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield prefix + name, ";".join(str(v) for v in value)
        else:
            yield prefix + name, value


def _place(name: str) -> tuple[int, int, str]:
    """Where a column stands: known ones first, then by name, what was sent, ``nonfinite``, ``time``."""
    if name in ROUND_KEYS:
        return 0, ROUND_KEYS.index(name), name
    if name in ROUND_TAIL:
        return 2, ROUND_TAIL.index(name), name
    return {"nonfinite": 3, "time": 4}.get(name.partition(".")[0], 1), 0, name


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file as bytes: UTF-8, ``\\n`` after each row, an empty cell where there is no value.

    A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_harmless(name) for name in header])
    writer.writerows([_harmless(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8", errors="replace")


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
