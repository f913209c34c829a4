"""Checking what a partitioner returned, before anything relies on it."""

from __future__ import annotations

import numpy as np

from fedsim.data.partition_scheme import UNASSIGNED, Divided, Ints, Scheme, grouped
from fedsim.errors import DataError


def checked_division(
    answer: Divided, labels: Ints, clients: int | None, scheme: Scheme, name: str
) -> tuple[Ints, Ints]:
    """``(index, offsets)`` of what the partitioner `name` returned.

    Args:
        answer: one client per example (-1 for none), or ``(index, offsets)``.
        clients: how many were asked for; None where the data decide.

    Raises:
        DataError: FS-DAT-045, it is neither, or does not fit the data or the number of clients.
    """

    def refuse(why: str) -> DataError:
        return DataError(
            f"the partitioner {name!r} returned no valid division",
            code="FS-DAT-045",
            where="data.partition",
            why=why,
            hint="return one client number per example (-1 for none), or (index, offsets)",
        )

    rows = len(labels)
    if not isinstance(answer, tuple):
        assignment = np.asarray(answer)
        if assignment.shape != (rows,) or not np.issubdtype(assignment.dtype, np.integer):
            raise refuse(f"expected {rows} integers, got {assignment.dtype} {assignment.shape}")
        last = clients or int(assignment.max(initial=-1)) + 1
        if rows and (int(assignment.min()) < UNASSIGNED or int(assignment.max()) >= last):
            raise refuse(f"client numbers must lie in -1 … {last - 1}")
        return grouped(assignment.astype(np.int64, copy=False), last)
    if len(answer) != 2:
        raise refuse(f"expected (index, offsets), got {len(answer)} values")
    index, offsets = (np.asarray(part) for part in answer)
    for what, part in (("index", index), ("offsets", offsets)):
        if part.ndim != 1 or not np.issubdtype(part.dtype, np.integer):
            raise refuse(f"{what} must be integers [..], got {part.dtype} {part.shape}")
    rising = len(offsets) > 0 and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
    if not rising or offsets[-1] != len(index):
        raise refuse(f"offsets must rise from 0 to {len(index)}")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise refuse(f"rows must lie in 0 … {rows - 1}")
    if clients is not None and scheme.short == "fill" and len(offsets) != clients + 1:
        raise refuse(f"expected {clients} clients, got {len(offsets) - 1}")
    return index.astype(np.int64, copy=False), offsets.astype(np.int64, copy=False)
