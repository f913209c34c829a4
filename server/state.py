"""The state folder of a coordinator, opened as a whole and closed as a whole.

fedsim.db, lock      the ledger                identity.key   who the coordinator is
audit.jsonl          what concerns security    objects/       models and large updates
segments/            small updates             uploads/       what has not arrived completely
runs/                folders of runs           listening.json where it listens, while it does
"""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from fedsim.server.audit import Audit
from fedsim.server.auth import Auth
from fedsim.server.database import open_database
from fedsim.server.nodes import Nodes
from fedsim.server.objects import Objects
from fedsim.server.runs import Runs
from fedsim.server.segments import Segments
from fedsim.server.settings import ServerSettings
from fedsim.server.state_keys import first_admin, server_key
from fedsim.server.uploads import Uploads

log = logging.getLogger(__name__)


class State:
    """Everything that outlives the process; opened and closed in a thread, as both wait for the disk.

    Args:
        settings: of the coordinator.

    Raises:
        FedsimError: the folder cannot be used, with the reason; what was opened is closed again.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.folder = settings.server.state
        self.settings = settings
        with ExitStack() as undo:
            self._open(undo)
            self._closing = undo.pop_all()

    def _open(self, undo: ExitStack) -> None:
        settings, folder = self.settings, self.folder
        self.database = open_database(settings.database.url or "sqlite", folder)
        undo.callback(self.database.close)
        listening_file(folder).unlink(missing_ok=True)  # of a process that was killed
        self.audit = Audit(folder / "audit.jsonl")
        undo.callback(self.audit.close)
        self.key = server_key(folder, self.database)
        self.incarnation = self.database.incarnation
        self.nodes = Nodes(self.database, self.audit)
        self.auth = Auth(
            self.database,
            self.audit,
            self.nodes,
            self.key,
            lease_seconds=settings.leases.seconds,
            heartbeat_seconds=settings.leases.heartbeat_seconds,
            allow_anonymous=settings.server.allow_anonymous,
            manual_approval=settings.server.manual_approval,
            bind_certificates=settings.server.client_ca is not None,
        )
        admin = first_admin(folder, self.nodes)
        if admin is not None:
            log.info("nobody administered this coordinator: the key of its administrator is in %s", admin)
        self.objects = Objects(folder / "objects")
        segments = Segments(folder / "segments")
        undo.callback(segments.close)
        self.uploads = Uploads(
            self.database, self.objects, folder / "uploads", keep_free_bytes=settings.limits.min_free_bytes
        )
        undo.callback(self.uploads.close)
        self.runs = Runs(
            self.database,
            self.objects,
            segments,
            self.uploads,
            folder,
            self.key,
            candidates=self.nodes.candidates,
            inline_bytes=settings.limits.inline_bytes,
            lease_seconds=settings.leases.seconds,
        )
        undo.callback(self.runs.close)
        self.runs.recover()

    def problem(self) -> str | None:
        """Why nothing can be stored, in one sentence, or None where it can."""
        try:
            if hasattr(os, "statvfs") and os.statvfs(self.folder).f_flag & os.ST_RDONLY:
                return "the disk of the state folder is read-only"
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"the state folder cannot be looked at: {error.strerror}"
        least = self.settings.limits.min_free_bytes
        if free < least:
            return f"{free:,} bytes are free, [limits] min_free_bytes asks for {least:,}"
        return None

    def close(self) -> None:
        """Stop the runs where they are, write everything back, let the folder go."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listening_file(folder: Path) -> Path:
    """Where a coordinator says on which addresses it listens."""
    return folder / "listening.json"
