"""The folder of one client: what it must remember over restarts, and the lock that keeps others out.

    node.json              the coordinator that this client is bound to
    states/RUN/            what it keeps between its answers (fedsim.client.client_states)
    unsent/TASK/           answers that were not handed in yet (fedsim.client.unsent)
    objects/DIGEST         models that were fetched for the task in hand
    held                   that task
    lock, audit.jsonl      one process at a time; what was refused

Written so that a reader sees a whole file or none. Files whose loss costs nothing but time are not forced
onto the disk: a round of a tiny model must not wait for it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from fedsim.client.audit import Audit
from fedsim.client.client_states import ClientStates
from fedsim.client.unsent import UnsentAnswers
from fedsim.errors import EnvironmentProblem
from fedsim.file_lock import try_lock
from fedsim.pb import federation_pb2 as pb
from fedsim.storage import damaged, problem, unreadable, write_atomically


@dataclass(frozen=True, slots=True)
class Bound:
    """The coordinator of this folder.

    Args:
        server_id: its public key, empty before the first connection.
        incarnation: the newest that was seen; it grows when a backup is restored.
        enrolled: this client's key was let in.
        name: by which the coordinator knows this client.
    """

    server_id: bytes = b""
    incarnation: int = 0
    enrolled: bool = False
    name: str = ""


class StateFolder:
    """The folder of one client, locked by this process.

    Args:
        path: made where it does not exist, readable by its owner alone.

    Raises:
        EnvironmentProblem: FS-CLI-008, another process uses the folder; FS-ENV-020 … 024 for the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock: IO[str] | None = _lock(path / "lock")
            for name in ("states", "unsent", "objects"):
                (path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise problem(error, path) from error
        self.audit = Audit(path / "audit.jsonl")
        self.states = ClientStates(path / "states")
        self.unsent = UnsentAnswers(path / "unsent")
        self.bound = _read_bound(path / "node.json")

    def bind(self, bound: Bound) -> None:
        """Remember the coordinator, safely on disk."""
        values = asdict(bound) | {"server_id": bound.server_id.hex()}
        write_atomically(self.path / "node.json", json.dumps(values, indent=2).encode())
        self.bound = bound

    def hold(self, body: bytes) -> None:
        """Remember the task in hand, a serialised Task; losing the note costs a download."""
        unfinished = self.path / f".held-{secrets.token_hex(4)}"
        try:
            unfinished.write_bytes(body)
            os.replace(unfinished, self.path / "held")
        except OSError as error:
            raise problem(error, self.path / "held") from error

    def held(self) -> pb.Task | None:
        """The task that was in hand when the process before this one ended."""
        task = pb.Task()
        try:
            task.ParseFromString((self.path / "held").read_bytes())
        except FileNotFoundError:
            return None
        except Exception:  # a torn note, which protobuf reports by an exception of its own
            return None
        return task

    def release(self) -> None:
        """Forget the task in hand and what was fetched for it."""
        with suppress(OSError):
            (self.path / "held").unlink(missing_ok=True)
        self.sweep_objects(keep=frozenset())

    def settle(self, body: pb.SubmitBody, reply: pb.SubmitReply) -> bool:
        """Act on a verdict: forget the answer, and the state after it where it does not count.

        Returns:
            Whether the answer counts.
        """
        verdict = reply.first if reply.verdict == pb.DUPLICATE else reply.verdict
        counts: bool = verdict == pb.ACCEPTED
        if not counts:
            self.states.drop(body.run_id, body.task_id)
        self.unsent.remove(body.task_id)
        return counts

    def object_path(self, digest: bytes) -> Path:
        """Where the object of this digest is, or comes to be."""
        return self.path / "objects" / digest.hex()

    def sweep_objects(self, keep: frozenset[str]) -> None:
        """Delete fetched objects but those whose digests (hexadecimal) are in `keep`."""
        for file in (self.path / "objects").iterdir():
            if file.name.split(".")[0] not in keep:
                with suppress(OSError):
                    file.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Space left on the disk of this folder."""
        try:
            return shutil.disk_usage(self.path).free
        except OSError:
            return 0

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(path: Path) -> IO[str]:
    """Take the lock file, which the operating system frees when this process ends in any way."""
    handle = path.open("a+", encoding="utf-8")
    try:
        if not try_lock(handle.fileno()):
            handle.seek(0)
            raise EnvironmentProblem(
                "another process uses this client's folder",
                code="FS-CLI-008",
                where=str(path.parent),
                why=f"it is locked by {handle.read(200).strip() or 'another process'}",
                hint="stop that client, or give this one its own --state",
            )
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
    except BaseException:
        handle.close()
        raise
    return handle


def _read_bound(path: Path) -> Bound:
    try:
        values = json.loads(path.read_bytes())
        return Bound(**(values | {"server_id": bytes.fromhex(values["server_id"])}))
    except FileNotFoundError:
        return Bound()
    except OSError as error:
        raise unreadable(error, path) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, f"it is not what this program writes: {error}") from error
