"""The strict reader of a tensor bundle's header: what comes from a sender that nobody trusts starts here.

A header is a few kB of JSON that promises sizes. Each promise is checked before anything is allocated for
it: the safetensors library itself accepts duplicate names (the last one wins) and any rank, and a JSON
parser alone accepts nesting and numbers without end. `fedsim.bundle` is what others import.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch

from fedsim.errors import FedsimError

Content = bytes | bytearray | memoryview

DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Every type that a bundle may hold, in the order in which the tensors of a bundle are written."""

ITEM_BYTES = {code: dtype.itemsize for code, dtype in DTYPES.items()}

MOST_HEADER_BYTES = 8 << 20
MOST_TENSORS = 65_536
MOST_NAME_BYTES = 256
MOST_RANK = 8
MOST_METADATA = 1_024
METADATA = "__metadata__"
_MOST_NUMBER = 2**63 - 1
_MOST_KNOWN_BYTES = 4096  # of a header that is remembered
_FIELDS = {"dtype", "shape", "data_offsets"}
# What the JSON of a header within the limits can hold: {name: {field: [...]}}, 12 commas a tensor.
_MOST_DEPTH = 3
_MOST_OPENED = 3 * MOST_TENSORS + 2
_MOST_COMMAS = 12 * MOST_TENSORS + MOST_METADATA
_NO_FRAME = bytes(set(range(256)) - set(b"{}[],"))
# A text, also one that never ends: without the last alternative the search would start again at each quote.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


class BundleError(FedsimError):
    """Bytes that are no sound bundle, or tensors that do not fit one.

    Args:
        reason: what is wrong, in one short sentence without a full stop.
    """

    exit_code = 2
    default_code = "FS-WIR-001"

    def __init__(self, reason: str) -> None:
        super().__init__(
            "the tensor bundle cannot be used",
            why=reason,
            hint="bundles are safetensors as fedsim writes them; the tensors must be those of the task",
        )
        self.reason = reason


class Entry(NamedTuple):
    """One tensor of a bundle: its bytes are [begin, end) of the body."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a bundle holds, in file order.

    Args:
        metadata: texts by name.
        body: offset of the first byte after the header.
    """

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    body: int


class TensorSpec(NamedTuple):
    """Name, type (a key of `DTYPES`) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_header(source: Content | BinaryIO, size: int) -> Header:
    """The header of an untrusted bundle, checked before anything is allocated for its tensors.

    Args:
        source: the bytes (the header suffices), or a file at its beginning.
        size: bytes of the whole bundle.

    Raises:
        BundleError: the first thing that is wrong.
    """
    length = int.from_bytes(_take(source, 0, 8), "little")
    if length > MOST_HEADER_BYTES:
        _refuse(f"its header claims {length} bytes, at most {MOST_HEADER_BYTES} are read")
    body = 8 + length
    if body > size:
        _refuse(f"its header claims {length} bytes, the bundle has {size} in all")
    raw = _take(source, 8, length)
    found = _known(raw, size) if length <= _MOST_KNOWN_BYTES else _checked(raw, size)
    # What is given out must not be changed by somebody else who had the same.
    return found._replace(metadata=dict(found.metadata))


def _checked(raw: bytes, size: int) -> Header:
    """The header out of its JSON."""
    body = 8 + len(raw)
    table = _parse(raw)
    metadata = _metadata(table.pop(METADATA, {}))
    if len(table) > MOST_TENSORS:
        _refuse(f"it holds {len(table)} tensors, at most {MOST_TENSORS} are read")
    entries: list[Entry] = []
    position = 0
    for name, fields in table.items():
        entry = _entry(name, fields)
        if entry.begin != position:
            _refuse(f"tensor {name!r} begins at {entry.begin}, the one before it ends at {position}")
        entries.append(entry)
        position = entry.end
    if position != size - body:
        _refuse(f"its tensors have {position} bytes, its body has {size - body}")
    return Header(tuple(entries), metadata, body)


# The updates of a round have the very same header. Those that were refused are not remembered.
_known = lru_cache(maxsize=16)(_checked)


def check_schema(header: Header, schema: Sequence[TensorSpec]) -> None:
    """Compare what a bundle holds with what it must hold, by name.

    Raises:
        BundleError: the first tensor that is missing, is of another type or shape, or is one too many.
    """
    held = {entry.name: entry for entry in header.entries}
    for wanted in schema:
        entry = held.pop(wanted.name, None)
        if entry is None:
            _refuse(f"tensor {wanted.name!r} is missing")
        if entry.dtype != wanted.dtype:
            _refuse(f"tensor {wanted.name!r} is {entry.dtype}, it must be {wanted.dtype}")
        if entry.shape != tuple(wanted.shape):
            _refuse(f"tensor {wanted.name!r} has shape {_shown(entry.shape)}, not {_shown(wanted.shape)}")
    for name in held:
        _refuse(f"tensor {name!r} does not belong there")


def _refuse(reason: str) -> NoReturn:
    raise BundleError(reason)


def read_into(file: BinaryIO, buffer: memoryview) -> None:
    """Fill `buffer`; one call of the system may bring less than it was asked for.

    Raises:
        BundleError: the file ends before.
    """
    filled = 0
    while filled < len(buffer):
        # typeshed gives readinto to the concrete classes alone
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            _refuse("it ends before its header or its tensors do")
        filled += count


def _take(source: Content | BinaryIO, begin: int, count: int) -> bytes:
    """`count` bytes of the header; a file stands at `begin` already."""
    if not isinstance(source, bytes | bytearray | memoryview):
        buffer = bytearray(count)
        read_into(source, memoryview(buffer))
        return bytes(buffer)
    taken = bytes(memoryview(source).cast("B")[begin : begin + count])
    if len(taken) < count:
        _refuse("it ends before its header does")
    return taken


def _parse(raw: bytes) -> dict[str, Any]:
    """The JSON object of a header: bounded nesting, whole numbers only, no key twice."""
    if not raw.startswith(b"{"):
        _refuse("its header is no JSON object")
    _check_size(raw)
    try:
        return json.loads(  # type: ignore[no-any-return]
            raw.decode(),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError:
        _refuse("its header is not UTF-8")
    except ValueError:
        _refuse("its header is not JSON")


def _check_size(raw: bytes) -> None:
    """Refuse, before the parser sees it, what nests deeper or holds more values than any header may."""
    frame = _TEXT.sub(b"", raw).translate(None, delete=_NO_FRAME)
    brackets = np.frombuffer(frame.replace(b",", b""), np.uint8)
    opened = (brackets == ord("{")) | (brackets == ord("["))
    if len(brackets) > 2 * _MOST_OPENED or frame.count(b",") > _MOST_COMMAS:
        _refuse("its header holds too many values")
    if np.where(opened, 1, -1).cumsum().max(initial=0) > _MOST_DEPTH:
        _refuse("its header nests too deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        _refuse("its header holds a name twice")
    return table


def _natural(text: str) -> int:
    if text.startswith("-") or len(text) > 19 or int(text) > _MOST_NUMBER:
        _refuse(f"{text[:24]} is no size")
    return int(text)


def _no_number(text: str) -> NoReturn:
    _refuse(f"{text[:24]} is no size")


def _metadata(table: Any) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        _refuse("its metadata are not texts by name")
    if len(table) > MOST_METADATA:
        _refuse(f"it holds {len(table)} metadata, at most {MOST_METADATA} are read")
    try:
        "".join((*table, *table.values())).encode()
    except UnicodeEncodeError:  # half a surrogate pair, written as an escape
        _refuse("its metadata are not UTF-8")
    return table


def _entry(name: str, fields: Any) -> Entry:
    """One tensor of the header, checked by itself."""
    if not name.isprintable() or not 0 < len(name.encode()) <= MOST_NAME_BYTES:
        _refuse(f"{name[:40]!a} is no name of a tensor: 1 to {MOST_NAME_BYTES} bytes, all printable")
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        _refuse(f"tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        _refuse(f"tensor {name!r} is of a type that is not allowed")
    if not _numbers(shape) or len(shape) > MOST_RANK:
        _refuse(f"the shape of tensor {name!r} is no list of at most {MOST_RANK} sizes")
    if not _numbers(offsets) or len(offsets) != 2:
        _refuse(f"the data_offsets of tensor {name!r} are no two sizes")
    # A zero beside huge dimensions: torch counts strides as if it were a one.
    if math.prod(max(length, 1) for length in shape) * ITEM_BYTES[code] > _MOST_NUMBER:
        _refuse(f"tensor {name!r} is too large for any machine")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[code]:
        _refuse(f"tensor {name!r} has other bytes than its type and shape need")
    return Entry(name, code, tuple(shape), offsets[0], offsets[1])


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _shown(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
