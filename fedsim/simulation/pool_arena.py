"""The shared memory of a pool: slots for orders and their answers, pages for what all clients get.

A slot belongs to one block from its order until the last tensor of its answer is gone, wherever that is:
in a fold that is over at once, in the rows of a robust rule, or in an observer's hands. A page holds one
broadcast and is written once for all blocks that start from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.simulation.shared import Bytes, Memory, pack
from fedsim.training.work import Work


@dataclass(slots=True, eq=False)
class Slot:
    """Memory for one order and its answer."""

    number: int
    memory: Memory = field(default_factory=Memory)


@dataclass(slots=True, eq=False)
class Page:
    """Memory for one broadcast.

    Args:
        message, buffers: that lie in it, as the objects that they were made from.
        form: where; end: first byte behind them.
        readers: orders on their way that begin from it.
    """

    number: int
    memory: Memory = field(default_factory=Memory)
    message: Any = None
    buffers: Any = None
    form: Any = None
    end: int = 0
    readers: int = 0


class Arena:
    """All shared memory of a pool, and which worker has which piece of it."""

    def __init__(self) -> None:
        self.largest = 0  # bytes of an order with its answer, once one has come
        self._numbers = 0
        self._slots: dict[int, Slot] = {}
        self._free: list[Slot] = []
        self._pages: list[Page] = []
        self._known: dict[int, set[int]] = {}  # worker -> numbers that it has mapped
        self._dropped: dict[int, list[int]] = {}  # worker -> numbers that it shall forget

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        pieces: list[Slot | Page] = [*self._slots.values(), *self._pages]
        return sum(piece.memory.size for piece in pieces)

    def slot(self, worker: int) -> Slot:
        """A free slot, one that this worker has used before if there is one."""
        known = self._known.get(worker, set())
        for position in range(len(self._free) - 1, -1, -1):
            if self._free[position].number in known:
                return self._free.pop(position)
        if self._free:
            return self._free.pop()
        slot = Slot(self._number())
        self._slots[slot.number] = slot
        return slot

    def free(self, slot: Slot) -> None:
        """Nobody needs this slot now."""
        self._free.append(slot)

    def page(self, work: Work) -> Page:
        """The page that holds the broadcast of this work; one reader more."""
        for page in self._pages:
            if page.message is work.message and page.buffers is work.buffers:
                page.readers += 1
                return page
        unread = [page for page in self._pages if not page.readers]
        if unread:
            page = unread[0]
        else:
            page = Page(self._number())
            self._pages.append(page)
        page.form, page.end = pack(_broadcast(work), page.memory)
        page.message, page.buffers, page.readers = work.message, work.buffers, 1
        return page

    def leave(self, page: Page) -> None:
        """One reader less."""
        page.readers -= 1

    def write(
        self, worker: int, slot: Slot, page: Page | None, content: Any, work: Work
    ) -> tuple[dict[str, Any], list[int]]:
        """Write an order into its slot.

        Args:
            page: with the broadcast, None where the clients' own ones go into the slot.

        Returns:
            What to tell the worker, and the files to send with it.
        """
        if page is None:
            form, end = pack((content, _broadcast(work)), slot.memory)
            inside, message = form["tuple"]
        else:
            inside, end = pack(content, slot.memory)
            message = page.form
        pieces: list[Slot | Page] = [slot] if page is None else [slot, page]
        sizes = {str(slot.number): end} | ({} if page is None else {str(page.number): page.end})
        known = self._known.setdefault(worker, set())
        new = [piece for piece in pieces if piece.number not in known]
        known.update(piece.number for piece in new)
        words = {
            "slot": slot.number,
            "end": end,
            "work": inside,
            "page": slot.number if page is None else page.number,
            "message": message,
            "sizes": sizes,
            "new": [piece.number for piece in new],
            "drop": self._dropped.pop(worker, []),
        }
        return words, [piece.memory.fd for piece in new]

    def lease(self, slot: Slot, size: int) -> Bytes:
        """The bytes of a slot's answer; the slot is free when nobody views them any more."""
        self.largest = max(self.largest, size)
        slot.memory.reach(size)
        lease = slot.memory.lease()
        weakref.finalize(lease, self._free.append, slot).atexit = False
        return lease

    def forget(self, worker: int) -> None:
        """This worker is gone; whoever takes its place has nothing."""
        self._known.pop(worker, None)
        self._dropped.pop(worker, None)

    def trim(self, most: int) -> None:
        """Give free slots back until there are no more than `most` slots."""
        while self._free and len(self._slots) > most:
            slot = self._free.pop(0)
            del self._slots[slot.number]
            slot.memory.close()
            for worker, known in self._known.items():
                if slot.number in known:
                    known.discard(slot.number)
                    self._dropped.setdefault(worker, []).append(slot.number)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers


def _broadcast(work: Work) -> Sequence[Any]:
    return (dict(work.message.vectors), dict(work.message.scalars), *work.buffers)
