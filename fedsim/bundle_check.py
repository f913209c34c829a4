"""Values of a tensor bundle, looked at block by block: what is not finite, and the length of a vector.

A bundle of several GiB is read through one small buffer, whatever it holds. Finite is decided on the raw
words: a float is NaN or infinite when its exponent has every bit set, so one AND and one maximum over
integers answer for all four formats, exactly, at the speed of memory and without a case that is slow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from fedsim import storage
from fedsim.bundle_header import DTYPES, Content, Entry, Header, read_header, read_into

# Fits the caches of a core; a multiple of every item size, so that no number is cut in two.
BLOCK_BYTES = 1 << 18
# What NumPy has as well: for small tensors its calls cost half of what those of torch do.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_WORDS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def first_not_finite(source: Content | Path) -> str | None:
    """Name of the first tensor, in file order, with a NaN or an infinity; None where all is finite.

    A truth value other than 0 and 1 counts as one. A file is read by small blocks.

    Raises:
        BundleError: the bundle is not sound.
        EnvironmentProblem: FS-ENV-024, the file cannot be read.
    """
    if not isinstance(source, Path):
        return first_bad(source, read_header(source, memoryview(source).nbytes))
    try:
        with source.open("rb", buffering=0) as file:
            return first_bad(file, read_header(file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise storage.unreadable(error, source) from error


def first_bad(source: Content | BinaryIO, header: Header) -> str | None:
    """As `first_not_finite`, of a bundle whose header was read already.

    Args:
        source: the whole bundle, or a file that can be read from any position.
    """
    for entry in header.entries:
        if is_bad(entry.dtype, blocks(source, header, entry)):
            return entry.name
    return None


def is_bad(dtype: str, pieces: Iterator[memoryview]) -> bool:
    """Whether these bytes of one tensor hold a NaN, an infinity or a truth value other than 0 and 1."""
    if dtype == "BOOL":
        return any(np.frombuffer(piece, np.uint8).max() > 1 for piece in pieces)
    if dtype not in _WORDS:
        return False
    words, mask = _WORDS[dtype]
    exponent = np.dtype(words).type(mask)
    scratch = np.empty(0, words)
    for piece in pieces:
        block = np.frombuffer(piece, words)
        if len(scratch) < len(block):
            scratch = np.empty(len(block), words)
        exponents = np.bitwise_and(block, exponent, out=scratch[: len(block)])
        if exponents.max() == exponent:
            return True
    return False


def norm(source: Content | BinaryIO, header: Header, entry: Entry) -> float:
    """Euclidean length of a floating tensor of finite values, in float64; infinite where float64 ends."""
    largest, total = 1.0, _squares(source, header, entry, 1.0)
    if math.isinf(total):  # only float64 values can get here: squares of the narrower formats fit
        largest = max(float(np.abs(piece).max()) for piece in _doubles(source, header, entry))
        total = _squares(source, header, entry, largest)
    return largest * math.sqrt(total)


def scaled(
    source: Content | BinaryIO, header: Header, entry: Entry, factor: float
) -> Iterator[bytes | memoryview]:
    """All bytes of a bundle in order, with one floating tensor multiplied; each is valid until the next."""
    begin, end = header.body + entry.begin, header.body + entry.end
    yield from _span(source, 0, begin)
    for piece in _doubles(source, header, entry):
        values = torch.from_numpy(piece * factor).to(DTYPES[entry.dtype])
        yield values.view(torch.uint8).numpy().tobytes()
    yield from _span(source, end, header.body + header.entries[-1].end)


def blocks(source: Content | BinaryIO, header: Header, entry: Entry) -> Iterator[memoryview]:
    """The bytes of one tensor in order, at most `BLOCK_BYTES` at a time; each is valid until the next.

    Raises:
        BundleError: the file is shorter than its header says.
    """
    return _span(source, header.body + entry.begin, header.body + entry.end)


def _span(source: Content | BinaryIO, begin: int, end: int) -> Iterator[memoryview]:
    if isinstance(source, bytes | bytearray | memoryview):
        whole = memoryview(source).cast("B")
        for start in range(begin, end, BLOCK_BYTES):
            yield whole[start : min(start + BLOCK_BYTES, end)]
        return
    buffer = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
    source.seek(begin)
    for start in range(begin, end, BLOCK_BYTES):
        piece = buffer[: min(BLOCK_BYTES, end - start)]
        read_into(source, piece)
        yield piece


def _squares(source: Content | BinaryIO, header: Header, entry: Entry, scale: float) -> float:
    total = 0.0
    with np.errstate(over="ignore"):  # the caller sees that the sum is infinite
        for piece in _doubles(source, header, entry):
            scaled = piece if scale == 1.0 else piece / scale
            total += float(scaled.dot(scaled))
    return total


def _doubles(source: Content | BinaryIO, header: Header, entry: Entry) -> Iterator[npt.NDArray[np.float64]]:
    for piece in blocks(source, header, entry):
        if entry.dtype in _FLOATS:
            yield np.frombuffer(piece, _FLOATS[entry.dtype]).astype(np.float64)
        else:
            # A copy of the block: torch wants memory that may be written, and aligned.
            yield torch.frombuffer(bytearray(piece), dtype=DTYPES[entry.dtype]).double().numpy()
