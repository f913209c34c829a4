"""Resumable uploads: offsets, crashes in the middle, generations, and the end of a task."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from fedsim.server import upload_stream
from fedsim.server.block_file import BlockFile
from fedsim.server.ledger_errors import StorageFull
from fedsim.server.objects import Objects
from fedsim.server.upload_rows import Row
from fedsim.server.upload_stream import Upload
from fedsim.server.uploads import UploadRefused
from tests.state_folders import CONTENT, NODE, OTHER, Server, refused, send


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:  # those of a test are undone before the server closes
        # Nothing is synced because the machine was busy elsewhere for two seconds.
        patch.setattr(upload_stream, "SYNC_SECONDS", 1e9)
        opened = Server(tmp_path / "state")
        yield opened
        opened.close()


# ------------------------------------------------------------ the ordinary way


def test_chunks_become_an_object(server: Server) -> None:
    upload = server.start()
    assert upload.offset == 0
    for begin in range(0, 1000, 300):
        send(upload, begin, begin + 300)
    assert upload.offset == 1000
    assert upload.sync() == 1000
    assert server.status() == (1000, False, 1)
    found = upload.finish()
    assert found == (hashlib.sha256(CONTENT).digest(), 1000)
    assert server.objects.read(found.digest) == CONTENT
    assert server.status() == (1000, True, 1)
    assert server.files() == []
    assert upload.finish() == found
    upload.close()


def test_the_offset_counts_safe_bytes_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(upload_stream, "_sync_data", lambda handle: synced.append(os.fstat(handle).st_size))
    upload = server.start()
    send(upload, 0, 400)
    assert upload.offset == 400
    assert server.status() == (0, False, 1)
    assert synced == []
    assert upload.sync() == 400
    assert server.status() == (400, False, 1)
    assert synced == [400]
    upload.close()


def test_a_long_stream_is_synced_on_the_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_stream, "SYNC_BYTES", 250)
    upload = server.start()
    for begin in range(0, 800, 100):
        send(upload, begin, begin + 100)
    assert server.status() == (600, False, 1)
    upload.close()


def test_closing_keeps_what_arrived_and_the_next_stream_goes_on(server: Server) -> None:
    upload = server.start()
    send(upload, 0, 700)
    upload.close()
    assert server.status() == (700, False, 1)
    again = server.start(generation=2)
    assert again.offset == 700
    send(again, 700, 1000)
    assert server.objects.read(again.finish().digest) == CONTENT
    assert server.status() == (1000, True, 2)


def test_an_upload_that_is_complete_needs_no_further_byte(server: Server) -> None:
    upload = server.start()
    send(upload, 0, 1000)
    found = upload.finish()
    upload.close()
    again = server.start(generation=2)
    assert again.offset == 1000
    send(again, 700, 1000)  # a node that lost the answer may repeat what it sent
    assert again.sync() == 1000
    assert again.finish() == found
    again.close()


def test_a_name_that_the_disk_did_not_take_is_given_by_the_next_stream(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, digest: bytes) -> None:
        raise StorageFull("no space")

    upload = server.start()
    send(upload, 0, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(server.objects, "adopt", full)
        assert refused(upload.finish).status is StatusCode.RESOURCE_EXHAUSTED
        upload.close()
    assert server.status() == (0, False, 1)
    again = server.start(generation=2)
    assert again.offset == 1000
    assert server.objects.read(again.finish().digest) == CONTENT
    assert server.files() == []


def test_a_finished_upload_is_found_by_its_own_task_and_node_alone(server: Server) -> None:
    upload = server.start()
    send(upload, 0, 1000)
    assert server.uploads.finished(NODE, b"\1" * 16, b"\1" * 16) is None
    digest = upload.finish().digest
    row = server.uploads.finished(NODE, b"\1" * 16, b"\1" * 16)
    assert row is not None
    assert (row.digest, row.size) == (digest, 1000)
    assert server.uploads.finished(OTHER, b"\1" * 16, b"\1" * 16) is None
    assert server.uploads.finished(NODE, b"\1" * 16, b"\2" * 16) is None


def test_the_same_bytes_from_another_node_are_sent_all_the_same(server: Server) -> None:
    upload = server.start()
    send(upload, 0, 1000)
    upload.finish()
    other = server.start(node=OTHER, task=2)
    assert other.offset == 0
    with pytest.raises(UploadRefused):
        other.finish()
    send(other, 0, 1000)
    assert other.finish().size == 1000


def test_an_unknown_upload_has_no_status(server: Server) -> None:
    server.start().close()
    assert server.status(upload=9) is None
    assert server.status(node=OTHER) is None
    assert server.uploads.status(NODE, b"") is None


# ------------------------------------------------------------ R2: killed in the middle


def test_after_a_crash_nothing_below_the_offset_is_sent_again(server: Server, tmp_path: Path) -> None:
    upload = server.start()
    send(upload, 0, 400)
    upload.sync()
    send(upload, 400, 900)  # arrived, and not safe
    survivor = server.crash(tmp_path / "after")
    assert survivor.status() == (400, False, 1)
    again = survivor.start(generation=2)
    assert again.offset == 400
    send(again, 400, 1000)
    assert survivor.objects.read(again.finish().digest) == CONTENT
    survivor.close()


def test_a_crash_between_the_checked_row_and_the_name_loses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = server.start()
    send(upload, 0, 1000)

    def killed(file: Path, digest: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.objects, "adopt", killed)
    with pytest.raises(KeyboardInterrupt):
        upload.finish()
    survivor = server.crash(tmp_path / "after")
    assert survivor.status() == (1000, True, 1)
    assert survivor.objects.read(hashlib.sha256(CONTENT).digest()) == CONTENT
    assert survivor.files() == []
    survivor.close()


@pytest.mark.parametrize("left", [0, 100])
def test_a_file_that_is_shorter_than_its_row_begins_again(server: Server, tmp_path: Path, left: int) -> None:
    upload = server.start()
    send(upload, 0, 400)
    upload.sync()
    shutil.copytree(server.folder, tmp_path / "after")
    (file,) = (tmp_path / "after" / "uploads").glob("*/*")
    if left:
        os.truncate(file, left)
    else:
        file.unlink()
    survivor = Server(tmp_path / "after")
    again = survivor.start(generation=2)
    assert again.offset == 0
    assert survivor.status() == (0, False, 2)
    send(again, 0, 1000)
    assert survivor.objects.read(again.finish().digest) == CONTENT
    survivor.close()


def test_a_complete_upload_whose_object_is_gone_begins_again(server: Server) -> None:
    upload = server.start()
    send(upload, 0, 1000)
    server.objects.remove([upload.finish().digest])
    assert server.status() == (0, False, 1)
    assert server.uploads.finished(NODE, b"\1" * 16, b"\1" * 16) is None
    again = server.start(generation=2)
    assert again.offset == 0
    assert server.status() == (0, False, 2)
    send(again, 0, 1000)
    assert server.objects.has(again.finish().digest)


def test_files_without_a_row_are_deleted_at_start(server: Server, tmp_path: Path) -> None:
    server.start().close()
    (server.folder / "uploads" / NODE / f"{'ab' * 16}.part").write_bytes(b"stray")
    survivor = server.crash(tmp_path / "after")
    assert [file.name for file in survivor.files()] == [f"{'01' * 16}.part"]
    survivor.close()


# ------------------------------------------------------------ generations


def test_the_newest_generation_fences_the_older(server: Server) -> None:
    old = server.start(generation=1)
    send(old, 0, 300)
    new = server.start(generation=2)
    assert new.offset == 300, "what the old stream brought is kept"
    for call in (lambda: send(old, 300, 600), old.sync, old.finish):
        assert refused(call).status is StatusCode.FAILED_PRECONDITION
    old.close()
    send(new, 300, 1000)
    assert server.objects.read(new.finish().digest) == CONTENT


def test_an_older_generation_is_refused_while_and_after_a_newer_one(server: Server) -> None:
    new = server.start(generation=5)
    assert refused(lambda: server.start(generation=4)).status is StatusCode.FAILED_PRECONDITION
    send(new, 0, 100)
    new.close()
    assert refused(lambda: server.start(generation=4)).status is StatusCode.FAILED_PRECONDITION
    assert server.status() == (100, False, 5)


def test_a_row_that_a_newer_stream_took_over_is_not_changed_by_the_older(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the fence in memory were missing: the row itself knows the generation."""
    old = server.start(generation=1)
    send(old, 0, 300)
    monkeypatch.setattr(old, "fence", lambda: None)
    new = server.start(generation=2)
    assert refused(old.sync).status is StatusCode.FAILED_PRECONDITION
    assert server.status() == (0, False, 2)
    new.close()


@pytest.mark.parametrize("busy", ["chunk", "finish"])
def test_a_stream_begins_when_all_older_ones_have_left_the_file(
    server: Server, monkeypatch: pytest.MonkeyPatch, busy: str
) -> None:
    """The second waits for the first, the third comes meanwhile: two writers would mix their bytes."""
    inside, go_on = threading.Event(), threading.Event()
    step, owner = ("append", BlockFile) if busy == "chunk" else ("adopt", Objects)
    plain = getattr(owner, step)

    def held(*values: Any) -> Any:
        if not inside.is_set():
            inside.set()
            assert go_on.wait(60)
        return plain(*values)

    fenced = {1: threading.Event(), 2: threading.Event()}
    fence = Upload.fence

    def told(upload: Upload) -> None:
        fenced[upload.generation].set()
        fence(upload)

    first = server.start(generation=1)
    if busy == "finish":
        send(first, 0, 1000)
    monkeypatch.setattr(owner, step, held)
    monkeypatch.setattr(Upload, "fence", told)
    with ThreadPoolExecutor() as threads:
        kept = threads.submit(first.finish if busy == "finish" else lambda: send(first, 0, 400))
        assert inside.wait(60)
        second = threads.submit(server.start, generation=2)
        assert fenced[1].wait(60)
        third = threads.submit(server.start, generation=3)
        assert fenced[2].wait(60)
        with pytest.raises(TimeoutError):
            third.result(0.2)
        go_on.set()
        kept.result(60)
        assert refused(lambda: second.result(60)).status is StatusCode.FAILED_PRECONDITION
        last = third.result(60)
    assert last.offset == (1000 if busy == "finish" else 400)
    send(last, last.offset, 1000) if last.offset < 1000 else None
    assert server.objects.read(last.finish().digest) == CONTENT


def test_many_streams_of_one_upload_leave_one_winner(server: Server) -> None:
    done: list[object] = []

    def work(generation: int) -> None:
        try:
            upload = server.start(generation=generation)
            for begin in range(upload.offset, 1000, 50):
                send(upload, begin, begin + 50)
            done.append(upload.finish())
            upload.close()
        except UploadRefused as error:
            done.append(error.status)

    threads = [threading.Thread(target=work, args=(generation,)) for generation in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 8
    assert {d for d in done if isinstance(d, StatusCode)} <= {StatusCode.FAILED_PRECONDITION}
    last = server.start(generation=9)
    send(last, last.offset, 1000) if last.offset < 1000 else None
    assert server.objects.read(last.finish().digest) == CONTENT


# ------------------------------------------------------------ the end


def test_what_did_not_move_for_long_is_forgotten(server: Server) -> None:
    server.start(upload=1).close()
    live = server.start(upload=2, task=2)
    server.now += 3600
    server.start(upload=3, task=3).close()
    assert server.uploads.collect_garbage(older_than=1800) == frozenset()
    assert server.status(upload=1) is None
    assert [file.stem[:2] for file in server.files()] == ["02", "03"]
    send(live, 0, 1000)
    assert live.finish().size == 1000


def test_a_task_that_is_over_takes_its_uploads_along(server: Server) -> None:
    finished = server.start(upload=1)
    send(finished, 0, 1000)
    digest = finished.finish().digest
    running, other = server.start(upload=2, task=2, node=OTHER), server.start(upload=3, task=3)
    send(running, 0, 100)
    assert server.uploads.forget_tasks([b"\1" * 16, b"\2" * 16]) == {digest}
    assert refused(lambda: send(running, 100, 200)).status is StatusCode.FAILED_PRECONDITION
    assert server.status() is None
    assert server.status(OTHER, 2) is None
    assert server.objects.has(digest), "the ledger may name it"
    send(other, 0, 1000)
    assert other.finish().size == 1000


def test_a_stopping_server_keeps_what_arrived(tmp_path: Path) -> None:
    server = Server(tmp_path)
    upload = server.start()
    send(upload, 0, 600)
    server.close()
    upload.close()
    server.open()
    assert server.status() == (600, False, 1)
    server.close()


def test_an_upload_that_began_while_its_task_was_forgotten_leaves_no_file(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = server.uploads._rows
    claim = rows.claim

    def claimed(row: Row, room: Any, drop: Any) -> Row:
        found = claim(row, room, drop)
        rows.forget_tasks([found.task_id], drop)  # between its row and its file
        return found

    monkeypatch.setattr(rows, "claim", claimed)
    upload = server.start()
    send(upload, 0, 300)
    assert len(server.files()) == 1
    assert refused(upload.sync).status == StatusCode.FAILED_PRECONDITION
    upload.close()
    assert server.files() == []
