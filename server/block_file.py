"""A file that grows at its end, in large aligned blocks that go to the disk past the page cache.

What is uploaded is not read again before all of it is here, and a page of cache that is used for the first
time costs more than writing it to the disk. A block is written in a thread while the next one arrives. Where
the file system takes no such writes, or all blocks are in use, bytes go through the page cache as they come.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

BLOCK_BYTES = 4 << 20
MOST_BLOCKS = 16
"""In memory, for all files together."""
_ALIGNED = 4096  # every common disk takes this; one that does not says so
_THREADS = 4
_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none


class Blocks:
    """The memory of blocks, used again and again, and the threads that write them.

    Args:
        most: blocks at a time; whoever finds none free does without.
    """

    def __init__(self, most: int = MOST_BLOCKS) -> None:
        self._left = most
        self._free: list[mmap.mmap] = []
        self._door = threading.Lock()
        self.threads = ThreadPoolExecutor(_THREADS, "blocks")

    def take(self) -> mmap.mmap | None:
        """A block, None where all are in use. Its content is anything."""
        with self._door:
            if self._free:
                return self._free.pop()
            if not self._left:
                return None
            try:
                block = mmap.mmap(-1, BLOCK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError:  # no memory: it goes without
                return None
            self._left -= 1
            return block

    def give_back(self, block: mmap.mmap) -> None:
        """The block is free again."""
        with self._door:
            self._free.append(block)

    def close(self) -> None:
        """End the threads; what they were given is written."""
        self.threads.shutdown()


class BlockFile:
    """One file, written by one thread at a time.

    Args:
        path: made where it does not exist.
        blocks: None for a file that is too small to gain by them.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, blocks: Blocks | None) -> None:
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        """For reading, cutting and syncing."""
        self.written = 0
        """Up to here, everything was given to the system; a sync makes it safe."""
        self._blocks = blocks
        self._direct: int | None = None
        if blocks is not None and _DIRECT:
            with suppress(OSError):  # not on this file system
                self._direct = os.open(path, os.O_WRONLY | _DIRECT)
        self._end = 0  # of what was appended
        self._block: mmap.mmap | None = None
        self._filled = 0
        self._under_way: Future[int] | None = None

    def begin(self, end: int) -> None:
        """Drop what lies behind `end`, and append there."""
        os.ftruncate(self.handle, end)
        self.written = self._end = end

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes at the end; they may wait in a block.

        Raises:
            OSError: these, or some before them, could not be written: nothing may follow.
        """
        rest = memoryview(data)
        while rest:
            if self._block is None:
                rest = rest[self._without_block(rest) :]
            if rest and self._block is not None:
                count = min(len(rest), BLOCK_BYTES - self._filled)
                self._block[self._filled : self._filled + count] = rest[:count]
                self._filled += count
                self._end += count
                rest = rest[count:]
                if self._filled == BLOCK_BYTES:
                    self._start_writing()

    def flush(self) -> None:
        """Give everything to the system.

        Raises:
            OSError: not all of it was taken.
        """
        if self._block is not None:
            self._start_writing()
        self._settle()

    def drop(self) -> None:
        """Forget what waits in a block; what is being written is waited for."""
        with suppress(OSError):
            self._settle()
        block, self._block = self._block, None
        if block is not None and self._blocks is not None:
            self._blocks.give_back(block)

    def close(self) -> None:
        """Give the file up, with what still waits in a block."""
        self.drop()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
        os.close(self.handle)

    def _without_block(self, data: memoryview) -> int:
        """Begin a block where that is possible, else write up to where it is; bytes that were written."""
        count = len(data)
        if self._direct is not None and self._blocks is not None:
            ahead = -self._end % _ALIGNED
            if not ahead:
                self._block, self._filled = self._blocks.take(), 0
                if self._block is not None:
                    return 0
            elif ahead < count:
                count = ahead
        self._settle()
        self.written = self._end = _write(self.handle, data[:count], self._end)
        return count

    def _start_writing(self) -> None:
        self._settle()
        block, self._block = self._block, None
        assert block is not None
        assert self._blocks is not None
        self._under_way = self._blocks.threads.submit(self._write_block, block, self._filled, self.written)

    def _settle(self) -> None:
        """Wait for the block that is being written."""
        writing, self._under_way = self._under_way, None
        if writing is not None:
            self.written = writing.result()

    def _write_block(self, block: mmap.mmap, count: int, at: int) -> int:
        assert self._direct is not None
        assert self._blocks is not None
        data = memoryview(block)[:count]
        aligned = count - count % _ALIGNED
        try:
            try:
                end = _write(self._direct, data[:aligned], at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # The device wants another alignment, or took a part that has none.
                end = _write(self.handle, data[:aligned], at)
            return _write(self.handle, data[aligned:], end)
        finally:
            self._blocks.give_back(block)


def _write(handle: int, data: memoryview, at: int) -> int:
    """Write all of it; where it ends."""
    while data:
        count = os.pwrite(handle, data, at)
        data, at = data[count:], at + count
    return at
