"""The audit log: its chain, what breaks it, anchors, and a line that a crash cut."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.errors import EnvironmentProblem
from fedsim.server.audit import START, Anchor, Audit, verify
from fedsim.server.ledger_errors import StorageFull


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of five lines."""
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, wall=lambda: 1000.0)
    for number in range(5):
        audit.write("node.approve", node=f"node {number}", by="admin")
    audit.close()
    return path


def forged(path: Path, anchor: Anchor | None = None) -> str:
    with pytest.raises(EnvironmentProblem) as caught:
        verify(path, anchor)
    assert caught.value.code == "FS-LED-011"
    assert caught.value.exit_code == 6
    return str(caught.value.why)


def change(path: Path, edit: Callable[[list[bytes]], object]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    edit(lines)
    path.write_bytes(b"".join(lines))


def test_each_line_holds_the_digest_of_the_one_before(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seq"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["before"] == START
    assert lines[2]["action"] == "node.approve"
    assert lines[2]["node"] == "node 2"
    assert lines[2]["time"] == 1000.0
    assert len({line["before"] for line in lines}) == 5
    assert verify(path).seq == 5
    assert path.stat().st_mode & 0o077 == 0


def test_a_log_that_is_opened_again_goes_on(path: Path) -> None:
    audit = Audit(path)
    assert audit.head == verify(path)
    written = audit.write("run.start", run="a")
    assert audit.head == written
    assert verify(path) == written
    assert written.seq == 6


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda lines: lines.__setitem__(1, lines[1].replace(b"node 1", b"node 9")), "line 3"),
        (lambda lines: lines.pop(2), "line 3"),
        (lambda lines: lines.insert(2, lines[1]), "line 3"),
        (lambda lines: lines.reverse(), "line 1"),
        (lambda lines: lines.__setitem__(3, b"not json\n"), "line 4"),
        (lambda lines: lines.__setitem__(3, b"[1]\n"), "line 4"),
        (lambda lines: lines.__setitem__(4, lines[4][:-1]), "torn"),
        (lambda lines: lines.pop(0), "line 1"),
    ],
)
def test_a_change_is_noticed_at_its_place(
    path: Path, edit: Callable[[list[bytes]], object], line: str
) -> None:
    change(path, edit)
    assert line in forged(path)


def test_an_anchor_finds_what_the_chain_alone_cannot(path: Path) -> None:
    anchor = verify(path)
    assert verify(path, anchor) == anchor
    change(path, lambda lines: lines.pop())
    assert verify(path).seq == 4, "lines cut off the end leave a chain that fits"
    assert "line 5 was exported" in forged(path, anchor)
    audit = Audit(path)
    audit.write("something else")
    audit.close()
    assert verify(path).seq == 5
    assert "not the one that was exported" in forged(path, anchor)


def test_an_older_anchor_still_holds(path: Path) -> None:
    anchor = verify(path)
    audit = Audit(path)
    for _ in range(3):
        audit.write("more")
    audit.close()
    assert verify(path, anchor).seq == 8
    assert verify(path, Anchor(0, START)).seq == 8


def test_an_empty_log_is_a_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    assert audit.head == verify(path) == Anchor(0, START)
    audit.close()
    assert "line 3 was exported" in forged(path, Anchor(3, "ab" * 32))


def test_a_line_that_a_crash_cut_is_dropped_and_written_down(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq":6,"ti')
    audit = Audit(path)
    audit.close()
    assert verify(path).seq == 6
    assert path.read_bytes().startswith(whole)
    last = json.loads(path.read_bytes().splitlines()[-1])
    assert last["action"] == "audit.torn"
    assert last["bytes"] == 12


def test_a_log_whose_only_line_was_cut_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"seq":1')
    Audit(path).close()
    assert verify(path).seq == 1


def test_a_last_line_longer_than_a_block_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    audit.write("short")
    audit.write("long", text="x" * 200_000)
    audit.close()
    again = Audit(path)
    again.write("after")
    again.close()
    assert verify(path).seq == 3


def test_a_file_that_is_no_log_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"something else\n")
    with pytest.raises(EnvironmentProblem) as caught:
        Audit(path)
    assert caught.value.code == "FS-LED-011"
    assert path.read_bytes() == b"something else\n"


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_log_as_it_was(path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(path)
    before = path.read_bytes()
    real = os.write

    def fail(handle: int, content: bytes = b"") -> int:
        if call == "write":
            real(handle, content[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageFull):
            audit.write("node.revoke", node="a")
    assert path.read_bytes() == before
    audit.write("node.revoke", node="a")
    assert verify(path).seq == 6


def test_nothing_in_a_field_can_make_a_line_of_its_own(path: Path) -> None:
    audit = Audit(path)
    audit.write("node.name", name='x\r\n{"seq":7}\u2028\x00\U0001f600', key=b"\x01\xff", file=Path("a/b"))
    audit.close()
    assert verify(path).seq == 6
    content = path.read_bytes().splitlines()[-1]
    assert len(path.read_bytes().splitlines()) == 6
    assert content.isascii()
    assert json.loads(content)["key"] == "01ff"
    assert json.loads(content)["name"] == 'x\r\n{"seq":7}\u2028\x00\U0001f600'


@pytest.mark.parametrize("field", ["seq", "time", "before"])
def test_a_field_cannot_replace_one_of_the_log(path: Path, field: str) -> None:
    audit = Audit(path)
    with pytest.raises(ValueError, match=field):
        audit.write("x", **{field: 0})
    assert verify(path).seq == 5


def test_threads_write_one_chain(path: Path) -> None:
    audit = Audit(path)

    def write(name: str) -> None:
        for number in range(20):
            audit.write("x", who=name, number=number)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    audit.close()
    assert verify(path).seq == 85
