"""The memory of rows: slots of named rows in segments of one size, in memory or in files.

Small rows of files are mapped. Large ones are read and written by calls: a mapping asks for each new page by
itself (docs/performance.md, SCAFFOLD), and ends the process where the disk is full. Whoever knows folder and
layout can open the same files in another process: a worker reads the states of its clients there and writes
what they keep. Which slot belongs to whom is the store's business (`fedsim.rows`).
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.storage import problem, sync_file, unreadable, write_all
from fedsim.types import Ids

SEGMENT_BYTES = 16 << 20
_LARGE_ROW = 64 << 10  # bytes from which rows are moved one by one: no gathered copy in between

_SHORT = "the file is shorter than it was"

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each named row."""


class Segments:
    """Slots of rows.

    Args:
        layout: of the rows.
        folder: of the files, wherever the process goes later; None keeps rows in memory.
        owned: whether a file that is not there is made; else it is an error.
    """

    def __init__(self, layout: Layout, folder: Path | None, *, owned: bool = True) -> None:
        self.layout, self.owned = dict(layout), owned
        self.folder = None if folder is None else folder.absolute()
        row_bytes = max(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        self.per_segment = max(1, SEGMENT_BYTES // max(1, row_bytes))
        self._large = self.per_segment <= SEGMENT_BYTES // _LARGE_ROW
        self._held: dict[str, list[Tensor]] = {name: [] for name in layout}  # or nothing, of files by calls
        self._count = 0

    @property
    def slots(self) -> int:
        """How many there are."""
        return self._count * self.per_segment

    def grow(self) -> None:
        """A further segment: a new one, or one whose files are there.

        Raises:
            EnvironmentProblem: FS-ENV-024, a file that should be there is not.
        """
        for name, (shape, dtype) in self.layout.items():
            full = (self.per_segment, *shape)
            if self.folder is None:
                self._held[name].append(torch.zeros(full, dtype=dtype))
                continue
            if self.owned:
                self.folder.mkdir(parents=True, exist_ok=True)
            if not self._large:
                path, size = self._path(name, self._count), math.prod(full)
                if not self.owned:
                    _look(path, size * dtype.itemsize)  # a mapping would make a file of zeros
                # torch maps every dtype that a state may have, NumPy knows no bfloat16.
                mapped = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
                self._held[name].append(mapped.reshape(full))
        self._count += 1

    def reach(self, slots: Ids) -> None:
        """Grow until there are these slots."""
        while self.slots <= int(slots.max(initial=-1)):
            self.grow()

    def read(self, name: str, slots: Ids) -> Tensor:
        """[b, *shape] the rows in these slots, copied.

        Raises:
            EnvironmentProblem: FS-ENV-024.
        """
        shape, dtype = self.layout[name]
        rows = torch.empty((len(slots), *shape), dtype=dtype)
        if self.folder is not None and self._large:
            for row, path, offset in self._rows(name, slots, rows):
                _read(path, row, offset)
            return rows
        for segment, at, inside in self._places(name, slots):
            if at is None:
                torch.index_select(segment, 0, inside, out=rows)
            else:
                rows[at] = segment[inside]
        return rows

    def write(self, name: str, slots: Ids, rows: Tensor) -> None:
        """Put rows [b, *shape] into these slots.

        Raises:
            EnvironmentProblem: FS-ENV-020 … 022.
        """
        given = rows.to(self.layout[name][1]).cpu()
        if self.folder is not None and self._large:
            for row, path, offset in self._rows(name, slots, given.contiguous()):
                _write(path, row, offset)
            return
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
        if self._large:
            for row, (number, place) in enumerate(zip(numbers.tolist(), inside.tolist(), strict=True)):
                yield segments[number], row, place
            return
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            at = None if len(mine) == len(slots) else torch.from_numpy(mine)
            yield segments[number], at, torch.from_numpy(inside[mine])

    def _rows(self, name: str, slots: Ids, rows: Tensor) -> Iterator[tuple[memoryview, Path, int]]:
        """The bytes of each row, its file, and where in it the row lies."""
        size = math.prod(self.layout[name][0])
        content = rows.reshape(len(rows), size).view(torch.uint8).numpy()
        places = zip((slots // self.per_segment).tolist(), (slots % self.per_segment).tolist(), strict=True)
        for row, (number, place) in zip(content, places, strict=True):
            yield memoryview(row.data), self._path(name, number), place * len(row)

    def _path(self, name: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{number:05d}.rows"


def _look(path: Path, size: int) -> None:
    try:
        if path.stat().st_size < size:
            raise OSError(errno.EIO, _SHORT)
    except OSError as error:
        raise unreadable(error, path) from error


def _write(path: Path, content: memoryview, offset: int) -> None:
    try:
        with open(path, "r+b", buffering=0, opener=_open_or_make) as file:
            file.seek(offset)
            write_all(file.fileno(), content)
    except OSError as error:
        raise problem(error, path) from error


def _read(path: Path, into: memoryview, offset: int) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while into:
                read = file.readinto(into)
                if not read:
                    raise OSError(errno.EIO, _SHORT)
                into = into[read:]
    except OSError as error:
        raise unreadable(error, path) from error


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


class RowsAt(NamedTuple):
    """Where the rows of b clients lie in files, for a process that has no store.

    Args:
        folder: of the segments.
        layout: (name, shape, name of the dtype) of each row.
        taken: [k] slots of the clients that have rows.
        kept: [b] slots for the rows of all of them afterwards.
    """

    folder: str
    layout: tuple[tuple[str, tuple[int, ...], str], ...]
    taken: Ids
    kept: Ids

    def read(self) -> dict[str, Tensor]:
        """{name: [k, *shape]}, copied."""
        segments = self._segments(self.taken)
        return {name: segments.read(name, self.taken) for name in segments.layout}

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Put the new rows {name: [b, *shape]} where the store expects them."""
        segments = self._segments(self.kept)
        for name, values in rows.items():
            segments.write(name, self.kept, values)

    def _segments(self, slots: Ids) -> Segments:
        found = _opened(self.folder, self.layout)
        found.reach(slots)
        return found


@lru_cache(maxsize=2)
def _opened(folder: str, layout: tuple[tuple[str, tuple[int, ...], str], ...]) -> Segments:
    """The segments there, the same object while this process asks for no third folder."""
    names = {name: (shape, getattr(torch, dtype)) for name, shape, dtype in layout}
    return Segments(names, Path(folder), owned=False)
