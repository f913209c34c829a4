"""The object store: whole or absent, by digest alone, and what a full disk or a crash leaves."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedsim.errors import EnvironmentProblem
from fedsim.server import objects as objects_module
from fedsim.server.ledger_errors import LedgerUnavailable, StorageFull
from fedsim.server.objects import Objects


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(tmp_path / "objects")


def digest_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def files(objects: Objects) -> list[Path]:
    return sorted(path for path in objects.folder.rglob("*") if path.is_file())


def refuse(code: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def test_bytes_are_found_under_their_digest(objects: Objects) -> None:
    found = objects.put(b"model")
    assert found == (digest_of(b"model"), 5)
    assert objects.path(found.digest) == objects.folder / found.digest.hex()[:2] / found.digest.hex()[2:]
    assert objects.has(found.digest)
    assert objects.size(found.digest) == 5
    assert objects.read(found.digest) == b"model"
    assert files(objects) == [objects.path(found.digest)]
    assert objects.path(found.digest).stat().st_mode & 0o077 == 0


def test_storing_again_changes_nothing(objects: Objects) -> None:
    found = objects.put(b"model")
    before = objects.path(found.digest).stat()
    assert objects.put(b"model") == found
    after = objects.path(found.digest).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_nothing_and_an_empty_object_differ(objects: Objects) -> None:
    assert not objects.has(digest_of(b""))
    objects.put(b"")
    assert objects.read(digest_of(b"")) == b""


def test_threads_that_store_the_same_leave_one_object(objects: Objects) -> None:
    content = os.urandom(200_000)
    threads = [threading.Thread(target=objects.put, args=(content,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert files(objects) == [objects.path(digest_of(content))]
    assert objects.read(digest_of(content)) == content


@pytest.mark.parametrize("name", [b"", b"\0" * 31, b"\0" * 33, "a" * 32])
def test_a_path_is_made_from_a_digest_and_nothing_else(objects: Objects, name: bytes) -> None:
    """S13, S16."""
    for call in (objects.path, objects.has, objects.read):
        with pytest.raises(ValueError, match="32 bytes"):
            call(name)


def test_whatever_the_32_bytes_are_the_path_stays_inside(objects: Objects) -> None:
    path = objects.path(b"../../../../../../../etc/passwd\0")
    assert path.parent.parent == objects.folder
    assert path.name.isalnum()


def test_a_finished_file_is_taken_over(objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "upload.part"
    file.write_bytes(b"update")
    assert objects.adopt(file, digest_of(b"update")) == (digest_of(b"update"), 6)
    assert not file.exists()
    assert objects.read(digest_of(b"update")) == b"update"


def test_a_file_that_is_not_there_cannot_be_taken_over(objects: Objects, tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable):
        objects.adopt(tmp_path / "none", digest_of(b"update"))


def test_another_length_under_a_name_is_put_right(objects: Objects) -> None:
    found = objects.put(b"model")
    objects.path(found.digest).write_bytes(b"mod")
    objects.put(b"model")
    assert objects.read(found.digest) == b"model"


def test_a_damaged_or_missing_object_is_noticed(objects: Objects) -> None:
    found = objects.put(b"model")
    objects.path(found.digest).write_bytes(b"modem")
    with pytest.raises(EnvironmentProblem) as caught:
        objects.read(found.digest)
    assert caught.value.code == "FS-LED-012"
    objects.remove([found.digest, digest_of(b"never there")])
    assert not objects.has(found.digest)
    with pytest.raises(EnvironmentProblem) as caught:
        objects.read(found.digest)
    assert caught.value.code == "FS-LED-012"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, StorageFull), (errno.EIO, LedgerUnavailable)])
def test_a_full_or_broken_disk_leaves_no_object(
    objects: Objects, call: str, code: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R8: at every call that can fail."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(code))
        with pytest.raises(kind):
            objects.put(b"model")
    assert files(objects) == []
    assert objects.read(objects.put(b"model").digest) == b"model"


def test_a_disk_that_fills_in_the_middle_leaves_no_object(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def a_little(handle: int, content: bytes) -> int:
        if os.fstat(handle).st_size >= 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content[:1000])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", a_little)
        with pytest.raises(StorageFull):
            objects.put(b"x" * 10_000)
    assert files(objects) == []


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_power_loss_while_storing_leaves_nothing_under_the_name(
    objects: Objects, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R29: what is on the disk before each call, as the next start finds it."""
    digest = digest_of(b"model")
    seen = []
    real = getattr(os, moment)

    def watched(*arguments: object) -> object:
        seen.append(objects.has(digest))
        return real(*arguments)

    monkeypatch.setattr(os, moment, watched)
    objects.put(b"model")
    assert seen
    assert not seen[0]


def test_the_bytes_are_synced_before_the_name_and_the_name_before_the_end(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put(b"makes no folder below")
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    monkeypatch.setattr(
        objects_module, "sync_folder", lambda folder: calls.append(f"sync {folder.name and 'folder'}")
    )
    objects.path(digest_of(b"model")).parent.mkdir(exist_ok=True)
    objects.put(b"model")
    assert calls == ["sync", "rename", "sync folder"]


def test_the_sweep_takes_unfinished_files_and_orphans_only(objects: Objects) -> None:
    kept, orphan = objects.put(b"kept"), objects.put(b"orphan")
    (objects.path(kept.digest).parent / ".writing-0123").write_bytes(b"half")
    stranger = objects.path(kept.digest).parent / "README"
    stranger.write_bytes(b"of the operator")
    (objects.folder / "note.txt").write_bytes(b"too")
    assert objects.sweep({kept.digest}) == 2
    assert files(objects) == sorted([objects.path(kept.digest), stranger, objects.folder / "note.txt"])
    assert not objects.has(orphan.digest)


def test_what_is_held_or_named_stays_when_it_is_to_be_removed(objects: Objects) -> None:
    held, named, free = (objects.put(content).digest for content in (b"held", b"named", b"free"))
    asked: list[bytes] = []

    def names(digests: Sequence[bytes]) -> set[bytes]:
        asked.extend(digests)
        return {named}

    objects.hold(held)
    objects.hold(held)
    objects.remove([held, named, free, digest_of(b"never there")], unless=names)
    assert sorted(asked) == sorted([named, free]), "nothing is asked about what stays anyhow"
    assert [objects.has(digest) for digest in (held, named, free)] == [True, True, False]
    objects.release(held)
    objects.remove([held])
    assert objects.has(held), "the other one holds it still"
    objects.release(held)
    objects.remove([held])
    assert not objects.has(held)
