"""Tensor bundles for tests: sound ones of every type, and any header around any body."""

from __future__ import annotations

import json
from typing import Any

import torch

from fedsim import bundle
from fedsim.bundle import DTYPES, Header

FLOATS = ["F64", "F32", "F16", "BF16"]


def every_type() -> dict[str, torch.Tensor]:
    tensors = {f"of_{code}": torch.tensor([[1, 0], [1, 1]]).to(dtype) for code, dtype in DTYPES.items()}
    return tensors | {
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        'é "quoted"': torch.arange(3, dtype=torch.int8),
    }


def framed(header: object, body: bytes = b"") -> bytes:
    """A bundle with this header, which is JSON text, bytes, or what json can write."""
    if isinstance(header, bytes):
        text = header
    else:
        text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(
    dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def read(content: bytes) -> Header:
    return bundle.read_header(content, len(content))
