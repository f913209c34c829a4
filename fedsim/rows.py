"""Rows by client id: client states in simulation, and what a server holds for each client.

Only clients that were touched have rows; the population costs one index. Rows are written to fresh
slots and become visible with `commit`, so a refused or lost answer leaves the old ones in force, and
a slot that the last checkpoint names is never overwritten: a checkpoint stores the index alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.row_segments import Layout, RowsAt, Segments
from fedsim.types import Bools, Ids


class RowStore:
    """Named rows [*shape] for each touched client.

    Args:
        population: N.
        folder: of the files that hold them; None keeps them in memory.
    """

    def __init__(self, population: int, folder: Path | None = None) -> None:
        self.folder = folder
        self.slot_of = np.full(population, -1, np.int64)
        self.version_of = np.zeros(population, np.int64)
        self._staged_slot = np.empty(0, np.int64)  # [N] once there are rows, -1 for nothing staged
        self._staged: list[Ids] = []  # who has one
        self._segments: Segments | None = None  # once there are rows
        self._free: list[Ids] = []
        self._pinned = np.empty(0, bool)  # [slots] of the last durable index
        self._indexed = np.empty(0, bool)  # [slots] of the last index, durable or not
        self._held = np.empty(0, np.int64)  # replaced, but named by one of the two

    @property
    def layout(self) -> Layout:
        """Shape and dtype of each named row; empty before the first."""
        return {} if self._segments is None else self._segments.layout

    def has(self, ids: Ids) -> Bools:
        """[b] whether a committed row exists."""
        return self.slot_of[ids] >= 0

    def read(self, ids: Ids) -> dict[str, Tensor]:
        """{name: [b, *shape]} of clients that all have rows, copied."""
        slots = self.slot_of[ids]
        if (slots < 0).any():
            raise KeyError(f"client {ids[slots < 0][0]} has no row")
        return {name: self._segments.read(name, slots) for name in self.layout} if self._segments else {}

    def held(self, ids: Ids, name: str, *, like: Tensor) -> Tensor:
        """[b, D] the vector `name` of each client, zero for clients without rows.

        Args:
            like: [D], whose dtype and device the result has.
        """
        vectors = like.new_zeros(len(ids), len(like))
        known = self.has(ids)
        if known.any():
            assert self._segments is not None
            rows = self._segments.read(name, self.slot_of[ids[known]])
            vectors[torch.from_numpy(known).to(like.device)] = rows.to(vectors)
        return vectors

    def stage(self, ids: Ids, rows: Mapping[str, Tensor]) -> None:
        """Keep new rows [b, *shape] aside until they are committed; of a client named twice the last."""
        if not rows or not len(ids):
            return
        if self._segments is None:
            self._lay_out({name: (tuple(t.shape[1:]), t.dtype) for name, t in rows.items()})
        assert self._segments is not None
        alone, last = np.unique(ids[::-1], return_index=True)
        if len(alone) < len(ids):
            ids, keep = alone, torch.from_numpy(len(ids) - 1 - last)
            rows = {name: values[keep.to(values.device)] for name, values in rows.items()}
        slots = self._reserved(ids)
        for name, values in rows.items():
            self._segments.write(name, slots, values)

    def at(self, ids: Ids) -> RowsAt | None:
        """Where another process reads the rows of these clients and stages new ones.

        None where rows are in memory, or none were ever staged, or one of the clients has a staged row.
        """
        segments = self._segments
        if segments is None or segments.folder is None or (self._staged_slot[ids] >= 0).any():
            return None
        if len(np.unique(ids)) < len(ids):
            return None
        kinds = [(name, tuple(s), str(d).removeprefix("torch.")) for name, (s, d) in segments.layout.items()]
        held = self.slot_of[ids]
        return RowsAt(str(segments.folder), tuple(kinds), held[held >= 0], self._reserved(ids))

    def _reserved(self, ids: Ids) -> Ids:
        """Slots for the new rows of these clients, each named once."""
        new = ids[self._staged_slot[ids] < 0]
        if len(new):
            self._staged_slot[new] = self._take(len(new))
            self._staged.append(new)
        return self._staged_slot[ids]

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
        if self._segments is not None:
            self._segments.sync()
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
        layout: Layout,
    ) -> None:
        """Continue from a checkpoint's index over the segments in the folder."""
        self.slot_of[:] = -1
        self.version_of[:] = 0
        self._staged.clear()
        self._staged_slot[:] = -1
        self._segments = None
        self.slot_of[index["ids"]] = index["slots"]
        self.version_of[index["ids"]] = index["versions"]
        used = self.slot_of[self.slot_of >= 0]
        if layout:
            self._lay_out(layout)
            assert self._segments is not None
            self._segments.reach(used)
        self._indexed = self._mask(used)
        self._free = []
        self._give_back(np.flatnonzero(~self._indexed).astype(np.int64))
        self._held = np.empty(0, np.int64)
        self.pin()

    def _lay_out(self, layout: Layout) -> None:
        self._segments = Segments(layout, self.folder)
        self._staged_slot = np.full(len(self.slot_of), -1, np.int64)

    def _take(self, count: int) -> Ids:
        """[count] free slots."""
        assert self._segments is not None
        while sum(map(len, self._free)) < count:
            first = self._segments.slots
            self._segments.grow()
            self._give_back(np.arange(first, self._segments.slots, dtype=np.int64))
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
        mask = np.zeros(0 if self._segments is None else self._segments.slots, bool)
        mask[slots] = True
        return mask


def _holds(mask: Bools, slots: Ids) -> Bools:
    """[b] whether the mask, made when there were fewer slots perhaps, is True at each of `slots`."""
    inside: Bools = slots < len(mask)
    inside[inside] = mask[slots[inside]]
    return inside
