"""Writing to disk so that a reader sees a whole file or none, and a full disk is an error with a remedy."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

from fedsim.errors import EnvironmentProblem

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
}  # fmt: skip


def problem(error: OSError, path: Path) -> EnvironmentProblem:
    """The error for a user when `path` could not be written.

    FS-ENV-020 where writing there is not possible at all, FS-ENV-021 where space, quota or the largest
    allowed file size ran out, FS-ENV-022 for anything else that the operating system reports.
    """
    said = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return EnvironmentProblem(
            f"no space left to write {path.name}",
            code="FS-ENV-021",
            where=str(path),
            why=said,
            hint="free some space and resume the run, or choose another disk with --runs DIR",
        )
    if error.errno in _FORBIDDEN:
        return EnvironmentProblem(
            f"{path.name} cannot be written",
            code="FS-ENV-020",
            where=str(path),
            why=said,
            hint="choose a folder that you may write to: --runs DIR or the variable FEDSIM_RUNS",
        )
    return EnvironmentProblem(
        f"writing {path.name} failed",
        code="FS-ENV-022",
        where=str(path),
        why=said,
        hint="check the disk; nothing that was written before is lost, the run can be resumed",
    )


def unreadable(error: OSError, path: Path) -> EnvironmentProblem:
    """The error for a user when `path` could not be read: FS-ENV-024."""
    return EnvironmentProblem(
        f"{path.name} cannot be read",
        code="FS-ENV-024",
        where=str(path),
        why=error.strerror or type(error).__name__,
        hint="check that the file is there and that you may read it",
    )


def damaged(path: Path, why: str) -> EnvironmentProblem:
    """The error for a user when `path` holds something else than it should: FS-ENV-023."""
    return EnvironmentProblem(
        f"{path.name} is damaged",
        code="FS-ENV-023",
        where=str(path),
        why=why,
        hint="restore the file from a copy, or start the run again",
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: written beside it, synced, renamed.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022; the old file, if there was one, is untouched.
    """
    unfinished = path.with_name(f".writing-{secrets.token_hex(8)}")
    try:
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                write_all(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise problem(error, path) from error


def append_whole(path: Path, content: bytes) -> None:
    """Add `content` at the end of `path`, all of it or nothing.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022; the file is as long as before.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(handle).st_size
            try:
                write_all(handle, content)
            except OSError:
                # Should this fail too, the torn line is dropped when the run is resumed.
                with suppress(OSError):
                    os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise problem(error, path) from error


def write_all(handle: int, content: bytes | memoryview) -> None:
    """Write every byte; one call may write fewer than it was given, as on a disk that is filling up."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def sync_file(path: Path) -> None:
    """Force what was written to `path` onto the disk; nothing to do when it does not exist."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` onto the disk, where the system can do that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
