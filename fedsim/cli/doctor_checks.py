"""What `fedsim doctor` looks at on this machine: versions, clock, disk, files of a state folder.

Each check answers with what it found and, where that is wrong, how to repair it. Nothing is changed by
looking.
"""

from __future__ import annotations

import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fedsim.errors import FedsimError

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
DISTRIBUTIONS = ("torch", "numpy", "grpcio", "protobuf", "cryptography", "safetensors", "SQLAlchemy")
LEAST_FREE, WANTED_FREE = 1024**3, 10 * 1024**3
WARN_DAYS = 7
# A clock that was never set stands at 1970, or at the date of the firmware.
_EARLIEST = datetime(2025, 1, 1, tzinfo=UTC)
_SECRETS = ("identity.key", "admin.key", "node.key")


class Finding(NamedTuple):
    """What one check found.

    Args:
        check: its name; state: ok, warning, failed or skipped.
        text: what was found; repair: what to do, "" where nothing is wrong.
    """

    check: str
    state: str
    text: str
    repair: str = ""


def problem_of(check: str, error: FedsimError) -> Finding:
    """A failed check from the error that it met."""
    where = f" ({error.where})" if error.where else ""
    text = f"{error.what}{where}" + (f": {error.why}" if error.why else "")
    return Finding(check, FAILED, text, error.hint or "")


def versions() -> Finding:
    """Whether everything that is needed is installed, and in which version."""
    import fedsim

    found, missing = [f"Python {sys.version.split()[0]}", f"fedsim {fedsim.__version__}"], []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("versions", FAILED, f"not installed: {', '.join(missing)}", "pip install fedsim")
    return Finding("versions", OK, ", ".join(found))


def clock(wall: Callable[[], float] = time.time) -> Finding:
    """Whether the clock was ever set; certificates are judged by it."""
    now = datetime.fromtimestamp(wall(), UTC)
    text = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < _EARLIEST:
        return Finding("clock", FAILED, f"{text} cannot be right", "set the clock, best by NTP: timedatectl")
    return Finding("clock", OK, text)


def disk(folder: Path) -> Finding:
    """How much is free where `folder` is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / 1024**3:.1f} GiB free at {place}"
    if free < LEAST_FREE:
        return Finding("disk", FAILED, text, "free some space: models and updates do not fit")
    if free < WANTED_FREE:
        why = "a coordinator pauses uploads below limits.min_free_bytes, 10 GiB by default"
        return Finding("disk", WARNING, f"{text}; {why}", "free some space, or lower that limit")
    return Finding("disk", OK, text)


def certificate(file: Path, now: datetime | None = None) -> Finding:
    """Dates and names of a certificate in a file."""
    from fedsim.certificate_files import check_dates, names_of, parse, read_file

    try:
        found = parse(read_file(file), file)
        check_dates(found, file, now=now)
    except FedsimError as error:
        return problem_of("certificate", error)
    ends = min(one.not_valid_after_utc for one in found)
    left = (ends - (now or datetime.now(UTC))).days
    names = ", ".join(names_of(found[0])) or "no name"
    text = f"{file}: made out to {names}, valid until {ends:%Y-%m-%d} ({left} days)"
    if left < WARN_DAYS:
        return Finding("certificate", WARNING, text, "put a new one in place; it is read without a restart")
    return Finding("certificate", OK, text)


def state_folder(folder: Path) -> Iterator[Finding]:
    """Everything about the state folder of a coordinator or a client."""
    if not folder.is_dir():
        repair = "fedsim server --state or fedsim client --state makes it; check the path"
        yield Finding("state", FAILED, f"{folder} is no folder", repair)
        return
    is_server = (folder / "fedsim.db").exists() or (folder / "identity.key").exists()
    is_client = (folder / "node.key").exists()
    if not is_server and not is_client:
        text = f"{folder} holds neither a coordinator's state nor a client's"
        yield Finding("state", FAILED, text, "name the folder that was given with --state")
        return
    yield _modes(folder)
    yield from _keys(folder)
    if is_server:
        yield from _coordinator(folder)
    elif (folder / "audit.jsonl").exists():
        text = f"{(folder / 'audit.jsonl').stat().st_size:,} bytes"
        yield Finding("audit", OK, text)


def _modes(folder: Path) -> Finding:
    """The folder and its databases are for one user."""
    if sys.platform == "win32":
        return Finding("modes", SKIPPED, "Windows has other permissions")
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IRWXO:
        text = f"{folder} has mode {mode:04o}: every user of this machine may look or write there"
        return Finding("modes", FAILED, text, f"chmod 700 {folder}")
    return Finding("modes", OK, f"{folder} has mode {mode:04o}")


def _keys(folder: Path) -> Iterator[Finding]:
    from fedsim.identity import Key

    for name in _SECRETS:
        if (folder / name).exists():
            try:
                key = Key.load(folder / name)
            except FedsimError as error:
                yield problem_of(name, error)
            else:
                yield Finding(name, OK, f"node {key.node_id}, {key.fingerprint}")


def _coordinator(folder: Path) -> Iterator[Finding]:
    """Database, identity and audit log; a coordinator that runs is left alone."""
    from fedsim.server import audit, sqlite_file
    from fedsim.server.state_keys import AUDIT, IDENTITY

    database = folder / sqlite_file.FILE
    if database.exists():
        yield _database(folder, database)
    else:
        text = f"{database.name} is not there; perhaps the state lies in PostgreSQL"
        yield Finding("database", WARNING, text, "otherwise restore the newest copy backup-*.db")
    if database.exists() and not (folder / IDENTITY).exists():
        text = f"{IDENTITY} is gone: clients would not know this coordinator any more"
        yield Finding(IDENTITY, FAILED, text, "restore it from a copy")
    log = folder / AUDIT
    if not log.exists():
        yield Finding("audit", WARNING, f"{AUDIT} is not there", "a coordinator that has run writes one")
        return
    try:
        head = audit.verify(log)
    except FedsimError as error:
        yield problem_of("audit", error)
    else:
        yield Finding("audit", OK, f"{head.seq} lines, each follows the one before; head {head.digest[:16]}")


def _database(folder: Path, file: Path) -> Finding:
    """The database as SQLite sees it; the folder is held meanwhile, so that no coordinator starts."""
    from fedsim.server import sqlite_file
    from fedsim.server.ledger_errors import LedgerInUse
    from fedsim.server.state_lock import StateLock

    try:
        lock = StateLock.take(folder)
    except LedgerInUse as error:
        return Finding("database", SKIPPED, f"the coordinator runs: {error.why}; stop it for this check")
    except FedsimError as error:
        return problem_of("database", error)
    try:
        sqlite_file.check(file)
    except FedsimError as error:
        return problem_of("database", error)
    finally:
        lock.release()
    size = file.stat().st_size / 1024**2
    return Finding("database", OK, f"{file.name} contradicts itself nowhere ({size:.1f} MiB)")
