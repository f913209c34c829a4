"""Bytes that somebody might send in place of an update: headers that lie, other formats, traps."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch


def framed(header: Any, body: bytes = b"") -> bytes:
    """A bundle with any header, as bytes or as what JSON makes of a value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(size: int, begin: int = 0, **fields: Any) -> dict[str, Any]:
    """The description of a float32 vector."""
    return {"dtype": "F32", "shape": [size], "data_offsets": [begin, begin + 4 * size], **fields}


def pickled() -> bytes:
    """A dictionary of arrays as the standard library writes it."""
    return pickle.dumps({"vectors/delta": np.zeros(3)})


def trap(trace: Path) -> bytes:
    """A pickle that makes the file `trace` when it is loaded."""

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (trace,))

    return pickle.dumps(Trap())


def torch_zip(tensors: dict[str, torch.Tensor]) -> bytes:
    """What torch.save writes: a zip of pickles."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def npz() -> bytes:
    """An archive of NumPy with an array of objects."""
    buffer = io.BytesIO()
    np.savez(buffer, delta=np.array([{}], dtype=object))
    return buffer.getvalue()


DELTA = "vectors/delta"
TWICE = f'{{"{DELTA}": {json.dumps(entry(2))}, "{DELTA}": {json.dumps(entry(2))}}}'.encode()

BOMBS: dict[str, bytes] = {
    "nothing": b"",
    "a header of 1 GB": (1 << 30).to_bytes(8, "little") + b"{}",
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"{}",
    "1e12 elements in 10 bytes": framed({DELTA: entry(10**12)}, bytes(10)),
    "a product that wraps": framed({DELTA: entry(2, shape=[2**63 - 1, 2**62, 4])}, bytes(8)),
    "overlapping offsets": framed({DELTA: entry(2), "vectors/x": entry(2, 4)}, bytes(12)),
    "a hole": framed({DELTA: entry(2), "vectors/x": entry(2, 12)}, bytes(20)),
    "a name twice": framed(TWICE, bytes(8)),
    "deep JSON": framed(b'{"a":' * 5_000 + b"1" + b"}" * 5_000),
    "not UTF-8": framed(f'{{"{DELTA}é": 1}}'.encode("latin-1")),
    "a negative number": framed({DELTA: entry(2, shape=[-2])}, bytes(8)),
    "negative offsets": framed({DELTA: entry(2, data_offsets=[-8, 0])}, bytes(8)),
    "a float for a number": framed({DELTA: entry(2, shape=[2.0])}, bytes(8)),
    "a name with an escape": framed({"\x1b[2J": entry(2)}, bytes(8)),
    "a pickle": pickled(),
    "a zip of pickles": torch_zip({DELTA: torch.zeros(3)}),
    "an npz": npz(),
}
"""By what is wrong with them."""
