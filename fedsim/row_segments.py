"""The memory of rows: slots of named rows in segments of one size, kept in memory or mapped from files.

Whoever knows folder and layout can open the same files in another process: a worker reads the states of its
clients there and writes what they keep. Which slot belongs to whom is the store's business (`fedsim.rows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.storage import sync_file
from fedsim.types import Ids

SEGMENT_BYTES = 16 << 20
_LARGE_ROW = 64 << 10  # bytes from which rows are copied one by one: no gathered copy in between

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each named row."""


class Segments:
    """Slots of rows.

    Args:
        layout: of the rows.
        folder: of the files, which are as large as a segment from the start; None keeps rows in memory.
    """

    def __init__(self, layout: Layout, folder: Path | None) -> None:
        self.layout, self.folder = dict(layout), folder
        row_bytes = max(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        self.per_segment = max(1, SEGMENT_BYTES // max(1, row_bytes))
        self._held: dict[str, list[Tensor]] = {name: [] for name in layout}
        self._count = 0

    @property
    def slots(self) -> int:
        """How many there are."""
        return self._count * self.per_segment

    def grow(self) -> None:
        """A further segment: a new one, or one whose files are there."""
        for name, (shape, dtype) in self.layout.items():
            full = (self.per_segment, *shape)
            if self.folder is None:
                self._held[name].append(torch.zeros(full, dtype=dtype))
                continue
            self.folder.mkdir(parents=True, exist_ok=True)
            # torch maps every dtype that a state may have, NumPy knows no bfloat16.
            path, size = str(self._path(name, self._count)), math.prod(full)
            mapped = torch.from_file(path, shared=True, size=size, dtype=dtype)
            self._held[name].append(mapped.reshape(full))
        self._count += 1

    def reach(self, slots: Ids) -> None:
        """Grow until there are these slots."""
        while self.slots <= int(slots.max(initial=-1)):
            self.grow()

    def read(self, name: str, slots: Ids) -> Tensor:
        """[b, *shape] the rows in these slots, copied."""
        shape, dtype = self.layout[name]
        rows = torch.empty((len(slots), *shape), dtype=dtype)
        for segment, at, inside in self._places(name, slots):
            if at is None:
                torch.index_select(segment, 0, inside, out=rows)
            else:
                rows[at] = segment[inside]
        return rows

    def write(self, name: str, slots: Ids, rows: Tensor) -> None:
        """Put rows [b, *shape] into these slots."""
        given = rows.to(self.layout[name][1]).cpu()
        for segment, at, inside in self._places(name, slots):
            segment[inside] = given if at is None else given[at]

    def sync(self) -> None:
        """Wait until all files are on the disk."""
        if self.folder is not None:
            for name in self.layout:
                for number in range(self._count):
                    sync_file(self._path(name, number))

    def _places(self, name: str, slots: Ids) -> Iterator[tuple[Tensor, Any, Any]]:
        """Segment by segment: which of `slots` lie there (None for all of them), and where.

        Large rows one by one, as whole numbers; small ones many at a time, as tensors.
        """
        segments, numbers, inside = self._held[name], slots // self.per_segment, slots % self.per_segment
        if self.per_segment <= SEGMENT_BYTES // _LARGE_ROW:
            for row, (number, place) in enumerate(zip(numbers.tolist(), inside.tolist(), strict=True)):
                yield segments[number], row, place
            return
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            at = None if len(mine) == len(slots) else torch.from_numpy(mine)
            yield segments[number], at, torch.from_numpy(inside[mine])

    def _path(self, name: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{number:05d}.rows"
