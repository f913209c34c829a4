"""JSON lines out of columns: the same bytes as one record after the other, without a record for any line.

A thousand clients a round write a thousand lines a round. A column of one value is text that all lines share;
the values of the others become text many at a time, and all lines are joined in one go. Lines that hold what
is not finite go the long way of `fedsim.runs.lines`, and so do all where a column holds values of another
kind than numbers, words or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic_core import to_json

from fedsim.client_log import Column
from fedsim.runs.lines import encode, ordered

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
    # A line is fixed text, a value, fixed text …, a value, fixed text.
    fixed, filled, before = [], [], "{"
    for name, part in zip(names, parts, strict=True):
        assert part is not None
        texts, wrong = part
        before += f"{json.dumps(name)}: "
        if isinstance(texts, str):
            before += texts + ", "
        else:
            fixed.append(before)
            filled.append(texts)
            before = ", "
        if wrong is not None:
            odd |= wrong
    fixed.append(before.removesuffix(", ") + "}\n")
    width = len(fixed) + len(filled)
    pieces = [""] * (count * width)
    for place, text in enumerate(fixed):
        pieces[2 * place :: width] = [text] * count
    for place, column in enumerate(filled):
        pieces[2 * place + 1 :: width] = column
    if odd.any():
        return b"".join(
            _long_way(columns, head, row)
            if wrong
            else "".join(pieces[row * width : (row + 1) * width]).encode("ascii")
            for row, wrong in enumerate(odd.tolist())
        )
    return "".join(pieces).encode("ascii")


def _long_way(columns: Mapping[str, Column], head: Sequence[str], row: int) -> bytes:
    return encode(ordered({name: column[row] for name, column in columns.items()}, head))


def _part(column: Column) -> tuple[str | list[str], np.ndarray | None] | None:
    """The values of a column as text, one text where all are the same, and the rows that are not finite.

    None for a column that this module cannot write.
    """
    if isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "if":
        return _floats(column.astype(np.float64)) if column.dtype.kind == "f" else _integers(column)
    values = column.tolist() if isinstance(column, np.ndarray) else list(column)
    kinds = set(map(type, values))
    if kinds == {float}:
        return _floats(np.array(values))
    if not kinds <= _TEXT.keys():
        return None
    if len(kinds) == 1 and values.count(values[0]) == len(values):
        return _TEXT[kinds.pop()](values[0]), None
    if kinds == {int}:
        return _texts(values), None
    texts = [_TEXT[type(value)](value) for value in values]
    if float in kinds:
        wrong = np.array([type(value) is float and not np.isfinite(value) for value in values])
        return texts, wrong if wrong.any() else None
    return texts, None


def _integers(numbers: np.ndarray) -> tuple[str | list[str], None]:
    """See `_part`."""
    if (numbers == numbers[0]).all():
        return repr(int(numbers[0])), None
    return _texts(numbers.tolist()), None


def _floats(numbers: np.ndarray) -> tuple[str | list[str], np.ndarray | None]:
    """See `_part`; float64."""
    bits, sizes, values = numbers.view(np.int64), np.abs(numbers), numbers.tolist()
    if (bits == bits[0]).all() and np.isfinite(numbers[0]):
        return repr(values[0]), None
    texts = _texts(values)
    # Elsewhere Python writes exponents, or writes them in another way.
    for row in np.flatnonzero(~((sizes >= 1e-4) & (sizes < 1e16) | (sizes == 0))).tolist():
        texts[row] = repr(values[row])
    wrong = ~np.isfinite(numbers)
    return texts, wrong if wrong.any() else None


def _texts(numbers: Sequence[float]) -> list[str]:
    """Each number by itself: 0.04 ms for a thousand floats, of which `repr` takes 0.38."""
    return to_json(numbers)[1:-1].decode("ascii").split(",")


_TEXT: dict[type, Callable[[Any], str]] = {
    float: float.__repr__,
    int: int.__repr__,
    str: json.dumps,
    bool: lambda value: "true" if value else "false",
    type(None): lambda value: "null",
}
"""How values of these kinds, and of no kind derived from them, look in JSON."""
