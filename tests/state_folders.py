"""State folders of coordinators for tests: a new database without the migration, and uploads with a crash."""

from __future__ import annotations

import atexit
import functools
import hashlib
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.pb import federation_pb2 as pb
from fedsim.server.database import Database, open_database
from fedsim.server.objects import Objects
from fedsim.server.upload_stream import Upload
from fedsim.server.uploads import UploadRefused, Uploads

NODE, OTHER = "0123456789abcdef", "fedcba9876543210"
CONTENT = random.Random(0).randbytes(1000)
LARGEST = 10_000


@functools.cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="state-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    open_database("", folder).close()
    return folder / "fedsim.db"


def new_database(folder: Path) -> Database:
    """A database as `open_database` makes it in a new folder; the tables are made once per process."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(), folder)
    return open_database("", folder)


class Server:
    """Database, objects and uploads of one state folder, which can be stopped and started again."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.now = 1000.0
        if not (folder / "fedsim.db").exists():
            new_database(folder).close()
        self.open(**options)

    def open(self, **options: Any) -> None:
        """Open the folder; ``options`` are those of `Uploads`."""
        self.database = open_database("", self.folder)
        self.objects = Objects(self.folder / "objects")
        options.setdefault("keep_free_bytes", 0)
        self.uploads = Uploads(
            self.database, self.objects, self.folder / "uploads", wall=lambda: self.now, **options
        )

    def start(
        self,
        *,
        node: str = NODE,
        upload: int = 1,
        generation: int = 1,
        task: int = 1,
        content: bytes = CONTENT,
        size: int | None = None,
        largest: int = LARGEST,
    ) -> Upload:
        """The first frame of a stream."""
        first = pb.UploadStart(
            upload_id=bytes([upload]) * 16,
            generation=generation,
            task_id=bytes([task]) * 16,
            object=pb.Object(
                digest=hashlib.sha256(content).digest(), size=len(content) if size is None else size
            ),
        )
        return self.uploads.start(node, first, largest)

    def status(self, node: str = NODE, upload: int = 1) -> tuple[int, bool, int] | None:
        """Offset, complete, generation."""
        return self.uploads.status(node, bytes([upload]) * 16)

    def files(self) -> list[Path]:
        """The unfinished files."""
        return sorted((self.folder / "uploads").glob("*/*"))

    def crash(self, moment: Path) -> Server:
        """What the next process finds: the files as they are now, whatever was not written."""
        shutil.copytree(self.folder, moment)
        return Server(moment)

    def close(self) -> None:
        """Stop in good order."""
        self.uploads.close()
        self.database.close()


def send(upload: Upload, begin: int, end: int, content: bytes = CONTENT) -> None:
    """One chunk of the content."""
    data = content[begin:end]
    upload.write(begin, data, zlib.crc32(data))


def refused(call: Callable[[], object]) -> UploadRefused:
    """What an upload is refused with."""
    with pytest.raises(UploadRefused) as caught:
        call()
    return caught.value
