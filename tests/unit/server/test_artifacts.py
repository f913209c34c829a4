"""Lines of a log that is being written while it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsim.server.artifacts import lines_from


class WrittenMeanwhile:
    """A file to which its writer appends `more` right after the first read."""

    def __init__(self, path: Path, more: bytes) -> None:
        self.path, self.more = path, more
        self.file = open(path, "rb")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> WrittenMeanwhile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def readline(self, size: int) -> bytes:
        line = self.file.readline(size)
        with open(self.path, "ab") as writer:
            writer.write(self.more)
        self.more = b""
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize(("longest", "line"), [(100, "torn line"), (6, "torn l")])
def test_a_line_that_is_finished_between_two_reads_is_given_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int, line: str
) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"to")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: WrittenMeanwhile(path, b"rn line\nnext\n"))
        found = lines_from(path, 0, longest=longest, most=10)
    assert found == [(line, len(b"torn line\n")), ("next", path.stat().st_size)]


def test_a_line_whose_rest_is_still_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"whole\nto")
    assert lines_from(path, 0, longest=100, most=10) == [("whole", 6)]
