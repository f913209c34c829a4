"""Random updates that a coordinator accepts, of any size: large ones are never in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fedsim import bundle
from fedsim.bundle import DTYPES, TensorSpec
from fedsim.bundle_header import ITEM_BYTES

BLOCK_BYTES = 1 << 20
_SMALL = 4 << 20


class Update(NamedTuple):
    """A bundle to hand in.

    Args:
        read: (offset, length) -> its bytes there.
    """

    digest: bytes
    size: int
    read: Callable[[int, int], bytes]


class Updates:
    """Random valid updates of one layout.

    Args:
        specs: what an answer must hold.
        seed: of the values.
    """

    def __init__(self, specs: Sequence[TensorSpec], seed: int) -> None:
        self._specs = list(specs)
        self._draw = np.random.default_rng(seed)
        self._head = b""

    def next(self) -> Update:
        """An update that nobody sent before; a large one repeats one random block and is never in memory."""
        size = sum(int(np.prod(s.shape)) * ITEM_BYTES[s.dtype] for s in self._specs)
        return self._small() if size <= _SMALL else self._large(size)

    def _small(self) -> Update:
        if {spec.dtype for spec in self._specs} == {"F32"}:
            head = self._head = self._head or _header(self._specs)
            count = sum(int(np.prod(spec.shape)) for spec in self._specs)
            content = head + (1e-3 * self._draw.standard_normal(count, np.float32)).tobytes()
        else:
            content = bundle.encode({spec.name: self._tensor(spec) for spec in self._specs})
        return Update(hashlib.sha256(content).digest(), len(content), lambda at, n: content[at : at + n])

    def _tensor(self, spec: TensorSpec) -> torch.Tensor:
        values = 1e-3 * self._draw.standard_normal(spec.shape, np.float32)
        return torch.as_tensor(values).to(DTYPES[spec.dtype])

    def _large(self, size: int) -> Update:
        if {spec.dtype for spec in self._specs} != {"F32"}:
            raise ValueError("a large update is made of float32 alone")
        head = self._head = self._head or _header(self._specs)
        block = (1e-3 * self._draw.standard_normal(BLOCK_BYTES // 4, np.float32)).tobytes()
        twice = block + block

        def read(at: int, length: int) -> bytes:
            length = min(length, len(head) + size - at)
            if at < len(head):
                taken = head[at : at + length]
                return taken + read(at + len(taken), length - len(taken)) if len(taken) < length else taken
            start = (at - len(head)) % BLOCK_BYTES
            if start + length <= len(twice):
                return twice[start : start + length]
            return b"".join(read(at + n, min(BLOCK_BYTES, length - n)) for n in range(0, length, BLOCK_BYTES))

        hashed = hashlib.sha256(head)
        for at in range(len(head), len(head) + size, BLOCK_BYTES):
            hashed.update(read(at, BLOCK_BYTES))
        return Update(hashed.digest(), len(head) + size, read)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """The header of a bundle, without a tensor of its size: meta-information is all that it needs."""
    table, at = {}, 0
    for spec in sorted(specs, key=lambda s: s.name):
        end = at + int(np.prod(spec.shape)) * ITEM_BYTES[spec.dtype]
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
