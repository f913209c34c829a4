"""One coordinator per state folder: a lock that the operating system gives up when the process dies.

Whoever finds it taken is told by whom: process, host and start are written into the file.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from fedsim.file_lock import try_lock
from fedsim.server.ledger_errors import LedgerInUse, file_trouble

LOCK = "lock"


class StateLock:
    """The state folder, held by this process until `release` or its end."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    @classmethod
    def take(cls, folder: Path) -> StateLock:
        """Hold `folder`, which exists.

        Raises:
            LedgerProblem: FS-LED-007, another coordinator holds it; FS-LED-001 or 002, the file cannot be
                written.
        """
        path = folder / LOCK
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise file_trouble(error, path) from error
        try:
            if not try_lock(handle):
                raise _in_use(folder, handle)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": _now()}
            try:
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(owner).encode() + b"\n")
                os.fsync(handle)
            except OSError as error:
                raise file_trouble(error, path) from error
        except BaseException:
            os.close(handle)
            raise
        return cls(handle)

    def release(self) -> None:
        """Let the folder go; the file stays, without an owner."""
        if self._handle is not None:
            with suppress(OSError):  # a full disk must not keep the lock
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _in_use(folder: Path, handle: int) -> LedgerInUse:
    owner = {}
    with suppress(OSError, ValueError):
        owner = json.loads(os.pread(handle, 4096, 0))
    # Between taking the lock and writing the name there is a moment without one.
    known = isinstance(owner, dict) and {"pid", "host", "start"} <= owner.keys()
    return LedgerInUse(
        "another coordinator uses this state folder",
        where=str(folder),
        why=f"process {owner['pid']} on {owner['host']}, since {owner['start']}"
        if known
        else "its owner has not written its name yet",
        hint="stop that one first, or give this one a folder of its own with --state DIR",
    )
