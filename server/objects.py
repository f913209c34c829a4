"""Immutable bytes, named by their SHA-256 and stored once, below ``<state>/objects/``.

A name is whole or absent: the bytes are written and synced beside it first, then renamed. Paths are
made from 32-byte digests alone, never from what somebody sent as a name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from fedsim.bundle import Object
from fedsim.errors import EnvironmentProblem
from fedsim.server.ledger_errors import file_trouble
from fedsim.storage import sync_file, sync_folder, write_all

DIGEST_BYTES = 32
_UNFINISHED = ".writing-"


class Objects:
    """The store below one folder; every method may be called from any thread.

    Args:
        folder: made where it does not exist, readable by the owner alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._door = threading.Lock()  # between bytes that come and bytes that go
        self._held: Counter[bytes] = Counter()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise file_trouble(error, folder) from error

    def path(self, digest: bytes) -> Path:
        """Where the object lies, or would lie.

        Args:
            digest: 32 bytes.

        Raises:
            ValueError: it has another length or type.
        """
        if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
            raise ValueError("a digest has 32 bytes")
        name = digest.hex()
        return self.folder / name[:2] / name[2:]

    def has(self, digest: bytes) -> bool:
        """Whether the object is there."""
        return self.path(digest).is_file()

    def size(self, digest: bytes) -> int | None:
        """Bytes of the object, None where it is not there."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def put(self, content: bytes) -> Object:
        """Store bytes; they are safe when this returns. Storing them again changes nothing.

        Raises:
            LedgerProblem: FS-LED-001 or 002; no object of that name appeared.
        """
        digest = hashlib.sha256(content).digest()
        final = self.path(digest)
        found = Object(digest, len(content))
        # Another length under the name is damage from outside: the right bytes replace it.
        if self.size(digest) == found.size:
            return found
        unfinished = final.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
        try:
            self._make_folder(final.parent)
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                write_all(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(unfinished, final)
            sync_folder(final.parent)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise file_trouble(error, final) from error
        return found

    def adopt(self, file: Path, digest: bytes) -> Object:
        """Take a finished file of the same disk over as an object; whoever calls has checked its digest.

        Raises:
            LedgerProblem: FS-LED-001 or 002; the file is where it was, or is the object.
        """
        final = self.path(digest)
        try:
            size = file.stat().st_size
            sync_file(file)
            self._make_folder(final.parent)
            with self._door:
                os.replace(file, final)
            sync_folder(final.parent)
            sync_folder(file.parent)
        except OSError as error:
            raise file_trouble(error, final) from error
        return Object(digest, size)

    def scratch(self) -> Path:
        """A name for a file that is still to be written and then adopted; swept at start if it is not."""
        folder = self.folder / "00"
        try:
            self._make_folder(folder)
        except OSError as error:
            raise file_trouble(error, folder) from error
        return folder / f"{_UNFINISHED}{secrets.token_hex(8)}"

    def read(self, digest: bytes) -> bytes:
        """The bytes of an object, checked.

        Raises:
            EnvironmentProblem: FS-LED-012, it is missing or damaged.
        """
        path = self.path(digest)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise lost(path, error.strerror or type(error).__name__) from error
        if hashlib.sha256(content).digest() != digest:
            raise lost(path, "its bytes have another digest")
        return content

    def hold(self, digest: bytes) -> None:
        """Keep an object that is about to be stored until a row names it, even where it was to be removed."""
        with self._door:
            self._held[digest] += 1

    def release(self, digest: bytes) -> None:
        """The other half of `hold`."""
        with self._door:
            self._held[digest] -= 1
            if self._held[digest] <= 0:
                del self._held[digest]

    def remove(
        self,
        digests: Iterable[bytes],
        *,
        unless: Callable[[Sequence[bytes]], Container[bytes]] = lambda digests: (),
    ) -> None:
        """Delete objects that nobody holds; those that are not there are no mistake.

        Args:
            unless: those of some digests that rows name, which stay.
        """
        with self._door:
            there = [digest for digest in digests if digest not in self._held and self.has(digest)]
            kept = unless(there) if there else ()
            for digest in there:
                if digest not in kept:
                    with suppress(OSError):  # what stays is swept at the next start
                        self.path(digest).unlink(missing_ok=True)

    def sweep(self, keep: Container[bytes]) -> int:
        """Delete what a crash left: unfinished files, and objects that no row names. At start only.

        Args:
            keep: digests of the objects that rows name.

        Returns:
            How many files were deleted.
        """
        removed = 0
        for folder in self.folder.iterdir():
            if not folder.is_dir() or len(folder.name) != 2:
                continue
            for file in folder.iterdir():
                digest = _digest_of(file)
                # A file that is neither ours nor unfinished is somebody else's: left alone.
                gone = digest not in keep if digest is not None else file.name.startswith(_UNFINISHED)
                if gone:
                    with suppress(OSError):
                        file.unlink()
                        removed += 1
        return removed

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self.folder)


def _digest_of(file: Path) -> bytes | None:
    name = file.parent.name + file.name
    if len(name) != 2 * DIGEST_BYTES or name != name.lower():
        return None
    try:
        return bytes.fromhex(name)
    except ValueError:
        return None


def lost(path: Path, why: str) -> EnvironmentProblem:
    """The error for bytes that a row names and the disk no longer has."""
    return EnvironmentProblem(
        "a stored object is missing or damaged",
        code="FS-LED-012",
        where=str(path),
        why=why,
        hint="check the disk; a run goes on from the last round whose files are whole",
    )
