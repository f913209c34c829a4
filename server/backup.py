"""A coordinator's state folder into one file and back, and what of it may be shown to others.

A copy that is restored is an older self: its incarnation grows, so that clients which saw more refuse to go
back without their owners' word.
"""

from __future__ import annotations

import io
import json
import platform
import tarfile
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import select

from fedsim import __version__
from fedsim.errors import ConfigError
from fedsim.server.database import Database, open_database
from fedsim.server.state_lock import StateLock
from fedsim.server.tables import events, nodes, runs, windows
from fedsim.storage import problem

PASSING = frozenset({"lock", "listening.json"})
"""Files that belong to a running process, not to the state."""
LAST_EVENTS = 500


def back_up(state: Path, target: Path) -> int:
    """Write the state folder of a coordinator that is not running into a tar file, readable by its owner.

    Returns:
        How many files and folders it holds.

    Raises:
        EnvironmentProblem: FS-LED-007, the coordinator runs; FS-ENV-020 … 022, the file cannot be written.
        ConfigError: FS-SRV-060, there is no state in the folder.
    """
    _require_state(state)
    lock = StateLock.take(state)
    try:
        files = [path for path in sorted(state.rglob("*")) if path.name not in PASSING]
        unfinished = target.with_name(f".writing-{target.name}")
        try:
            with unfinished.open("xb") as raw:
                unfinished.chmod(0o600)
                with tarfile.open(fileobj=raw, mode="w") as tar:
                    for path in files:
                        tar.add(path, arcname=str(path.relative_to(state)), recursive=False)
            unfinished.replace(target)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise problem(error, target) from error
    finally:
        lock.release()
    return len(files)


def restore(source: Path, state: Path) -> int:
    """Unpack a backup into a folder that is empty or not there.

    Returns:
        The incarnation that the coordinator has from now on.

    Raises:
        ConfigError: FS-SRV-061, the folder holds something; FS-SRV-062, the file is no backup.
    """
    if state.exists() and any(state.iterdir()):
        raise ConfigError(
            "the folder to restore into is not empty",
            code="FS-SRV-061",
            where=str(state),
            why="a state that is there would be lost",
            hint="name a new folder, or move the old one away",
        )
    try:
        with tarfile.open(source) as tar:
            names = tar.getnames()
            if "identity.key" not in names:
                raise tarfile.TarError("it holds no identity.key")
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            tar.extractall(state, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(
            "the backup cannot be read",
            code="FS-SRV-062",
            where=str(source),
            why=str(error),
            hint="give a file that fedsim state backup wrote",
        ) from error
    database = open_database("sqlite", state)
    try:
        return database.next_incarnation()
    finally:
        database.close()


def support_bundle(state: Path, target: Path) -> list[str]:
    """What helps to find a mistake, without keys, tokens, updates or models: a tar file of texts.

    Returns:
        The names of its files.

    Raises:
        EnvironmentProblem, ConfigError: as `back_up`.
    """
    _require_state(state)
    database = open_database("sqlite", state)
    try:
        texts = dict(_texts(database))
    finally:
        database.close()
    for folder in sorted((state / "runs").glob("*")):
        for name in ("config.toml", "manifest.json", "metrics.jsonl", "log.txt", "journal.jsonl"):
            if (folder / name).is_file():
                texts[f"runs/{folder.name}/{name}"] = (folder / name).read_text("utf-8", "replace")
    try:
        with tarfile.open(target, "x:gz") as tar:
            for name, text in texts.items():
                content = text.encode()
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    except OSError as error:
        raise problem(error, target) from error
    return list(texts)


def _texts(database: Database) -> Iterator[tuple[str, str]]:
    facts = {"fedsim": __version__, "python": platform.python_version(), "system": platform.platform()}
    yield "versions.json", json.dumps(facts, indent=2)
    shown = {
        "nodes": [nodes.c[n] for n in ("node_id", "name", "role", "state", "last_seen", "build", "device")],
        "runs": [runs.c[n] for n in ("run_id", "name", "state", "detail", "rounds_done", "recoveries")],
        "windows": [windows.c[n] for n in ("run_id", "window", "attempt", "version", "outcome", "clock")],
    }
    with database.read() as connection:
        for name, columns in shown.items():
            rows = connection.execute(select(*columns)).mappings()
            yield f"{name}.jsonl", "".join(json.dumps(dict(row)) + "\n" for row in rows)
        last = select(events).order_by(events.c.revision.desc()).limit(LAST_EVENTS)
        rows = connection.execute(last).mappings()
        yield "events.jsonl", "".join(json.dumps(dict(row)) + "\n" for row in rows)


def _require_state(state: Path) -> None:
    if not (state / "identity.key").is_file():
        raise ConfigError(
            "there is no coordinator's state in this folder",
            code="FS-SRV-060",
            where=str(state),
            hint="name the folder that fedsim server was started with: --state DIR",
        )
