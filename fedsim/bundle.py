"""Tensor bundles: named tensors as safetensors bytes, also from senders that nobody trusts.

The format is safetensors as it is: eight bytes with the length of a JSON header, the header (name ->
dtype, shape, begin and end), then the raw little-endian values. Reading starts with a strict check of
the header, before anything is allocated for it: the library accepts duplicate names and any rank, and
what reaches it here is already known to be sound. Writing is canonical, byte for byte what the library
writes without metadata: equal tensors give equal bytes, so a digest names a content.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim import storage
from fedsim.bundle_check import first_not_finite
from fedsim.bundle_header import (
    DTYPES,
    ITEM_BYTES,
    METADATA,
    BundleError,
    Content,
    Entry,
    Header,
    TensorSpec,
    check_schema,
    read_header,
)

__all__ = [
    "DTYPES", "BundleError", "Content", "Entry", "Header", "Mapped", "Object", "TensorSpec", "check_schema",
    "decode", "decode_file", "digest", "encode", "encode_to", "first_not_finite", "map_file", "read_header",
    "specs_of", "write_pieces",
]  # fmt: skip

# Of a tensor that is not contiguous memory of the CPU, this much is copied at a time.
_COPY_BYTES = 8 << 20
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Object(NamedTuple):
    """Some bytes: their SHA-256 and how many they are."""

    digest: bytes
    size: int


def digest(content: Content) -> bytes:
    """SHA-256 of these bytes, 32 bytes: the name of an object."""
    return hashlib.sha256(content).digest()


def specs_of(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Name, type and shape of each tensor, in canonical order.

    Raises:
        BundleError: a tensor has a type that no bundle can hold.
    """
    rank = {code: position for position, code in enumerate(DTYPES)}
    specs = [TensorSpec(name, _code(name, t), tuple(t.shape)) for name, t in tensors.items()]
    return tuple(sorted(specs, key=lambda spec: (rank[spec.dtype], spec.name)))


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bundle of these tensors; equal content gives equal bytes.

    Tensors may be on any device, views, transposed, or share memory: each is written whole.

    Raises:
        BundleError: a tensor, a name or the metadata that no bundle can hold.
    """
    return b"".join(_written(tensors, metadata or {}, block=None))


def encode_to(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Object:
    """Write the bundle to `path`, whole or not at all, and tell its digest; the tensors are not copied.

    What is not contiguous memory of the CPU is copied one block at a time.

    Raises:
        BundleError: as `encode`.
        EnvironmentProblem: FS-ENV-020 … 022; the old file, if there was one, is untouched.
    """
    return write_pieces(path, _written(tensors, metadata or {}, block=_COPY_BYTES))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> Object:
    """Write bytes to `path` while they are hashed, whole or not at all, and tell their digest.

    Raises:
        EnvironmentProblem: FS-ENV-020 … 022; the old file, if there was one, is untouched.
    """
    hashed, size = hashlib.sha256(), 0
    unfinished = path.with_name(f".writing-{secrets.token_hex(8)}")
    try:
        try:
            with unfinished.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                    hashed.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        storage.sync_folder(path.parent)
    except OSError as error:
        raise storage.problem(error, path) from error
    return Object(hashed.digest(), size)


def decode(content: Content) -> dict[str, Tensor]:
    """The tensors of a bundle by name: views where `content` may be written, else copies.

    Raises:
        BundleError: it is not sound.
    """
    view = memoryview(content).cast("B")
    header = read_header(view, len(view))
    if view.readonly:  # torch has no tensors that only read; a write must not change the caller's bytes
        header, view = header._replace(body=0), memoryview(bytearray(view[header.body :]))
    return _tensors(view, header)


class Mapped(NamedTuple):
    """The tensors of a file by name, and what gives the memory back that reading them took.

    After `release` they can be read again, from the file: it undoes every change of them.
    """

    tensors: dict[str, Tensor]
    release: Callable[[], None]


def decode_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a bundle by name, mapped from the file: pages are read when they are touched.

    A tensor may be changed; the change stays in memory and never reaches the file.

    Raises:
        BundleError: it is not sound.
        EnvironmentProblem: FS-ENV-024, the file cannot be read.
    """
    return map_file(path).tensors


def map_file(path: Path) -> Mapped:
    """As `decode_file`, for one who reads more than should stay in memory.

    Raises:
        BundleError: it is not sound.
        EnvironmentProblem: FS-ENV-024, the file cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            header = read_header(file, size)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise storage.unreadable(error, path) from error
    return Mapped(_tensors(memoryview(mapped), header), partial(_release, mapped))


def _release(mapped: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _code(name: str, tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _CODES:
        raise BundleError(
            f"tensor {name!r} ({tensor.dtype}, {tensor.layout}, {tensor.device}) fits no bundle"
        )
    return _CODES[tensor.dtype]


def _written(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], block: int | None
) -> Iterator[bytes | memoryview]:
    """Header and values in order; what must be copied is copied `block` bytes at a time, or whole."""
    specs = specs_of(tensors)
    table: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape in specs:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    read_header(head, len(head) + position)  # what is written can be read
    return _chained(head, [tensors[spec.name].detach() for spec in specs], block)


def _chained(head: bytes, tensors: list[Tensor], block: int | None) -> Iterator[bytes | memoryview]:
    yield head
    for tensor in tensors:
        yield from _pieces(tensor, block)


def _pieces(tensor: Tensor, block: int | None) -> Iterator[memoryview]:
    """The values of a tensor in C order."""
    if tensor.numel() == 0:
        return
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg()
    if block is None or plain or tensor.nbytes <= block:
        whole = tensor.cpu().resolve_neg().contiguous()
        assert whole.is_contiguous()
        raw = memoryview(whole.reshape(-1).view(torch.uint8).numpy().data)
        step = block or len(raw)
        yield from (raw[start : start + step] for start in range(0, len(raw), step))
        return
    rows = max(1, block // (tensor.nbytes // len(tensor)))
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        yield from _pieces(part[0] if len(part) == 1 else part, block)


def _tensors(view: memoryview, header: Header) -> dict[str, Tensor]:
    """A tensor over the memory of each entry, copied where it is not aligned for its type."""
    tensors: dict[str, Tensor] = {}
    for name, code, shape, begin, end in header.entries:
        dtype = DTYPES[code]
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = torch.frombuffer(view, dtype=torch.uint8, count=end - begin, offset=header.body + begin)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        if code == "BOOL" and int(raw.max()) > 1:
            raise BundleError(f"tensor {name!r} holds a truth value other than 0 and 1")
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors
