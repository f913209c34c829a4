"""The lock of a file: one handle at a time, given back by closing."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from fedsim.file_lock import try_lock


def test_one_handle_has_the_lock_until_it_is_closed(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert try_lock(first)
    assert not try_lock(second)
    os.close(first)
    assert try_lock(second)
    os.close(second)


def test_a_file_system_without_locks_is_no_other_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    handle = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
        try_lock(handle)
    os.close(handle)
