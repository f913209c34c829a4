"""The audit log: one JSON line per security-relevant act, each with the SHA-256 of the line before.

A line that is changed, removed or put in breaks the chain at that place. Whoever can write the file can
also compute a whole new chain, or cut lines off its end; against that an anchor (number and digest of a
line) is exported from time to time and kept elsewhere, and `verify` compares.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fedsim.errors import EnvironmentProblem
from fedsim.server.ledger_errors import file_trouble
from fedsim.storage import sync_folder, write_all

START = "0" * 64
"""What the first line has in place of a digest."""
_OWN_KEYS = frozenset({"seq", "time", "action", "before"})
_BLOCK = 1 << 16


class Anchor(NamedTuple):
    """A line of the log, to be kept elsewhere.

    Args:
        seq: its number, from 1; 0 for an empty log.
        digest: SHA-256 of its bytes, hexadecimal.
    """

    seq: int
    digest: str


class Audit:
    """The log of one state folder, open for writing; every method may be called from any thread.

    Args:
        path: made where it does not exist, readable by the owner alone.
        wall: seconds since 1970.

    Raises:
        EnvironmentProblem: FS-LED-011, the last line is not one of ours; FS-LED-001 or 002, it cannot be
            written.
    """

    def __init__(self, path: Path, *, wall: Callable[[], float] = time.time) -> None:
        self.path = path
        self._wall = wall
        self._door = threading.Lock()
        try:
            new = not path.exists()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if new:
                sync_folder(path.parent)
            self._end = os.fstat(self._handle).st_size
            self._last, torn = self._read_end()
        except OSError as error:
            raise file_trouble(error, path) from error
        if torn:
            self._mend(torn)

    @property
    def head(self) -> Anchor:
        """The last line, to be exported as an anchor."""
        return self._last

    def write(self, action: str, **fields: object) -> Anchor:
        """Add one line; it is on the disk when this returns.

        Args:
            action: what was done, such as ``node.approve``.
            fields: who, to whom, from where. Bytes are written in hexadecimal. Never a secret.

        Raises:
            EnvironmentProblem: FS-LED-001 or 002; the log is as before.
            ValueError: a field has a name that the log itself uses.
        """
        if taken := _OWN_KEYS & fields.keys():
            raise ValueError(f"fields of the audit log itself: {', '.join(sorted(taken))}")
        with self._door:
            seq = self._last.seq + 1
            line = {
                "seq": seq,
                "time": round(self._wall(), 3),
                "action": action,
                **fields,
                "before": self._last.digest,
            }
            # ASCII: no line end, no control character, no direction mark reaches the file as it is.
            content = json.dumps(line, ensure_ascii=True, separators=(",", ":"), default=_plain).encode()
            try:
                os.lseek(self._handle, self._end, os.SEEK_SET)
                write_all(self._handle, content + b"\n")
                os.fsync(self._handle)
            except OSError as error:
                os.ftruncate(self._handle, self._end)
                raise file_trouble(error, self.path) from error
            self._end += len(content) + 1
            self._last = Anchor(seq, hashlib.sha256(content).hexdigest())
            return self._last

    def close(self) -> None:
        """Give the file up."""
        with self._door:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1

    def _read_end(self) -> tuple[Anchor, bytes]:
        """The last whole line, and what a crash left behind it."""
        begin, content = self._end, b""
        # Two line ends: that of the line before the last whole one, or the file's beginning.
        while begin > 0 and content.count(b"\n") < 2:
            size = min(_BLOCK, begin)
            begin -= size
            content = os.pread(self._handle, size, begin) + content
        whole, _, torn = content.rpartition(b"\n")
        if not whole:
            return Anchor(0, START), torn
        last = whole.rpartition(b"\n")[2]
        seq = _parsed(last, self.path, "its last line").seq
        return Anchor(seq, hashlib.sha256(last).hexdigest()), torn

    def _mend(self, torn: bytes) -> None:
        """A line that a crash cut was never confirmed to anybody; that it was there is written down."""
        self._end -= len(torn)
        try:
            os.ftruncate(self._handle, self._end)
        except OSError as error:
            raise file_trouble(error, self.path) from error
        self.write("audit.torn", bytes=len(torn), digest=hashlib.sha256(torn).hexdigest())


def verify(path: Path, anchor: Anchor | None = None) -> Anchor:
    """Check every line against the one before, and one line against an exported anchor.

    Returns:
        The last line.

    Raises:
        EnvironmentProblem: FS-LED-011, the first line that does not fit; FS-LED-002, the file cannot be
            read.
    """
    last = Anchor(0, START)
    met = anchor is None or anchor == last
    for number, content in enumerate(_lines(path), 1):
        line = _parsed(content, path, f"line {number}")
        if line.seq != number:
            raise _forged(path, f"line {number} has the number {line.seq}")
        if line.before != last.digest:
            raise _forged(path, f"line {number} does not follow line {number - 1} as it stands now")
        last = Anchor(number, hashlib.sha256(content).hexdigest())
        if anchor is not None and anchor.seq == number:
            if anchor.digest != last.digest:
                raise _forged(path, f"line {number} is not the one that was exported as an anchor")
            met = True
    if not met and anchor is not None:
        raise _forged(path, f"it ends with line {last.seq}; line {anchor.seq} was exported as an anchor")
    return last


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for content in file:
                if not content.endswith(b"\n"):
                    raise _forged(path, "its last line is torn; the coordinator mends that when it starts")
                yield content[:-1]
    except OSError as error:
        raise file_trouble(error, path) from error


class _Line(NamedTuple):
    seq: int
    before: str


def _parsed(content: bytes, path: Path, which: str) -> _Line:
    try:
        line = json.loads(content)
    except ValueError:
        line = None
    seq, before = (line.get("seq"), line.get("before")) if isinstance(line, dict) else (None, None)
    if not isinstance(seq, int) or not isinstance(before, str):
        raise _forged(path, f"{which} is no line of the log")
    return _Line(seq, before)


def _forged(path: Path, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        "the audit log was changed after it was written",
        code="FS-LED-011",
        where=str(path),
        why=why,
        hint="keep the file as it is and compare it with a copy; the lines before that place still hold",
    )


def _plain(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not belong into the audit log")
