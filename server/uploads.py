"""Resumable uploads of updates that are too large for one message.

An upload is keyed by node, upload id and generation; the newest stream fences the older ones. Its row
counts only bytes that are safe on the disk, so nothing below that offset is ever sent twice. What a node
can make the server keep is bounded: one unfinished file per task, as large as the task's update may be,
with free space to spare. How many streams run at a time, and how slow one may be, is
decided by the service.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from grpc import StatusCode

from fedsim.pb import federation_pb2 as pb
from fedsim.server.block_file import Blocks
from fedsim.server.database import Database
from fedsim.server.ledger_errors import LedgerProblem, file_trouble
from fedsim.server.objects import DIGEST_BYTES, Objects
from fedsim.server.upload_rows import Row, UploadRefused, UploadRows, from_ledger, later, overtaken
from fedsim.server.upload_stream import Upload

__all__ = ["Status", "Upload", "UploadRefused", "Uploads"]

log = logging.getLogger(__name__)

MAX_STRIKES = 3
KEEP_FREE_BYTES = 10 << 30
_NODE = re.compile(r"[0-9a-f]{16}")
_ID_BYTES = 16


class Status(NamedTuple):
    """What the server has of an upload.

    Args:
        offset: bytes that are safe on its disk.
        complete: all of them are there, and their digest was right.
        generation: the newest; a stream with a lower one is refused.
    """

    offset: int
    complete: bool
    generation: int


class Uploads:
    """All uploads of a coordinator; called in threads, never in the event loop's.

    Args:
        database: holds one row per upload.
        objects: takes finished files over; on the same disk as `folder`.
        folder: of unfinished files, ``<state>/uploads``.
        keep_free_bytes: of the disk, always.
        max_strikes: broken chunks or digests until no more is taken for a task.
        wall: seconds since 1970, for the age of rows.
    """

    def __init__(
        self,
        database: Database,
        objects: Objects,
        folder: Path,
        *,
        keep_free_bytes: int = KEEP_FREE_BYTES,
        max_strikes: int = MAX_STRIKES,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._objects = objects
        self._folder = folder
        self._rows = UploadRows(database, wall, max_strikes)
        self._keep_free_bytes = keep_free_bytes
        self._max_strikes = max_strikes
        self._wall = wall
        self._door = threading.Lock()
        self._live: dict[tuple[str, bytes], Upload] = {}
        self._blocks = Blocks()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise file_trouble(error, folder) from error
        self._recover()

    def start(self, node_id: str, start: pb.UploadStart, max_size: int) -> Upload:
        """Begin or resume an upload; an older stream of it is cut.

        Args:
            node_id: who sends; it was checked before that the task is its own.
            start: the first frame of the stream.
            max_size: bytes that an update of the task may have.

        Returns:
            The stream, at the offset that the server has. Close it in every case.

        Raises:
            UploadRefused: with the status code and the words for the node.
        """
        asked = _asked(node_id, start, max_size, self._wall())
        key = (node_id, asked.upload_id)
        upload = Upload(
            asked,
            self._file(*key),
            rows=self._rows,
            objects=self._objects,
            blocks=self._blocks,
            max_strikes=self._max_strikes,
            ended=lambda ended: self._forget(key, ended),
        )
        with upload.door:  # whoever fences this stream waits until those before it have left the file
            with self._door:
                older = self._live.get(key)
                if older is not None and older.generation > asked.generation:
                    raise overtaken()
                self._live[key] = upload
            try:
                if older is not None:
                    older.fence()  # it records what arrived, so that this one goes on there
                upload.open(self._rows.claim(asked, self._check_room, self._drop))
            except LedgerProblem as error:
                self._forget(key, upload)
                raise from_ledger(error) from error
            except BaseException:
                self._forget(key, upload)
                raise
        return upload

    def status(self, node_id: str, upload_id: bytes) -> Status | None:
        """What the server has of an upload, None where it knows of none."""
        row = self._rows.find(node_id, upload_id)
        if row is None:
            return None
        if row.complete and not self._objects.has(row.digest):
            return Status(0, False, row.generation)  # the next stream begins again
        return Status(row.offset, row.complete, row.generation)

    def finished(self, node_id: str, upload_id: bytes, task_id: bytes) -> Row | None:
        """The finished upload that a submission refers to; None where the node has no such one."""
        row = self._rows.find(node_id, upload_id)
        if row is None or not row.complete or row.task_id != task_id:
            return None
        return row if self._objects.has(row.digest) else None

    def collect_garbage(self, older_than: float) -> frozenset[bytes]:
        """Forget uploads that did not move for so many seconds, unless a stream is open.

        Returns:
            Digests of those that were finished; their objects stay, as with `forget_tasks`.
        """
        with self._door:
            live = frozenset(self._live)
        gone = self._rows.forget_stale(self._wall() - older_than, live, self._drop)
        return frozenset(row.digest for row in gone if row.complete)

    def forget_tasks(self, task_ids: Sequence[bytes]) -> frozenset[bytes]:
        """Forget the uploads of tasks that are over; open streams of them are cut.

        Returns:
            Digests of those that were finished. Their objects stay: only the ledger knows whether it
            names them.
        """
        over = frozenset(task_ids)
        with self._door:
            streams = [upload for upload in self._live.values() if upload.task_id in over]
        for upload in streams:
            upload.fence()
        gone = self._rows.forget_tasks(task_ids, self._drop)
        return frozenset(row.digest for row in gone if row.complete)

    def close(self) -> None:
        """Cut every stream; what arrived is kept."""
        with self._door:
            streams = list(self._live.values())
        for upload in streams:
            upload.fence()
        self._blocks.close()

    def _check_room(self, promised: int, row: Row) -> None:
        """Refuse what would not fit beside the bytes that are promised already."""
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise file_trouble(error, self._folder) from error
        if free - promised - (row.size - row.offset) < self._keep_free_bytes:
            raise later("the server's disk is nearly full")

    def _forget(self, key: tuple[str, bytes], upload: Upload) -> None:
        with self._door:
            if self._live.get(key) is upload:
                del self._live[key]
            file = self._file(*key)
            # Its task was forgotten while it began: nobody would come to the file again.
            with suppress(OSError, LedgerProblem):  # what stays is found again at the next start
                if key not in self._live and file.exists() and self._rows.find(*key) is None:
                    file.unlink(missing_ok=True)

    def _file(self, node_id: str, upload_id: bytes) -> Path:
        return self._folder / node_id / f"{upload_id.hex()}.part"

    def _drop(self, row: Row) -> None:
        """Delete a file; an open stream of it finds its row gone and ends."""
        with suppress(OSError):  # what stays is found again at the next start
            self._file(row.node_id, row.upload_id).unlink(missing_ok=True)

    def _recover(self) -> None:
        """Finish what was cut between the row of a checked upload and its renaming; delete strays."""
        known = set()
        for row in self._rows.all():
            file = self._file(row.node_id, row.upload_id)
            known.add(file)
            if row.complete and file.exists():
                self._objects.adopt(file, row.digest)
        for file in self._folder.glob("*/*.part"):
            if file not in known:
                log.info("a file without a row of an upload is deleted: %s", file.name)
                file.unlink(missing_ok=True)


def _asked(node_id: str, start: pb.UploadStart, max_size: int, now: float) -> Row:
    """The row that a first frame asks for, checked field by field."""
    # The node id becomes a folder: anything but 16 digits is a mistake of the caller.
    if not _NODE.fullmatch(node_id):
        raise ValueError("a node id has 16 hexadecimal digits")
    wrong = None
    if len(start.upload_id) != _ID_BYTES:
        wrong = f"an upload id has {_ID_BYTES} bytes, not {len(start.upload_id)}"
    elif len(start.task_id) != _ID_BYTES:
        wrong = f"a task id has {_ID_BYTES} bytes, not {len(start.task_id)}"
    elif len(start.object.digest) != DIGEST_BYTES:
        wrong = f"a digest has {DIGEST_BYTES} bytes, not {len(start.object.digest)}"
    elif not 0 < start.object.size <= max_size:
        wrong = f"an update of this task has 1 to {max_size} bytes, not {start.object.size}"
    if wrong is not None:
        raise UploadRefused(StatusCode.INVALID_ARGUMENT, wrong)
    return Row(
        node_id=node_id,
        upload_id=start.upload_id,
        generation=start.generation,
        task_id=start.task_id,
        digest=start.object.digest,
        size=start.object.size,
        offset=0,
        strikes=0,
        complete=False,
        updated=now,
    )
