"""How an accepted answer is read: a large one from its file, with its memory given back on demand."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import pytest
import torch

from fedsim import bundle
from fedsim.flat import ParamSpec
from fedsim.server import memory
from fedsim.server.answers import Answer, block_of
from fedsim.server.objects import Objects
from fedsim.server.segments import Segments, Window
from fedsim.types import UpdateBlock

RUN = "0123456789ab"
SIZE = 5000
DELTA = torch.arange(SIZE, dtype=torch.float32)


def block(folder: Path, *, inline: bool, personal: frozenset[str] = frozenset()) -> UpdateBlock:
    spec = ParamSpec(("head", "w"), ((3,), (SIZE,)), torch.float32, personal)
    content = bundle.encode({"vectors/delta": DELTA})
    objects, segments = Objects(folder / "objects"), Segments(folder / "segments")
    made = objects.put(content)
    (offset,) = segments.of(Window(RUN, 0, 0)).append([content])
    place = f"0/0/{offset}" if inline else "object"
    answer = Answer(bytes(16), 4, 2, made.digest, len(content), place, 10, 1, math.nan, 0.5, {})
    return block_of(
        answer, spec, state_version=0, device=torch.device("cpu"), run_id=RUN, objects=objects,
        segments=segments,
    )  # fmt: skip


def test_an_uploaded_answer_can_be_read_again_after_its_memory_was_given_back(tmp_path: Path) -> None:
    found = block(tmp_path, inline=False)
    assert found.release is not None
    for _ in range(2):
        assert torch.equal(found.vectors["delta"], DELTA.unsqueeze(0))
        found.release()


def test_an_inline_answer_is_in_memory(tmp_path: Path) -> None:
    found = block(tmp_path, inline=True)
    assert found.release is None
    assert torch.equal(found.vectors["delta"], DELTA.unsqueeze(0))


def test_an_answer_with_personal_entries_is_a_copy_in_memory(tmp_path: Path) -> None:
    found = block(tmp_path, inline=False, personal=frozenset({"head"}))
    assert found.release is None
    assert torch.equal(found.vectors["delta"][0, 3:], DELTA)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is of glibc")
def test_what_was_freed_in_small_pieces_goes_back_to_the_system() -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    size, count = 64 << 10, 1024
    pieces = [bytearray(b"x" * size) for _ in range(count)]
    last = bytearray(size)  # so that the pieces are not the end of the heap
    before = anonymous()
    del pieces
    memory.trim()
    assert anonymous() < before - size * count // 2
    assert len(last) == size
