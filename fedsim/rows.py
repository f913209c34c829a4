"""Rows by client id: client states in simulation, and what a server holds for each client.

Only clients that were touched have rows; the population costs one index. Rows are written to fresh
slots and become visible with `commit`, so a refused or lost answer leaves the old ones in force, and
a slot that the last checkpoint names is never overwritten: a checkpoint stores the index alone.
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
from fedsim.types import Bools, Ids

SEGMENT_BYTES = 16 << 20
_LARGE_ROW = 64 << 10  # bytes from which rows are copied one by one: no gathered copy in between


class RowStore:
    """Named rows [*shape] for each touched client.

    Args:
        population: N.
        folder: where the segments are memory-mapped; None keeps them in memory.
    """

    def __init__(self, population: int, folder: Path | None = None) -> None:
        self.folder = folder
        self.layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.slot_of = np.full(population, -1, np.int64)
        self.version_of = np.zeros(population, np.int64)
        self._staged_slot = np.empty(0, np.int64)  # [N] once there are rows, -1 for nothing staged
        self._staged: list[Ids] = []  # who has one
        self._segments: dict[str, list[Tensor]] = {}
        self._free: list[Ids] = []
        self._pinned = np.empty(0, bool)  # [slots] of the last durable index
        self._indexed = np.empty(0, bool)  # [slots] of the last index, durable or not
        self._held = np.empty(0, np.int64)  # replaced, but named by one of the two
        self._slots = 0
        self._per_segment = 1

    def has(self, ids: Ids) -> Bools:
        """[b] whether a committed row exists."""
        return self.slot_of[ids] >= 0

    def read(self, ids: Ids) -> dict[str, Tensor]:
        """{name: [b, *shape]} of clients that all have rows, copied."""
        slots = self.slot_of[ids]
        if (slots < 0).any():
            raise KeyError(f"client {ids[slots < 0][0]} has no row")
        return {name: self._copied(name, slots) for name in self.layout}

    def held(self, ids: Ids, name: str, *, like: Tensor) -> Tensor:
        """[b, D] the vector `name` of each client, zero for clients without rows.

        Args:
            like: [D], whose dtype and device the result has.
        """
        vectors = like.new_zeros(len(ids), len(like))
        known = self.has(ids)
        if known.any():
            rows = self._copied(name, self.slot_of[ids[known]])
            vectors[torch.from_numpy(known).to(like.device)] = rows.to(vectors)
        return vectors

    def _copied(self, name: str, slots: Ids) -> Tensor:
        """[b, *shape] the rows in these slots."""
        shape, dtype = self.layout[name]
        rows = torch.empty((len(slots), *shape), dtype=dtype)
        for segment, at, inside in self._places(name, slots):
            if at is None:
                torch.index_select(segment, 0, inside, out=rows)
            else:
                rows[at] = segment[inside]
        return rows

    def _places(self, name: str, slots: Ids) -> Iterator[tuple[Tensor, Any, Any]]:
        """Segment by segment: which of `slots` lie there (None for all of them), and where.

        Large rows one by one, as whole numbers; small ones many at a time, as tensors.
        """
        segments, numbers, inside = (
            self._segments[name],
            slots // self._per_segment,
            slots % self._per_segment,
        )
        if self._per_segment <= SEGMENT_BYTES // _LARGE_ROW:
            for row, (number, place) in enumerate(zip(numbers.tolist(), inside.tolist(), strict=True)):
                yield segments[number], row, place
            return
        for number in np.unique(numbers).tolist():
            mine = np.flatnonzero(numbers == number)
            at = None if len(mine) == len(slots) else torch.from_numpy(mine)
            yield segments[number], at, torch.from_numpy(inside[mine])

    def stage(self, ids: Ids, rows: Mapping[str, Tensor]) -> None:
        """Keep new rows [b, *shape] aside until they are committed; of a client named twice the last."""
        if not rows or not len(ids):
            return
        if not self.layout:
            self._lay_out({name: (tuple(t.shape[1:]), t.dtype) for name, t in rows.items()})
        alone, last = np.unique(ids[::-1], return_index=True)
        if len(alone) < len(ids):
            ids, keep = alone, torch.from_numpy(len(ids) - 1 - last)
            rows = {name: values[keep.to(values.device)] for name, values in rows.items()}
        new = ids[self._staged_slot[ids] < 0]
        if len(new):
            self._staged_slot[new] = self._take(len(new))
            self._staged.append(new)
        slots = self._staged_slot[ids]
        for name, values in rows.items():
            given = values.to(self.layout[name][1]).cpu()
            for segment, at, inside in self._places(name, slots):
                segment[inside] = given if at is None else given[at]

    def commit(self, ids: Ids) -> None:
        """The staged rows of these clients become theirs; every other staged row is dropped."""
        np.add.at(self.version_of, ids, 1)
        if self._staged:
            alone = np.unique(ids)
            owners = alone[self._staged_slot[alone] >= 0]
            old = self.slot_of[owners]
            self.slot_of[owners] = self._staged_slot[owners]
            self._staged_slot[owners] = -1
            old = old[old >= 0]
            named = _holds(self._pinned, old) | _holds(self._indexed, old)
            self._held = np.concatenate([self._held, old[named]])
            self._give_back(old[~named])
        self.discard()

    def discard(self) -> None:
        """Drop every staged row."""
        for ids in self._staged:
            slots = self._staged_slot[ids]
            self._staged_slot[ids] = -1
            self._give_back(slots[slots >= 0])
        self._staged.clear()

    def index(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold; flushes the segments first."""
        if self.folder is not None:
            for name, segments in self._segments.items():
                for number in range(len(segments)):
                    sync_file(self._path(name, number))
        self._indexed = self._mask(self.slot_of[self.slot_of >= 0])
        touched = np.flatnonzero((self.slot_of >= 0) | (self.version_of > 0))
        return {
            "ids": touched.astype(np.int64),
            "slots": self.slot_of[touched],
            "versions": self.version_of[touched],
        }

    def pin(self) -> None:
        """The index last returned is durable: its slots are kept, those of the one before are free."""
        self._pinned = self._indexed
        still = _holds(self._pinned, self._held)
        self._give_back(self._held[~still])
        self._held = self._held[still]

    def restore(
        self,
        index: Mapping[str, np.ndarray],
        layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        """Continue from a checkpoint's index over the segments in the folder."""
        self.slot_of[:] = -1
        self.version_of[:] = 0
        self._staged.clear()
        self._staged_slot[:] = -1
        self._slots = 0
        self.slot_of[index["ids"]] = index["slots"]
        self.version_of[index["ids"]] = index["versions"]
        if layout:
            self._lay_out(dict(layout))
        used = self.slot_of[self.slot_of >= 0]
        top = int(used.max(initial=-1)) + 1
        while self._slots < top:
            self._grow()
        self._indexed = self._mask(used)
        self._free = []
        self._give_back(np.flatnonzero(~self._indexed).astype(np.int64))
        self._held = np.empty(0, np.int64)
        self.pin()

    def _lay_out(self, layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.layout = layout
        self._segments = {name: [] for name in layout}
        self._staged_slot = np.full(len(self.slot_of), -1, np.int64)
        row_bytes = max(
            int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in layout.values()
        )
        self._per_segment = max(1, SEGMENT_BYTES // max(1, row_bytes))

    def _take(self, count: int) -> Ids:
        """[count] free slots."""
        while sum(map(len, self._free)) < count:
            self._grow()
        parts: list[Ids] = []
        while count:
            chunk = self._free.pop()
            parts.append(chunk[:count])
            self._give_back(chunk[count:])
            count -= len(parts[-1])
        return np.concatenate(parts)

    def _give_back(self, slots: Ids) -> None:
        if len(slots):
            self._free.append(slots)

    def _mask(self, slots: Ids) -> Bools:
        """[slots] True at these."""
        mask = np.zeros(self._slots, bool)
        mask[slots] = True
        return mask

    def _grow(self) -> None:
        number = self._slots // self._per_segment
        for name, (shape, dtype) in self.layout.items():
            full = (self._per_segment, *shape)
            if self.folder is None:
                self._segments[name].append(torch.zeros(full, dtype=dtype))
                continue
            self.folder.mkdir(parents=True, exist_ok=True)
            # torch maps every dtype that a state may have, NumPy knows no bfloat16.
            values = self._per_segment * math.prod(shape)
            mapped = torch.from_file(str(self._path(name, number)), shared=True, size=values, dtype=dtype)
            self._segments[name].append(mapped.reshape(full))
        first = self._slots
        self._slots += self._per_segment
        self._give_back(np.arange(first, self._slots, dtype=np.int64))

    def _path(self, name: str, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{number:05d}.rows"


def _holds(mask: Bools, slots: Ids) -> Bools:
    """[b] whether the mask, made when there were fewer slots perhaps, is True at each of `slots`."""
    inside: Bools = slots < len(mask)
    inside[inside] = mask[slots[inside]]
    return inside
