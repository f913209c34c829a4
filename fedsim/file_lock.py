"""A lock on an open file that the operating system gives up when the process ends, however it ends."""

from __future__ import annotations

import os
import sys

# Windows locks bytes, and nobody else can read those: one far behind any text is taken.
_FAR = 1 << 30


def try_lock(handle: int) -> bool:
    """Take the lock of a file without waiting; closing the file gives it back.

    Args:
        handle: number of the open file, writable.

    Returns:
        Whether it is taken now; False where another handle has it.

    Raises:
        OSError: the file system has no locks, or has none left.
    """
    if sys.platform == "win32":
        import msvcrt

        before = os.lseek(handle, 0, os.SEEK_CUR)
        os.lseek(handle, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, before, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
