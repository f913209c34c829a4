"""Answers on their way: written down before the first byte leaves, sent again byte for byte after any break.

    ROOT/TASK/submit       the signed SubmitRequest, with the update in it where that is small
    ROOT/TASK/…            whatever the worker wrote for the task, a large update among it

A record proves itself: its body is signed by this client's key and names the digest of the update. So it is
written in one go with one sync, without renaming, and a torn one is known by that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

from fedsim.identity import SUBMIT, verify
from fedsim.pb import federation_pb2 as pb
from fedsim.storage import problem, sha256, sync_file, write_all

SUBMIT_FILE = "submit"

log = logging.getLogger(__name__)


class Unsent(NamedTuple):
    """One answer that was not handed in yet.

    Args:
        body: what `request.body` says.
        request: to be sent as it is.
        content: the update: a file, or the bytes inside the request.
    """

    body: pb.SubmitBody
    request: pb.SubmitRequest
    content: bytes | Path

    @property
    def inline(self) -> bool:
        """Whether the update travels inside the request."""
        return not self.body.upload_id


class UnsentAnswers:
    """The unsent answers of one client.

    Args:
        root: an existing folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, task_id: bytes) -> Path:
        """An empty folder for the worker's results of a task."""
        folder = self._root / task_id.hex()
        try:
            try:
                folder.mkdir()
            except FileExistsError:  # of an earlier try
                shutil.rmtree(folder)
                folder.mkdir()
        except OSError as error:
            raise problem(error, folder) from error
        return folder

    def write(self, body: pb.SubmitBody, request: pb.SubmitRequest, content: bytes | Path) -> Unsent:
        """Write an answer down; it is on the disk when this returns.

        Args:
            content: the update; a file must lie in the folder of the task.

        Raises:
            EnvironmentProblem: FS-ENV-020 … 022.
        """
        folder = self._root / body.task_id.hex()
        path = folder / SUBMIT_FILE
        try:
            if isinstance(content, Path):
                sync_file(content)
            elif body.upload_id:  # too large for the request, though the worker had it in memory
                content = _written(folder / "update", content)
            _written(path, request.SerializeToString())
        except OSError as error:
            raise problem(error, path) from error
        return Unsent(body, request, content)

    def find(self, task_id: bytes, public_key: bytes) -> Unsent | None:
        """The answer to one task, None where there is none that is whole."""
        folder = self._root / task_id.hex()
        return _read(folder, public_key) if (folder / SUBMIT_FILE).exists() else None

    def remove(self, task_id: bytes) -> None:
        """Forget the answer to a task and everything else that was written for it."""
        shutil.rmtree(self._root / task_id.hex(), ignore_errors=True)

    def load(self, public_key: bytes) -> list[Unsent]:
        """The answers that are whole, oldest first; what remains of others is deleted.

        Args:
            public_key: of this client; an answer signed by an older key would be refused.
        """
        found = []
        for folder in sorted(self._root.iterdir(), key=lambda f: f.stat().st_mtime_ns):
            unsent = _read(folder, public_key) if folder.is_dir() else None
            if unsent is not None:
                found.append(unsent)
            else:
                log.info("folder=%s holds no whole answer and is deleted", folder.name)
                shutil.rmtree(folder, ignore_errors=True)
        return found


def _written(path: Path, content: bytes) -> Path:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
    return path


def _read(folder: Path, public_key: bytes) -> Unsent | None:
    """The answer in `folder`, None where it is not whole."""
    body, request = pb.SubmitBody(), pb.SubmitRequest()
    try:
        request.ParseFromString((folder / SUBMIT_FILE).read_bytes())
        body.ParseFromString(request.body)
    except (OSError, DecodeError):
        return None
    if body.task_id.hex() != folder.name or not verify(public_key, SUBMIT, request.body, request.signature):
        return None
    if not body.upload_id:
        whole = hashlib.sha256(request.update).digest() == body.update.digest
        return Unsent(body, request, request.update) if whole else None
    for file in sorted(folder.iterdir()):
        if file.name != SUBMIT_FILE and file.stat().st_size == body.update.size:
            try:
                if sha256(file) == body.update.digest.hex():
                    return Unsent(body, request, file)
            except OSError:
                return None
    return None
