"""What uploads refuse: broken and hostile chunks (S6, S16), and what finds no space (R8)."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from fedsim.pb import federation_pb2 as pb
from fedsim.server import upload_stream
from fedsim.server.ledger_errors import LedgerUnavailable, StorageFull
from tests.state_folders import CONTENT, LARGEST, NODE, OTHER, Server, refused, send


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:  # those of a test are undone before the server closes
        # Nothing is synced because the machine was busy elsewhere for two seconds.
        patch.setattr(upload_stream, "SYNC_SECONDS", 1e9)
        opened = Server(tmp_path / "state")
        yield opened
        opened.close()


BAD = {
    "damaged": (lambda u: u.write(300, CONTENT[300:400], 7), StatusCode.DATA_LOSS, 300),
    "empty": (lambda u: u.write(300, b"", 0), StatusCode.INVALID_ARGUMENT, None),
    "gap": (lambda u: send(u, 400, 500), StatusCode.FAILED_PRECONDITION, 300),
    "overlap": (lambda u: send(u, 200, 400), StatusCode.INVALID_ARGUMENT, 300),
    "beyond": (lambda u: send(u, 300, 2000, CONTENT * 2), StatusCode.INVALID_ARGUMENT, None),
    "far beyond": (lambda u: u.write(1 << 63, b"x", zlib.crc32(b"x")), StatusCode.INVALID_ARGUMENT, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_chunk_is_refused_and_changes_nothing(server: Server, kind: str) -> None:
    bad, status, offset = BAD[kind]
    upload = server.start()
    send(upload, 0, 300)
    error = refused(lambda: bad(upload))
    assert (error.status, error.offset) == (status, offset)
    assert upload.offset == 300
    send(upload, 300, 1000)
    assert server.objects.read(upload.finish().digest) == CONTENT


@pytest.mark.parametrize("kind", BAD)
def test_three_bad_chunks_throw_the_upload_away(server: Server, kind: str) -> None:
    bad, status, _ = BAD[kind]
    upload = server.start()
    send(upload, 0, 300)
    upload.sync()
    assert "thrown away" not in refused(lambda: bad(upload)).text
    upload.close()
    upload = server.start(generation=2)  # a new stream does not wash them off
    assert "thrown away" not in refused(lambda: bad(upload)).text
    error = refused(lambda: bad(upload))
    assert error.status is status
    assert "thrown away" in error.text
    assert server.status() == (0, False, 2)
    assert server.files() == []
    assert refused(lambda: send(upload, 300, 400)).status is StatusCode.FAILED_PRECONDITION
    upload.close()
    assert refused(lambda: server.start(generation=3)).status is StatusCode.PERMISSION_DENIED
    another = refused(lambda: server.start(upload=2))
    assert another.status is StatusCode.PERMISSION_DENIED, "nor does another upload of the task"
    server.start(upload=3, task=2).close()


def test_bytes_that_are_there_are_ignored_but_not_for_ever(server: Server) -> None:
    upload = server.start()
    send(upload, 0, 500)
    send(upload, 0, 500)
    send(upload, 100, 400)
    assert upload.offset == 500
    send(upload, 300, 500)
    assert refused(lambda: send(upload, 0, 1)).status is StatusCode.INVALID_ARGUMENT
    send(upload, 500, 1000)
    assert server.objects.read(upload.finish().digest) == CONTENT


def test_bytes_that_are_missing_are_asked_for(server: Server) -> None:
    upload = server.start()
    send(upload, 0, 900)
    error = refused(upload.finish)
    assert (error.status, error.offset) == (StatusCode.FAILED_PRECONDITION, 900)
    send(upload, 900, 1000)
    assert upload.finish().size == 1000


def test_another_digest_is_data_loss_and_the_upload_begins_again(server: Server) -> None:
    for generation in (1, 2, 3):
        upload = server.start(generation=generation)
        assert upload.offset == 0
        send(upload, 0, 1000, bytes(1000))
        upload.sync()
        error = refused(upload.finish)
        assert (error.status, error.offset) == (StatusCode.DATA_LOSS, 0)
        upload.close()
        assert server.status() == (0, False, generation)
        assert server.files() == []
        assert not server.objects.has(hashlib.sha256(bytes(1000)).digest())
    assert refused(lambda: server.start(generation=4)).status is StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "change",
    [
        {"upload_id": b"\1" * 15}, {"upload_id": b""}, {"upload_id": b"../../../../etc/"[:15]},
        {"task_id": b"\1" * 17}, {"object": pb.Object(digest=b"\1" * 31, size=10)},
        {"object": pb.Object(digest=b"\1" * 32, size=0)},
        {"object": pb.Object(digest=b"\1" * 32, size=10_001)},
        {"object": pb.Object(digest=b"\1" * 32, size=(1 << 64) - 1)}, {"object": None},
    ],
)  # fmt: skip
def test_a_first_frame_that_is_wrong_makes_nothing(server: Server, change: dict[str, Any]) -> None:
    fields = {
        "upload_id": b"\1" * 16, "task_id": b"\1" * 16, "generation": 1,
        "object": pb.Object(digest=b"\1" * 32, size=10),
    }  # fmt: skip
    start = pb.UploadStart(**{**fields, **change})
    error = refused(lambda: server.uploads.start(NODE, start, LARGEST))
    assert error.status is StatusCode.INVALID_ARGUMENT
    assert server.files() == []
    assert server.status() is None


def test_an_upload_id_stands_for_one_task_digest_and_size(server: Server) -> None:
    server.start().close()
    for change in ({"task": 2}, {"content": b"x" * 1000}, {"size": 999}):
        error = refused(lambda change=change: server.start(generation=2, **change))  # type: ignore[misc]
        assert error.status is StatusCode.INVALID_ARGUMENT
    assert server.status() == (0, False, 1)


@pytest.mark.parametrize("node", ["", "../../etc", "0123456789ABCDEF", "0123456789abcdef\n", "a" * 10_000])
def test_no_other_node_id_becomes_a_folder(server: Server, node: str) -> None:
    """S16."""
    with pytest.raises(ValueError, match="16 hexadecimal"):
        server.start(node=node)
    assert server.files() == []


def test_the_same_upload_id_of_another_node_is_another_upload(server: Server) -> None:
    mine, theirs = server.start(), server.start(node=OTHER, task=2, content=b"x" * 500)
    send(mine, 0, 300)
    send(theirs, 0, 500, b"x" * 500)
    assert mine.sync() == 300
    assert theirs.finish().size == 500
    assert server.status() == (300, False, 1)
    assert server.status(OTHER) == (500, True, 1)


# ------------------------------------------------------------ space


def test_a_node_has_one_unfinished_upload_per_task(server: Server) -> None:
    old = server.start(upload=1)
    send(old, 0, 300)
    new = server.start(upload=2)
    assert [file.name for file in server.files()] == [f"{'02' * 16}.part"]
    assert server.status(upload=1) is None
    send(old, 300, 400)  # into a file without a name
    assert refused(old.sync).status is StatusCode.FAILED_PRECONDITION
    old.close()
    send(new, 0, 1000)
    assert new.finish().size == 1000


def test_finished_uploads_of_a_task_are_bounded(server: Server) -> None:
    for number in (1, 2, 3):
        content = bytes([number]) * 100
        upload = server.start(upload=number, content=content)
        send(upload, 0, 100, content)
        upload.finish()
        upload.close()
    assert refused(lambda: server.start(upload=4)).status is StatusCode.PERMISSION_DENIED


def test_the_disk_is_never_filled_to_the_brim(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.uploads._keep_free_bytes = 10_000
    usage = shutil.disk_usage(server.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=11_500))
    first = server.start()
    error = refused(lambda: server.start(upload=2, task=2))
    assert error.status is StatusCode.RESOURCE_EXHAUSTED
    assert error.retry_seconds
    assert str(server.folder) not in error.text
    server.start(upload=3, task=3, content=b"x" * 400).close()
    first.close()


@pytest.mark.parametrize(
    ("code", "status"),
    [(errno.ENOSPC, StatusCode.RESOURCE_EXHAUSTED), (errno.EIO, StatusCode.UNAVAILABLE)],
)
@pytest.mark.parametrize("call", ["pwrite", "sync"])
def test_a_full_or_broken_disk_delays_the_node_and_it_goes_on_where_it_was(
    server: Server, call: str, code: int, status: StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R8."""
    upload = server.start()
    send(upload, 0, 300)
    upload.sync()

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if call == "pwrite":
            patch.setattr(os, "pwrite", fail)
            error = refused(lambda: send(upload, 300, 600))
        else:
            patch.setattr(upload_stream, "_sync_data", fail)
            send(upload, 300, 600)
            error = refused(upload.sync)
        assert error.status is status
        assert error.retry_seconds
        assert str(server.folder) not in error.text
        upload.close()
    assert server.status() == (300, False, 1)
    again = server.start(generation=2)
    assert again.offset == 300
    send(again, 300, 1000)
    assert server.objects.read(again.finish().digest) == CONTENT


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StorageFull("no space"), StatusCode.RESOURCE_EXHAUSTED),
        (LedgerUnavailable("gone"), StatusCode.UNAVAILABLE),
    ],
)
def test_a_ledger_that_fails_delays_the_node(
    server: Server, error: Exception, status: StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(operation: object) -> None:
        raise error

    upload = server.start()
    send(upload, 0, 300)
    with monkeypatch.context() as patch:
        patch.setattr(server.database.writer, "run", fail)
        assert refused(upload.sync).status is status
        assert refused(lambda: server.start(upload=2, task=2)).status is status
        assert server.status() == (0, False, 1)
    assert upload.sync() == 300
    upload.close()
