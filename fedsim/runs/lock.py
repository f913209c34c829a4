"""One writer per run folder: a lock that the operating system gives up when the process dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.errors import EnvironmentProblem
from fedsim.storage import problem

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for writing.

    Raises:
        EnvironmentProblem: FS-ENV-025, another process is writing this run.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise problem(error, folder / LOCK) from error
    try:
        if not _take(handle):
            raise EnvironmentProblem(
                f"another process is writing the run {folder.name}",
                code="FS-ENV-025",
                where=str(folder),
                hint="wait for it to end or stop it first; one run has one writer",
            )
        yield
    finally:
        os.close(handle)  # gives the lock up


def is_locked(folder: Path) -> bool:
    """Whether a process is writing this run now."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False  # never locked, or not ours to write
    try:
        return not _take(handle)
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
