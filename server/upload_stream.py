"""One upload under way: chunks in, each checked; bytes safe on the disk at each sync; a digest at the end."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from grpc import StatusCode

from fedsim.bundle import Object
from fedsim.server.block_file import BLOCK_BYTES, BlockFile, Blocks
from fedsim.server.failpoints import reached
from fedsim.server.ledger_errors import LedgerProblem, file_trouble
from fedsim.server.objects import Objects
from fedsim.server.upload_rows import Row, UploadRefused, UploadRows, from_ledger, overtaken
from fedsim.storage import sync_folder

log = logging.getLogger(__name__)

SYNC_BYTES, SYNC_SECONDS = 32 << 20, 2.0
"""Received between two syncs, at most, whichever comes first; a coordinator that is killed loses no more."""
LEAST_BLOCKWISE = 2 * BLOCK_BYTES
"""Smaller uploads are written as they come."""
_BLOCK = 1 << 20
_WRONG = StatusCode.INVALID_ARGUMENT
# macOS has no fdatasync.
_sync_data = getattr(os, "fdatasync", os.fsync)


class Upload:
    """A stream of chunks into one file; made by `Uploads.start`, closed in every case.

    Its methods may be called from any thread, one at a time; `fence` at any time.

    Args:
        row: what was asked for.
        file: the unfinished file.
        blocks: for the files of large uploads.
        max_strikes: as many broken chunks or digests, and the upload is thrown away.
        ended: called once, when the stream takes no more.
    """

    def __init__(
        self,
        row: Row,
        file: Path,
        *,
        rows: UploadRows,
        objects: Objects,
        blocks: Blocks,
        max_strikes: int,
        ended: Callable[[Upload], None],
    ) -> None:
        self._row = row
        self._file = file
        self._rows = rows
        self._objects = objects
        self._blocks = blocks
        self._max_strikes = max_strikes
        self._ended = ended
        self.door = threading.RLock()
        """Held by each method, and by `Uploads.start` from the first moment to the open file."""
        self._fenced = False
        self._open: BlockFile | None = None
        self._broken = False
        self._synced = 0.0  # when, on a monotonic clock
        self._hash = hashlib.sha256()
        self._received = 0
        self._ignored = 0

    @property
    def offset(self) -> int:
        """The byte that is expected next; `sync` returns those that are safe."""
        return self._received

    @property
    def generation(self) -> int:
        """Which stream of the upload this is."""
        return self._row.generation

    @property
    def task_id(self) -> bytes:
        """The task whose update is sent."""
        return self._row.task_id

    def open(self, row: Row) -> None:
        """Go on at the offset of the row; called by `Uploads.start` alone.

        Raises:
            UploadRefused: overtaken meanwhile.
            LedgerProblem: the file cannot be opened.
        """
        with self.door:
            self._row = row
            if self._fenced:
                raise overtaken()
            if row.complete:
                if not self._objects.has(row.digest) and self._file.exists():
                    # Checked, and then the disk did not take the new name.
                    self._objects.adopt(self._file, row.digest)
                if self._objects.has(row.digest):
                    self._received = row.size
                    return
                self._row = row = self._rows.restart(row)
            try:
                file = self._open_file()
                if os.fstat(file.handle).st_size < row.offset:
                    # Only damage from outside does that; the node is told the truth.
                    log.warning("the file of an upload is shorter than its row says: it begins again")
                    self._row = row = self._rows.restart(row)
                # What lies behind the offset was never synced.
                file.begin(row.offset)
                self._hash_again(file, row.offset)
            except OSError as error:
                self._close_file()
                raise file_trouble(error, self._file) from error
            except BaseException:
                self._close_file()
                raise
            self._received = row.offset
            self._synced = time.monotonic()

    def write(self, offset: int, data: bytes | memoryview, crc32: int) -> None:
        """Take one chunk.

        Args:
            offset: of its first byte.
            data: at least one byte; what lies below the offset already is ignored.
            crc32: of `data`.

        Raises:
            UploadRefused: DATA_LOSS for a wrong checksum; INVALID_ARGUMENT for an empty chunk, one that
                overlaps, or one beyond the size; FAILED_PRECONDITION with the right offset for a gap;
                RESOURCE_EXHAUSTED for a full disk. Broken chunks count as strikes.
        """
        with self.door:
            self._check_open()
            end = offset + len(data)
            if not data:
                raise self._strike(UploadRefused(_WRONG, "an empty chunk"))
            if end > self._row.size:
                raise self._strike(UploadRefused(_WRONG, f"the object has {self._row.size} bytes, not {end}"))
            if zlib.crc32(data) != crc32:
                lost = UploadRefused(StatusCode.DATA_LOSS, f"the chunk at {offset} is damaged")
                raise self._strike(lost, offset=self._received)
            if end <= self._received:
                self._ignore(len(data))
                return
            if offset < self._received:
                text = f"the chunk at {offset} overlaps what is there: go on at {self._received}"
                raise self._strike(UploadRefused(_WRONG, text), offset=self._received)
            if offset > self._received:
                text = f"a gap before {offset}: go on at {self._received}"
                gap = UploadRefused(StatusCode.FAILED_PRECONDITION, text)
                raise self._strike(gap, offset=self._received)
            self._append(data)
            late = time.monotonic() - self._synced >= SYNC_SECONDS
            if late or self._received - self._row.offset >= SYNC_BYTES:
                self.sync()

    def sync(self) -> int:
        """Make what arrived safe and record it.

        Returns:
            The committed offset: below it nothing is sent again.

        Raises:
            UploadRefused: overtaken, or the disk or the database does not take it.
        """
        with self.door:
            self._check_open()
            if self._received > self._row.offset:
                self._sync_file()
                self._row = self._recorded(lambda: self._rows.advance(self._row, self._received))
            return self._row.offset

    def finish(self) -> Object:
        """Check the digest and hand the file over to the object store.

        Raises:
            UploadRefused: FAILED_PRECONDITION with the right offset where bytes are missing; DATA_LOSS
                where the digest is another one: then the upload begins again at 0.
        """
        with self.door:
            if self._row.complete:
                return Object(self._row.digest, self._row.size)
            self._check_open()
            if self._received < self._row.size:
                text = f"{self._row.size - self._received} bytes are missing: go on at {self._received}"
                raise UploadRefused(StatusCode.FAILED_PRECONDITION, text, offset=self._received)
            if self._hash.digest() != self._row.digest:
                wrong = UploadRefused(StatusCode.DATA_LOSS, "the bytes have another digest than announced")
                refusal = self._strike(wrong, offset=0)
                self._discard()
                raise refusal
            self._sync_file()
            # The row first: a crash after it finds a checked file to rename, one before it resumes.
            self._row = self._recorded(lambda: self._rows.advance(self._row, self._row.size, complete=True))
            self._close_file()
            try:
                found = self._objects.adopt(self._file, self._row.digest)
            except LedgerProblem as error:
                raise from_ledger(error) from error
            reached("object_renamed")
            return found

    def fence(self) -> None:
        """Take no more: a newer stream goes on. What arrived is kept."""
        self._fenced = True  # before the lock: a long re-reading ends early
        self.close()

    def close(self) -> None:
        """Give the file up and keep what arrived; again is no mistake."""
        with self.door:
            if self._open is not None:
                with suppress(UploadRefused):
                    if self._received > self._row.offset:
                        self._sync_file()
                        self._row = self._recorded(lambda: self._rows.advance(self._row, self._received))
                self._close_file()
        self._ended(self)

    def _open_file(self) -> BlockFile:
        if not self._file.parent.is_dir():
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._file.parent.parent)
        new = not self._file.exists()
        large = self._row.size >= LEAST_BLOCKWISE
        self._open = BlockFile(self._file, self._blocks if large else None)
        if new:
            sync_folder(self._file.parent)
        return self._open

    def _hash_again(self, file: BlockFile, end: int) -> None:
        at = 0
        while at < end:
            if self._fenced:
                raise overtaken()
            block = os.pread(file.handle, min(_BLOCK, end - at), at)
            self._hash.update(block)
            at += len(block)

    def _append(self, data: bytes | memoryview) -> None:
        file = self._opened()
        try:
            file.append(data)
        except OSError as error:
            raise self._lost(file, error) from error
        self._hash.update(data)
        self._received += len(data)

    def _sync_file(self) -> None:
        file = self._opened()
        try:
            file.flush()
        except OSError as error:
            raise self._lost(file, error) from error
        try:
            _sync_data(file.handle)
        except OSError as error:
            # The kernel may have dropped the pages: the next stream begins at the last safe offset.
            self._received = self._row.offset
            self._close_file()
            raise from_ledger(file_trouble(error, self._file)) from error
        self._synced = time.monotonic()
        reached("upload_synced")

    def _lost(self, file: BlockFile, error: OSError) -> UploadRefused:
        """What was written before is kept when the stream is closed, and no more is taken."""
        file.drop()
        self._received = max(file.written, self._row.offset)
        self._broken = True
        return from_ledger(file_trouble(error, self._file))

    def _recorded(self, change: Callable[[], Row]) -> Row:
        try:
            return change()
        except LedgerProblem as error:
            raise from_ledger(error) from error

    def _ignore(self, count: int) -> None:
        self._ignored += count
        if self._ignored > self._row.size:
            raise self._strike(UploadRefused(_WRONG, "the same bytes again and again"), offset=self._received)

    def _strike(self, refusal: UploadRefused, *, offset: int | None = None) -> UploadRefused:
        """Count it; the last one throws the upload away. Returns what to raise."""
        refusal.offset = offset
        self._row = self._recorded(lambda: self._rows.strike(self._row))
        if self._row.strikes >= self._max_strikes:
            self._discard()
            refusal.text += "; too much of this upload was broken, it is thrown away"
        return refusal

    def _discard(self) -> None:
        self._received = 0
        self._close_file()
        # The row stays: it carries the strikes.
        self._row = self._recorded(lambda: self._rows.restart(self._row))
        with suppress(OSError):  # what stays is cut to the offset by the next stream
            self._file.unlink(missing_ok=True)

    def _check_open(self) -> None:
        if self._fenced:
            raise overtaken()
        if (self._open is None or self._broken) and not self._row.complete:
            raise UploadRefused(
                StatusCode.FAILED_PRECONDITION,
                "this stream is over: begin a new one",
                offset=self._row.offset,
            )

    def _opened(self) -> BlockFile:
        if self._open is None:
            raise overtaken()
        return self._open

    def _close_file(self) -> None:
        file, self._open = self._open, None
        if file is not None:
            file.close()
