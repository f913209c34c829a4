"""JSON lines out of columns: the same bytes as one record after the other, without a record for any line.

A thousand clients a round write a thousand lines a round. A column of one value is written into the form of
a line once; the others are filled in, all lines in one go. Lines that hold what is not finite, or a value of
another kind than a number, a word or nothing, go the long way of `fedsim.runs.lines`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedsim.runs.lines import encode, ordered

Column = Sequence[Any]  # Any: numbers, words, None

_SPECIAL = ("nonfinite", "time")  # names that `ordered` does not take for values


def encode_columns(columns: Mapping[str, Column], head: Sequence[str]) -> bytes:
    """The lines of equally long columns, as ``encode(ordered(record, head))`` of each record.

    Raises:
        ValueError: the columns are not equally long.
    """
    count = len(next(iter(columns.values()), ()))
    if any(len(column) != count for column in columns.values()):
        raise ValueError("a column is shorter than another")
    if not count:
        return b""
    names = [name for name in head if name in columns]
    names += sorted(name for name in columns if name not in set(head))
    parts = [_part(columns[name]) for name in names]
    if any(name in columns for name in _SPECIAL) or any(part is None for part in parts):
        return b"".join(_long_way(columns, head, row) for row in range(count))
    odd = np.zeros(count, bool)
    form, filled = [], []
    for name, part in zip(names, parts, strict=True):
        assert part is not None
        text, values, wrong = part
        form.append(f"{json.dumps(name)}: ".replace("%", "%%") + text)
        if values is not None:
            filled.append(values)
        if wrong is not None:
            odd |= wrong
    line = "{" + ", ".join(form) + "}\n"
    if odd.any():
        rows: list[Any] = list(zip(*filled, strict=True))
        return b"".join(
            _long_way(columns, head, row) if wrong else (line % rows[row]).encode("ascii")
            for row, wrong in enumerate(odd.tolist())
        )
    values = [None] * (count * len(filled))
    for place, column in enumerate(filled):
        values[place :: len(filled)] = column
    return (line * count % tuple(values)).encode("ascii")


def _long_way(columns: Mapping[str, Column], head: Sequence[str], row: int) -> bytes:
    return encode(ordered({name: column[row] for name, column in columns.items()}, head))


def _part(column: Column) -> tuple[str, list[Any] | None, np.ndarray | None] | None:
    """A column in the form of a line: the text there, the values that it asks for, the rows not finite.

    None for a column that this module cannot write.
    """
    values = column.tolist() if isinstance(column, np.ndarray) else list(column)
    kinds = set(map(type, values))
    if kinds == {float}:
        numbers = np.array(values)
        bits, finite = numbers.view(np.int64), np.isfinite(numbers)
        if not finite.all():
            return "%r", values, ~finite
        return (repr(values[0]), None, None) if (bits == bits[0]).all() else ("%r", values, None)
    if not kinds <= _TEXT.keys():
        return None
    if len(kinds) == 1 and values.count(values[0]) == len(values):
        return _TEXT[kinds.pop()](values[0]).replace("%", "%%"), None, None
    if kinds == {int}:
        return "%d", values, None
    if float in kinds:
        wrong = np.array([type(value) is float and not np.isfinite(value) for value in values])
        return "%s", [_TEXT[type(value)](value) for value in values], wrong if wrong.any() else None
    return "%s", [_TEXT[type(value)](value) for value in values], None


_TEXT: dict[type, Callable[[Any], str]] = {
    float: float.__repr__,
    int: int.__repr__,
    str: json.dumps,
    bool: lambda value: "true" if value else "false",
    type(None): lambda value: "null",
}
"""How values of these kinds, and of no kind derived from them, look in JSON."""
