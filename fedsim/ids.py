"""Arrays of ids as sets: by sorting and comparing, which for a thousand is faster than hashing.

Rounds ask the same two questions again and again, of arrays that are short, or sorted already, or both.
"""

from __future__ import annotations

import numpy as np

from fedsim.types import Bools, Ids

_PAIRS = 1 << 15  # comparisons that cost less than sorting


def distinct(ids: Ids) -> Ids:
    """[u] each id once, ascending."""
    if len(ids) < 2:
        return ids
    if not ascending(ids):
        ids = np.sort(ids)
    first = np.ones(len(ids), bool)
    np.not_equal(ids[1:], ids[:-1], out=first[1:])
    return ids if first.all() else ids[first]


def ascending(ids: Ids) -> bool:
    """Whether each id is larger than the one before: sorted, and none twice."""
    return bool((ids[1:] > ids[:-1]).all())


def among(ids: Ids, some: Ids) -> Bools:
    """[b] whether each of `ids` is one of `some`."""
    if len(ids) * len(some) <= _PAIRS:
        found: Bools = (ids[:, None] == some[None, :]).any(axis=1)
        return found
    if not ascending(some):
        some = np.sort(some)
    at = np.minimum(np.searchsorted(some, ids), len(some) - 1)
    found = some[at] == ids
    return found
