"""Amounts with a unit, as people write them: ``"10m"``, ``"1h30m"``, ``"2GiB"``."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("kMGT", start=1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", start=1)},
}
_PART = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|min|[smhd])")
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kKMGT]i?B|B)\s*")


def parse_seconds(text: str) -> float:
    """Seconds in ``"90s"``, ``"10m"``, ``"1h30m"``, ``"250ms"``, ``"2d"``.

    Raises:
        ValueError: another form.
    """
    total, position = 0.0, 0
    for part in _PART.finditer(text):
        if part.start() != position:
            break
        total += float(part[1]) * _SECONDS[part[2]]
        position = part.end()
    if position == 0 or text[position:].strip():
        raise ValueError(
            f"a time is a number of seconds or a text such as '90s', '10m', '1h30m', got {text!r}"
        )
    return total


def parse_bytes(text: str) -> int:
    """Bytes in ``"500MB"`` (powers of 1000) or ``"2GiB"`` (powers of 1024).

    Raises:
        ValueError: another form.
    """
    match = _SIZE.fullmatch(text)
    unit = "" if match is None else match[2].replace("KB", "kB").replace("kiB", "KiB")
    if match is None or unit not in _BYTES:
        raise ValueError(f"a size is a number of bytes or a text such as '500MB', '2GiB', got {text!r}")
    size: int = round(float(match[1]) * _BYTES[unit])
    return size


def _seconds(value: object) -> object:
    return parse_seconds(value) if isinstance(value, str) else value


_WRITTEN = WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
Seconds = Annotated[float, BeforeValidator(_seconds), _WRITTEN]
"""A number of seconds that may be written with a unit."""
