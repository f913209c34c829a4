"""One writer per run folder: a lock that the operating system gives up when the process dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.errors import EnvironmentProblem
from fedsim.file_lock import try_lock
from fedsim.storage import problem

LOCK = ".lock"
_LOOKS, _LOOK_SECONDS = 50, 0.02  # whoever asks `is_locked` has the lock for an instant


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
        if not _taken(handle):
            raise EnvironmentProblem(
                f"another process is writing the run {folder.name}",
                code="FS-ENV-025",
                where=str(folder),
                hint="wait for it to end or stop it first; one run has one writer",
            )
        yield
    finally:
        os.close(handle)  # gives the lock up


def _taken(handle: int) -> bool:
    for _ in range(_LOOKS):
        if try_lock(handle):
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def is_locked(folder: Path) -> bool:
    """Whether a process is writing this run now."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False  # never locked, or not ours to write
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)
