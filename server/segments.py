"""Small updates of one window, one after the other in one file, synced once per group of commits.

A file per update would cost two syncs each. The row of an update names offset and size; bytes that no
row names (the operation failed, or the power) are never looked at. The file goes when its round goes.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from fedsim.server.ledger_errors import LedgerUnavailable, file_trouble
from fedsim.server.objects import lost
from fedsim.storage import sync_folder, write_all

_RUN = re.compile(r"[0-9a-f]{12}")
_FILE = re.compile(r"(\d+)-(\d+)\.seg")
# So much is copied rather than written by a call of the system for each update.
_TOGETHER_BYTES = 1 << 20
# macOS has no fdatasync.
_sync_data = getattr(os, "fdatasync", os.fsync)


class Window(NamedTuple):
    """What a segment belongs to."""

    run_id: str
    window: int
    attempt: int


class Segment:
    """One file that only grows. `append` belongs to the writer's thread, `read` to any.

    Args:
        path: made where it does not exist; what it holds already stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._door = threading.Lock()
        try:
            new = not path.exists()
            self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._end = self._safe = os.fstat(self._handle).st_size
            if new:
                sync_folder(path.parent)
        except OSError as error:
            raise file_trouble(error, path) from error

    def append(self, contents: Sequence[bytes]) -> list[int]:
        """Write updates at the end, one after the other, without a sync.

        Returns:
            Their offsets; they mean something only after `sync`.

        Raises:
            LedgerProblem: FS-LED-001 or 002; the segment is as long as before.
        """
        small = sum(map(len, contents)) <= _TOGETHER_BYTES
        with self._door:
            before = self._end
            try:
                os.lseek(self._open(), before, os.SEEK_SET)
                for piece in [b"".join(contents)] if small and len(contents) > 1 else contents:
                    write_all(self._open(), piece)
            except OSError as error:
                self._cut(before)
                raise file_trouble(error, self.path) from error
            *offsets, self._end = accumulate(map(len, contents), initial=before)
            return offsets

    def sync(self) -> None:
        """Force everything appended so far onto the disk.

        Raises:
            LedgerProblem: FS-LED-001 or 002; what was appended since the last sync is given up.
        """
        with self._door:
            if self._safe == self._end:
                return
            try:
                _sync_data(self._open())
            except OSError as error:
                # After a failed sync the kernel may have dropped the pages and call the next one a
                # success: those bytes are never to be named.
                self._cut(self._safe)
                raise file_trouble(error, self.path) from error
            self._safe = self._end

    def read(self, offset: int, size: int) -> memoryview:
        """The bytes of one update.

        Raises:
            EnvironmentProblem: FS-LED-012, the file is shorter than that, or cannot be read.
        """
        # Under the lock: a number of a closed file may already be that of another one.
        with self._door:
            try:
                content = os.pread(self._open(), size, offset)
            except OSError as error:
                raise lost(self.path, error.strerror or type(error).__name__) from error
        if len(content) != size:
            raise lost(self.path, f"it ends at {offset + len(content)}, {offset + size} bytes were promised")
        return memoryview(content)

    @property
    def size(self) -> int:
        """Bytes in the file, unsynced ones too."""
        return self._end

    def close(self) -> None:
        """Give the file up; it stays."""
        with self._door:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        with suppress(OSError):  # what stays is swept at the next start
            self.path.unlink(missing_ok=True)

    def _open(self) -> int:
        if self._handle is None:
            raise LedgerUnavailable("this round's updates are no longer kept", where=str(self.path))
        return self._handle

    def _cut(self, end: int) -> None:
        self._end = end
        with suppress(OSError):
            os.ftruncate(self._open(), end)


class Segments:
    """The segments of all runs, below ``<state>/segments/``; one `Segment` per file.

    Args:
        folder: made where it does not exist, readable by the owner alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Window, Segment] = {}
        self._door = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise file_trouble(error, folder) from error

    def path(self, window: Window) -> Path:
        """Where a window's segment lies.

        Raises:
            ValueError: no such run identifier (12 hexadecimal digits) or a negative number.
        """
        if not _RUN.fullmatch(window.run_id) or window.window < 0 or window.attempt < 0:
            raise ValueError(f"no window can be {window!r}")
        return self.folder / window.run_id / f"{window.window}-{window.attempt}.seg"

    def of(self, window: Window) -> Segment:
        """The segment of a window, made where there is none; the same object each time."""
        path = self.path(window)
        with self._door:
            if window not in self._open:
                try:
                    if not path.parent.is_dir():
                        path.parent.mkdir(mode=0o700, exist_ok=True)
                        sync_folder(self.folder)
                except OSError as error:
                    raise file_trouble(error, path) from error
                self._open[window] = Segment(path)
            return self._open[window]

    def remove(self, window: Window) -> None:
        """Delete a window's segment; one that is not there is no mistake."""
        with self._door:
            segment = self._open.pop(window, None)
        if segment is not None:
            segment.remove()
        else:
            with suppress(OSError):
                self.path(window).unlink(missing_ok=True)

    def forget_run(self, run_id: str) -> None:
        """Delete every segment of a run."""
        for window in self.present():
            if window.run_id == run_id:
                self.remove(window)
        with suppress(OSError):  # not there, or something else lies in it
            (self.folder / run_id).rmdir()

    def present(self) -> list[Window]:
        """The windows that have a file, for the sweep at start; in order."""
        found = []
        for folder in self.folder.iterdir():
            if folder.is_dir() and _RUN.fullmatch(folder.name):
                names = [_FILE.fullmatch(file.name) for file in folder.iterdir()]
                found += [Window(folder.name, int(name[1]), int(name[2])) for name in names if name]
        return sorted(found)

    def close(self) -> None:
        """Give every file up."""
        with self._door:
            segments, self._open = list(self._open.values()), {}
        for segment in segments:
            segment.close()
