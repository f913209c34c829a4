"""A file in blocks: its bytes, whatever the pieces and the file system, and a disk that fails."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.server import block_file
from fedsim.server.block_file import BLOCK_BYTES, BlockFile, Blocks

CONTENT = random.Random(0).randbytes(2 * BLOCK_BYTES + 5_000)


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    made = Blocks(most=2)
    yield made
    made.close()


def append(file: BlockFile, begin: int, end: int, step: int) -> None:
    for at in range(begin, end, step):
        file.append(CONTENT[at : min(at + step, end)])


@pytest.mark.parametrize("way", ["blocks", "none free", "no direct writes", "odd device"])
def test_the_file_holds_what_was_appended_also_after_an_odd_offset(
    tmp_path: Path, blocks: Blocks, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "none free":
        assert blocks.take()
        assert blocks.take()
    if way == "no direct writes":
        monkeypatch.setattr(block_file, "_DIRECT", 0)
    path = tmp_path / "file"
    file = BlockFile(path, blocks)
    if way == "odd device":
        direct, pwrite = file._direct, os.pwrite

        def refuse(handle: int, data: memoryview, at: int) -> int:
            if handle == direct:
                raise OSError(errno.EINVAL, "another alignment")
            return pwrite(handle, data, at)

        monkeypatch.setattr(os, "pwrite", refuse)
    file.begin(0)
    append(file, 0, 1_000_001, 70_000)
    file.flush()
    assert file.written == path.stat().st_size == 1_000_001
    append(file, 1_000_001, len(CONTENT), 700_000)
    file.flush()
    assert file.written == len(CONTENT)
    file.close()
    assert path.read_bytes() == CONTENT


def test_a_file_goes_on_where_it_is_cut(tmp_path: Path, blocks: Blocks) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:5_000] + b"never synced")
    file = BlockFile(path, blocks)
    file.begin(5_000)
    append(file, 5_000, len(CONTENT), 1 << 20)
    file.flush()
    file.close()
    assert path.read_bytes() == CONTENT


def test_a_block_that_the_disk_refuses_is_told_and_what_was_written_is_known(
    tmp_path: Path, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = BlockFile(tmp_path / "file", blocks)
    file.begin(0)
    append(file, 0, BLOCK_BYTES, 1 << 20)
    file.flush()

    def full(handle: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        append(file, BLOCK_BYTES, 2 * BLOCK_BYTES, 1 << 20)
        with pytest.raises(OSError, match="full"):
            file.flush()
    assert file.written == BLOCK_BYTES
    file.drop()
    file.close()
    taken = [blocks.take(), blocks.take(), blocks.take()]
    assert [block is None for block in taken] == [False, False, True], "all blocks came back, and no more"


def test_a_file_that_is_given_up_gives_its_blocks_back(tmp_path: Path, blocks: Blocks) -> None:
    for _ in range(3):
        file = BlockFile(tmp_path / "file", blocks)
        file.begin(0)
        append(file, 0, BLOCK_BYTES + 10, 1 << 20)
        file.close()
    assert blocks.take() is not None
    assert blocks.take() is not None
