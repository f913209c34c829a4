"""Memory that a process and its workers both see, and trees of tensors in it.

Tensors lie in anonymous memory that is mapped once and used again and again, as fresh pages are slow;
what says where they lie is JSON. A reader gets views: what is read costs no copy, and a *lease* tells
the owner when the last of those views is gone, so that nothing is written over what somebody still
holds.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.errors import ConfigError

Tree = Any  # nested dicts, lists, tuples and named tuples of tensors, arrays, numbers, words and None
Form = Any  # what JSON holds: the same tree with a place in memory for each tensor
Bytes = npt.NDArray[np.uint8]

_ALIGNED = 64
_STEP = 1 << 16


class Memory:
    """One piece of anonymous shared memory, growing as it is needed.

    Args:
        fd: of the memory in another process, which this object then owns; None makes new memory.

    Raises:
        OSError: the system has no memory or no file numbers left.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = _anonymous() if fd is None else fd
        self.size = 0
        self._map: mmap.mmap | None = None

    def reach(self, size: int) -> None:
        """Map at least `size` bytes, and make the memory that large where it is not."""
        if size <= self.size and self._map is not None:
            return
        there = os.fstat(self.fd).st_size
        if there < size:
            # A little more than asked for: the next block is rarely of exactly the same size.
            there = -(-(size + size // 8) // _STEP) * _STEP
            os.ftruncate(self.fd, there)
        # Views of the old mapping keep it alive as long as they need it.
        self._map = mmap.mmap(self.fd, there)
        self.size = there

    def lease(self) -> Bytes:
        """All mapped bytes; views of it keep it alive, so its end is the end of all of them."""
        assert self._map is not None
        return np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Give the memory back once nobody views it any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd, self.size, self._map = -1, 0, None


class Packed(NamedTuple):
    """A tree in a `Memory`.

    Args:
        form: where its parts lie; end: first byte behind them.
    """

    form: Form
    end: int


class Room:
    """Memory for tensors that are made where they shall be packed, so that they need not be copied there.

    Args:
        memory: where; end: first byte that is free.
    """

    def __init__(self, memory: Memory, end: int) -> None:
        self.memory = memory
        self.end = _rounded(end)
        self._places: dict[int, tuple[int, int]] = {}  # address -> number of bytes, place

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        at, self.end = self.end, _rounded(self.end + size)
        self.memory.reach(max(self.end, 1))
        made = _view(torch.from_numpy(self.memory.lease()), dtype, shape, at)
        self._places[made.data_ptr()] = size, at
        return made

    def place_of(self, tensor: Tensor) -> int | None:
        """Where a tensor lies, None for one that was not made here."""
        size, at = self._places.get(tensor.data_ptr(), (-1, -1))
        whole = size == tensor.numel() * tensor.element_size() and tensor.is_contiguous()
        return at if whole and size else None


def pack(tree: Tree, memory: Memory, start: int = 0, *, room: Room | None = None) -> Packed:
    """Copy a tree into memory, from the byte `start` on.

    Args:
        room: in the same memory and before `start`; what was made there stays where it is.

    Raises:
        ConfigError: FS-CFG-141, it holds something else than tensors, arrays, numbers, words and None.
    """
    writes: list[tuple[Tensor, int]] = []
    end = _rounded(start)

    def place(tensor: Tensor) -> list[Any]:
        nonlocal end
        made = None if room is None else room.place_of(tensor)
        if made is not None:
            return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), made]
        at, end = end, _rounded(end + tensor.numel() * tensor.element_size())
        writes.append((tensor, at))
        return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), at]

    form = _formed(tree, place)
    memory.reach(max(end, 1))
    whole = torch.from_numpy(memory.lease())
    with torch.no_grad():
        for tensor, at in writes:
            if tensor.numel():
                _view(whole, tensor.dtype, tensor.shape, at).copy_(tensor.detach())
    return Packed(form, end)


def unpack(form: Form, lease: Bytes, device: torch.device | None = None) -> Tree:
    """The tree of a form: its tensors are views of the lease, its arrays, which are small, copies.

    Args:
        device: where tensors shall be; those for the CPU stay views.

    Raises:
        ConfigError: FS-CFG-141, a class that the tree names is not known in this process.
    """
    return _read(form, torch.from_numpy(lease), device)


def _read(form: Form, whole: Tensor, device: torch.device | None) -> Tree:
    # A function of the module: one inside `unpack` would be a cycle that keeps the lease alive.
    if not isinstance(form, dict):
        return form
    ((kind, value),) = form.items()
    if kind in ("tensor", "array"):
        name, shape, at = value
        tensor = _view(whole, getattr(torch, name), shape, at)
        if kind == "array":
            return tensor.numpy().copy()
        return tensor if device is None or device.type == "cpu" else tensor.to(device)
    if kind == "dict":
        return {key: _read(part, whole, device) for key, part in value}
    if kind == "named":
        module, name, parts = value
        return _class(module, name)(*(_read(part, whole, device) for part in parts))
    found = [_read(part, whole, device) for part in value]
    return found if kind == "list" else tuple(found)


def _formed(tree: Tree, place: Callable[[Tensor], list[Any]]) -> Form:
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        return {"tensor": place(tree)}
    if isinstance(tree, np.ndarray | np.generic):
        return {"array": place(torch.from_numpy(np.ascontiguousarray(tree).reshape(tree.shape)))}
    if isinstance(tree, Mapping):
        return {"dict": [[_key(key), _formed(value, place)] for key, value in tree.items()]}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        kind = type(tree)
        parts = [_formed(value, place) for value in tree]
        return {"named": [kind.__module__, kind.__qualname__, parts]}
    if isinstance(tree, list | tuple):
        kind_name = "list" if isinstance(tree, list) else "tuple"
        return {kind_name: [_formed(value, place) for value in tree]}
    raise _unsharable(f"a {type(tree).__name__}")


def _key(key: object) -> str | int:
    if not isinstance(key, str | int):
        raise _unsharable(f"a key that is a {type(key).__name__}")
    return key


def _class(module: str, name: str) -> Any:
    """A named tuple that this process has loaded already; nothing is imported."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise _unsharable(f"the named tuple {module}.{name}, which is not to be found under this name")
    return found


def _unsharable(what: str) -> ConfigError:
    return ConfigError(
        "a value cannot be shared with a worker process",
        code="FS-CFG-141",
        where="[engine] workers",
        why=f"it holds {what}; shared are dicts, lists, tuples and named tuples of tensors, arrays, numbers "
        "and words",
        hint="define named tuples outside of functions, or set workers = 1",
    )


def _view(whole: Tensor, dtype: torch.dtype, shape: Any, at: int) -> Tensor:
    count = 1
    for length in shape:
        count *= length
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return whole[at : at + count * dtype.itemsize].view(dtype).view(tuple(shape))


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _anonymous() -> int:
    """A file number of memory without a name."""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a container may forbid it
            return os.memfd_create("fedsim")
    handle, path = tempfile.mkstemp(prefix="fedsim-")
    os.unlink(path)
    return handle
