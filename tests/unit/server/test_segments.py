"""Segments of small updates: offsets, one sync per group, and what a failing disk leaves."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select

from fedsim.errors import EnvironmentProblem
from fedsim.server import segments as segments_module
from fedsim.server.database import Database
from fedsim.server.ledger_errors import LedgerUnavailable, StorageFull
from fedsim.server.segments import Segment, Segments, Window
from fedsim.server.tables import meta
from tests.state_folders import new_database

HERE = Window("0123456789ab", 3, 0)


@pytest.fixture
def segments(tmp_path: Path) -> Iterator[Segments]:
    opened = Segments(tmp_path / "segments")
    yield opened
    opened.close()


def put(segment: Segment, content: bytes) -> tuple[int, int]:
    """Append one update: its offset and size."""
    (offset,) = segment.append([content])
    return offset, len(content)


def broken(code: int = errno.ENOSPC) -> OSError:
    return OSError(code, os.strerror(code))


def fail(*_: object) -> int:
    raise broken()


def test_what_is_appended_is_read_at_its_offset(segments: Segments) -> None:
    segment = segments.of(HERE)
    places = [put(segment, content) for content in (b"first", b"", b"second")]
    segment.sync()
    assert places == [(0, 5), (5, 0), (5, 6)]
    assert [bytes(segment.read(*place)) for place in places] == [b"first", b"", b"second"]
    assert segment.path == segments.folder / "0123456789ab" / "3-0.seg"
    assert segment.path.stat().st_mode & 0o077 == 0


def test_a_window_has_one_segment(segments: Segments) -> None:
    assert segments.of(HERE) is segments.of(Window(*HERE))
    assert segments.of(HERE) is not segments.of(HERE._replace(attempt=1))


def test_after_a_restart_it_goes_on_behind_what_is_there(segments: Segments) -> None:
    """R29: bytes behind the last row may be there or not; nobody asks for them."""
    put(segments.of(HERE), b"first")
    segments.close()
    with segments.path(HERE).open("ab") as file:
        file.write(b"torn")
    place = put(segments.of(HERE), b"second")
    assert place == (9, 6)
    assert bytes(segments.of(HERE).read(0, 5)) == b"first"
    assert bytes(segments.of(HERE).read(*place)) == b"second"


def test_nothing_is_synced_twice(segments: Segments, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(segments_module, "_sync_data", calls.append)
    segment = segments.of(HERE)
    segment.sync()
    assert calls == []
    put(segment, b"a")
    put(segment, b"b")
    segment.sync()
    segment.sync()
    assert len(calls) == 1


def test_a_full_disk_leaves_the_segment_as_it_was(
    segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = segments.of(HERE)
    put(segment, b"first")
    write = os.write

    def half(handle: int, content: bytes) -> int:
        if os.fstat(handle).st_size > 5:
            raise broken()
        return write(handle, content[:4])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(StorageFull):
            put(segment, b"a long update")
    assert segment.path.read_bytes() == b"first"
    assert put(segment, b"second") == (5, 6)


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, StorageFull), (errno.EIO, LedgerUnavailable)])
def test_bytes_whose_sync_failed_are_given_up(
    segments: Segments, code: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = segments.of(HERE)
    put(segment, b"safe")
    segment.sync()
    put(segment, b"lost")

    def fail_once(handle: int) -> None:
        raise broken(code)

    with monkeypatch.context() as patch:
        patch.setattr(segments_module, "_sync_data", fail_once)
        with pytest.raises(kind):
            segment.sync()
    assert segment.path.read_bytes() == b"safe"
    assert put(segment, b"next") == (4, 4)


def test_a_place_beyond_the_end_is_damage(segments: Segments) -> None:
    put(segments.of(HERE), b"short")
    with pytest.raises(EnvironmentProblem) as caught:
        segments.of(HERE).read(3, 10)
    assert caught.value.code == "FS-LED-012"


def test_a_removed_segment_is_gone_and_says_so(segments: Segments) -> None:
    segment = segments.of(HERE)
    put(segment, b"x")
    segments.remove(HERE)
    segments.remove(HERE)
    assert not segment.path.exists()
    with pytest.raises(LedgerUnavailable):
        segment.read(0, 1)
    with pytest.raises(LedgerUnavailable):
        put(segment, b"y")
    segments.path(HERE).write_bytes(b"left by a crash")
    segments.remove(HERE)
    assert segments.present() == []


def test_the_files_that_are_there_are_found(segments: Segments) -> None:
    other = Window("ba9876543210", 11, 2)
    for window in (other, HERE):
        put(segments.of(window), b"x")
    (segments.folder / "not a run").mkdir()
    (segments.folder / HERE.run_id / "notes.txt").write_bytes(b"")
    assert segments.present() == [HERE, other]


@pytest.mark.parametrize(
    "window",
    [
        Window("../../../etc", 0, 0), Window("0123456789AB", 0, 0), Window("0123456789ab\n", 0, 0),
        Window("", 0, 0), Window("0123456789ab", -1, 0), Window("0123456789ab", 0, -1),
    ],
)  # fmt: skip
def test_no_other_name_becomes_a_path(segments: Segments, window: Window) -> None:
    """S16."""
    with pytest.raises(ValueError, match="no window"):
        segments.of(window)


def test_reading_while_another_thread_appends(segments: Segments) -> None:
    segment = segments.of(HERE)
    places = [put(segment, bytes([i]) * 500) for i in range(50)]
    wrong: list[int] = []

    def read() -> None:
        for i, place in enumerate(places):
            if bytes(segment.read(*place)) != bytes([i]) * 500:
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(50, 100):
        put(segment, bytes([i]) * 500)
    for thread in threads:
        thread.join(60)
    assert wrong == []


# ------------------------------------------------------------ with the writer


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = new_database(tmp_path)
    yield opened
    opened.close()


def store(database: Database, segment: Segment, key: str, content: bytes) -> None:
    def operation(connection: Connection) -> None:
        offset, size = put(segment, content)
        connection.execute(insert(meta).values(key=key, value=f"{offset} {size}"))
        database.writer.before_commit(segment)

    database.writer.run(operation)


def stored(database: Database, segment: Segment, key: str) -> bytes | None:
    with database.read() as connection:
        place = connection.scalar(select(meta.c.value).where(meta.c.key == key))
    return None if place is None else bytes(segment.read(*map(int, place.split())))


def test_a_row_refers_to_bytes_that_are_safe(
    database: Database, segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = segments.of(HERE)
    store(database, segment, "a", b"first")
    with monkeypatch.context() as patch:
        patch.setattr(segments_module, "_sync_data", fail)
        with pytest.raises(StorageFull):
            store(database, segment, "b", b"second")
    assert stored(database, segment, "b") is None
    store(database, segment, "c", b"third")
    assert stored(database, segment, "a") == b"first"
    assert stored(database, segment, "c") == b"third"
