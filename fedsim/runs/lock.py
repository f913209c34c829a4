"""One writer per run folder: a lock that the operating system gives up when the process dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.errors import EnvironmentProblem
from fedsim.file_lock import try_lock
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
        if not try_lock(handle):
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
        return not try_lock(handle)
    finally:
        os.close(handle)
