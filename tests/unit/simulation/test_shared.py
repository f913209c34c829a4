"""Trees of tensors in shared memory: what comes out is what went in, and memory is free when nobody looks."""

from __future__ import annotations

import os
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.simulation.shared import Memory, Room, pack, unpack


class Pair(NamedTuple):
    """Two parts."""

    left: Any
    right: Any


def there_and_back(tree: Any, *, start: int = 0) -> Any:
    memory = Memory()
    packed = pack(tree, memory, start)
    return unpack(packed.form, memory.lease())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_a_tensor_comes_back_as_it_was(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = (torch.randn(shape) * 3).to(dtype)
    back = there_and_back({"x": sent})["x"]
    assert back.dtype == dtype
    assert torch.equal(back, sent)


def test_every_kind_of_tree_comes_back() -> None:
    nothing = float("nan")
    tree = {
        "a": [1, 2.5, None, True, "word"],
        "b": Pair(torch.arange(3), (np.arange(4.0), {}, ())),
        7: nothing,
    }
    back = there_and_back(tree, start=13)
    assert back["a"] == tree["a"]
    assert isinstance(back["b"], Pair)
    assert back["b"].left.tolist() == [0, 1, 2]
    assert back["b"].right[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert back["b"].right[1:] == ({}, ())
    assert back[7] != back[7]


def test_a_view_with_gaps_and_a_tensor_with_a_gradient_are_copied_as_values() -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    back = there_and_back([wide[:, ::2], wide.T, wide[:1].expand(3, 4), wide.clone().requires_grad_()])
    for found, sent in zip(back, [wide[:, ::2], wide.T, wide[:1].expand(3, 4), wide], strict=True):
        assert torch.equal(found, sent)
    assert not back[3].requires_grad


def test_two_processes_see_the_same_bytes_and_growth_is_followed() -> None:
    mine = Memory()
    first = pack(torch.arange(4), mine)
    theirs = Memory(os.dup(mine.fd))
    theirs.reach(first.end)
    unpack(first.form, theirs.lease())[0] = 9
    assert unpack(first.form, mine.lease()).tolist() == [9, 1, 2, 3]
    large = pack(torch.arange(100_000), theirs, first.end)
    mine.reach(large.end)
    assert torch.equal(unpack(large.form, mine.lease()), torch.arange(100_000))
    assert unpack(first.form, mine.lease()).tolist() == [9, 1, 2, 3]


def test_a_lease_ends_with_the_last_view_whoever_has_it() -> None:
    memory, ended = Memory(), []
    packed = pack({"x": torch.arange(6.0), "y": torch.zeros(2), "n": np.arange(3)}, memory)
    lease = memory.lease()
    weakref.finalize(lease, ended.append, True)
    tree = unpack(packed.form, lease)
    row, other, numbers = tree["x"].view(2, 3)[1], tree["y"].numpy(), tree["n"]
    del lease, tree
    assert not ended
    del row
    assert not ended
    del other
    assert ended
    assert numbers.tolist() == [0, 1, 2]


def test_what_was_made_in_the_memory_is_packed_where_it_lies() -> None:
    memory = Memory()
    start = pack(torch.arange(3), memory)
    room = Room(memory, start.end)
    made, other = room.take((2, 3), torch.float32), room.take((70_000,), torch.float64)
    made.copy_(torch.arange(6.0).view(2, 3))
    other.fill_(4)
    packed = pack(
        {"made": made, "row": made[0], "new": torch.ones(5), "other": other}, memory, room.end, room=room
    )
    assert packed.end < room.end + 1000  # the large one is there once
    tree = unpack(packed.form, memory.lease())
    made[1, 2] = 9
    assert tree["made"].tolist() == [[0, 1, 2], [3, 4, 9]]
    assert tree["row"].tolist() == [0, 1, 2]
    assert tree["new"].tolist() == [1] * 5
    assert torch.equal(tree["other"], other)
    assert unpack(start.form, memory.lease()).tolist() == [0, 1, 2]


def test_what_others_still_view_survives_closing_and_growing() -> None:
    memory = Memory()
    view = unpack(pack(torch.arange(5), memory).form, memory.lease())
    memory.reach(10 << 20)
    memory.close()
    assert view.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", [object(), {("a", 1): 2}, [{1, 2}], torch.device("cpu")])
def test_anything_else_is_refused(what: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        pack(what, Memory())
    assert caught.value.code == "FS-CFG-141"


def test_a_named_tuple_that_cannot_be_found_again_is_refused() -> None:
    class Hidden(NamedTuple):
        x: int

    with pytest.raises(ConfigError, match="shared") as caught:
        there_and_back(Hidden(1))
    assert "Hidden" in str(caught.value)
