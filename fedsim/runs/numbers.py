"""Numbers as people read them."""

from __future__ import annotations

import math


def short(value: object) -> str:
    """A metric in four digits that matter, ``–`` where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    return f"{value:.3e}" if size and (size < 1e-3 or size >= 1e6) else f"{value:.4g}"


def in_bytes(count: float) -> str:
    """``12.3 MB``; decimal units, as networks are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def in_time(seconds: float) -> str:
    """``3.1 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def some(numbers: list[int], most: int = 6) -> str:
    """``1, 2, 5 … 40 (17 in all)``."""
    if len(numbers) <= most:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[: most - 1]))} … {numbers[-1]} ({len(numbers)} in all)"
