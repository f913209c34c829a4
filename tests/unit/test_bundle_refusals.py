"""Bytes of untrusted origin are read as the library of safetensors reads them, or refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import bundle
from fedsim.bundle import DTYPES, BundleError
from tests.bundles import framed, read, tensor

GOOD = tensor()
BAD: dict[str, bytes] = {
    "no bytes": b"",
    "seven bytes": bytes(7),
    "header of 1 GB": (1 << 30).to_bytes(8, "little") + b"{}",
    "header of 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "header just above the limit": framed(b"{}" + b" " * (8 << 20)),
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "no header": framed(b""),
    "space before": framed(b" {}"),
    "byte order mark": framed("\ufeff{}"),
    "a list": framed([]),
    "a number": framed(b"1"),
    "not JSON": framed(b"{'a': 1}"),
    "two objects": framed(b"{}{}"),
    "not closed": framed(b'{"a": {"dtype": "F32"'),
    "text not closed": framed(b'{"a' + b'\\"' * 1000),
    "backslash at the end": framed(b'{"a\\'),
    "latin-1": framed('{"é": 1}'.encode("latin-1")),
    "line break in a name": framed(b'{"a\nb": 1}'),
    "deep lists": framed(b'{"a": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}"),
    "deep objects": framed(b'{"a":' * 500_000 + b"1" + b"}" * 500_000),
    "deep and not closed": framed(b"{" + b"[" * 8_000_000),
    "many values": framed(b'{"a": [' + b"0," * 3_000_000 + b"0]}"),
    "many lists": framed(b'{"a": [' + b"[]," * 1_000_000 + b"[]]}"),
    "name twice": framed(f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}', bytes(8)),
    "name twice, once escaped": framed(
        f'{{"a": {json.dumps(GOOD)}, "\\u0061": {json.dumps(GOOD)}}}', bytes(8)
    ),
    "field twice": framed('{"a": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "metadata twice": framed(b'{"__metadata__": {"a": "b"}, "__metadata__": {}}'),
    "metadata key twice": framed(b'{"__metadata__": {"a": "b", "a": "c"}}'),
    "metadata of a number": framed({"__metadata__": {"a": 1}}),
    "metadata of null": framed({"__metadata__": None}),
    "metadata of half a pair": framed(b'{"__metadata__": {"a": "\\ud800"}}'),
    "too many metadata": framed({"__metadata__": {str(i): "" for i in range(1025)}}),
    "65,537 tensors": framed({str(i): tensor("U8", [0], [0, 0]) for i in range(65_537)}),
    "no name": framed({"": GOOD}, bytes(8)),
    "name of 257 bytes": framed({"n" * 257: GOOD}, bytes(8)),
    "name of 129 letters": framed({"é" * 129: GOOD}, bytes(8)),
    "name with NUL": framed({"a\x00": GOOD}, bytes(8)),
    "name with an escape": framed({"a\x1b[2J": GOOD}, bytes(8)),
    "name of half a pair": framed(b'{"\\ud800": ' + json.dumps(GOOD).encode() + b"}", bytes(8)),
    "tensor is a list": framed({"a": [1]}),
    "tensor is null": framed({"a": None}),
    "field missing": framed({"a": {"dtype": "F32", "shape": [2]}}),
    "field too many": framed({"a": tensor(more=1)}, bytes(8)),
    "unknown type": framed({"a": tensor("C64")}, bytes(8)),
    "float8": framed({"a": tensor("F8_E4M3", [8])}, bytes(8)),
    "unsigned of 64 bits": framed({"a": tensor("U64", [1])}, bytes(8)),
    "type is a number": framed({"a": tensor(1)}, bytes(8)),
    "type is a list": framed({"a": tensor(["F32"])}, bytes(8)),
    "rank 9": framed({"a": tensor("F64", [1] * 9)}, bytes(8)),
    "shape is a number": framed({"a": tensor(shape=2)}, bytes(8)),
    "shape is null": framed({"a": tensor(shape=None)}, bytes(8)),
    "shape of texts": framed({"a": tensor(shape=["2"])}, bytes(8)),
    "shape of a list": framed({"a": tensor(shape=[[2]])}, bytes(8)),
    "shape of true": framed({"a": tensor("F64", [True])}, bytes(8)),
    "shape of 2.0": framed({"a": tensor(shape=[2.0])}, bytes(8)),
    "shape of 2e0": framed(b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', bytes(8)),
    "shape of -2": framed({"a": tensor(shape=[-2])}, bytes(8)),
    "two minuses": framed({"a": tensor(shape=[-1, -2])}, bytes(8)),
    "shape of -0": framed(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "shape of NaN": framed({"a": tensor(shape=[math.nan])}, bytes(8)),
    "shape of Infinity": framed({"a": tensor(shape=[math.inf])}, bytes(8)),
    "shape of 2^63": framed({"a": tensor(shape=[2**63])}, bytes(8)),
    "shape of 5,000 digits": framed({"a": tensor(shape=[10**4000])}, bytes(8)),
    "shape with a leading zero": framed(b'{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', bytes(8)),
    "product wraps to 2": framed({"a": tensor(shape=[2**63 - 1, 2**62, 4])}, bytes(8)),
    "zero beside what no machine can count": framed({"a": tensor(shape=[0, 2**62, 2**62], offsets=[0, 0])}),
    "1e12 elements, 10 bytes": framed({"a": tensor(shape=[10**12], offsets=[0, 4 * 10**12])}, bytes(10)),
    "1e12 elements in 10 bytes": framed({"a": tensor(shape=[10**12], offsets=[0, 10])}, bytes(10)),
    "offsets of three": framed({"a": tensor(offsets=[0, 8, 8])}, bytes(8)),
    "offsets of one": framed({"a": tensor(offsets=[8])}, bytes(8)),
    "offsets negative": framed({"a": tensor(offsets=[-8, 0])}, bytes(8)),
    "offsets backwards": framed({"a": tensor(offsets=[8, 0])}, bytes(8)),
    "offsets of text": framed({"a": tensor(offsets=["0", "8"])}, bytes(8)),
    "begins late": framed({"a": tensor(offsets=[8, 16])}, bytes(16)),
    "hole": framed({"a": tensor(), "b": tensor(offsets=[12, 20])}, bytes(20)),
    "overlap": framed({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)),
    "same bytes twice": framed({"a": tensor(), "b": tensor()}, bytes(8)),
    "backwards": framed({"a": tensor(offsets=[8, 16]), "b": tensor()}, bytes(16)),
    "body too short": framed({"a": tensor()}, bytes(7)),
    "body too long": framed({"a": tensor()}, bytes(9)),
    "body without tensors": framed({}, bytes(1)),
    "size and shape differ": framed({"a": tensor(shape=[3])}, bytes(8)),
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "a zip": b"PK\x03\x04\x14\x00\x00\x00\x08\x08" + bytes(100),
    "an npy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}" + bytes(100),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_what_is_not_a_sound_bundle_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_bytes(content)
    for attempt in (
        lambda: read(content),
        lambda: bundle.decode(content),
        lambda: bundle.decode_file(path),
        lambda: bundle.first_not_finite(path),
        lambda: bundle.first_not_finite(content),
    ):
        with pytest.raises(BundleError) as found:
            attempt()
        assert found.value.reason
        assert found.value.reason.isprintable()


def test_the_largest_legal_header_is_read() -> None:
    table = {f"{i:0100d}": tensor("U8", [1] * 8, [i, i + 1]) for i in range(5_000)}
    table["__metadata__"] = {str(i): "v" for i in range(1024)}
    assert len(read(framed(table, bytes(5_000))).entries) == 5_000
    many = {str(i): tensor("U8", [0], [0, 0]) for i in range(65_536)}
    text = json.dumps(many, separators=(",", ":"))
    assert len(read(framed(text)).entries) == 65_536


@pytest.mark.skipif(sys.platform != "linux", reason="counts address space in /proc")
def test_headers_that_promise_much_take_no_memory(tmp_path: Path) -> None:
    """S5: each is refused with a quarter of a GB of address space beyond what the imports need."""
    script = """
import resource, sys
from pathlib import Path
from fedsim import bundle
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for path in map(Path, sys.argv[1:]):
    for reader in (bundle.decode_file, bundle.first_not_finite):
        try:
            reader(path)
        except bundle.BundleError as error:
            print(path.name, error.code)
"""
    bombs = {
        "elements": BAD["1e12 elements, 10 bytes"],
        "length": BAD["header of 1 GB"],
        "longest": BAD["header of 2^63"],
        "deep": BAD["deep lists"],
        "values": BAD["many values"],
        "metadata": framed({"__metadata__": {str(i): "" for i in range(400_000)}}),
        "quotes": framed(b'{"a' + b'\\"' * (4_000_000)),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    # This file is really as long as its header says: the limit on headers alone refuses it.
    with (tmp_path / "length").open("r+b") as file:
        file.truncate((1 << 30) + 8)
    paths = [str(tmp_path / name) for name in bombs]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} FS-WIR-001" for name in bombs for _ in range(2)]


BLOCK = framed({"a": tensor(), "é": tensor("BOOL", [1, 0], [8, 8]), "__metadata__": {"k": "v"}}, bytes(8))
PARTS = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"1", b"-", b"8", b"e9", b"null", b"true",
    b'"F64"', b'"a"', b"\\u0000", b"\\ud83d", b"\xff", b"\x00", b" ", b"9223372036854775807",
    b'"__metadata__"',
]  # fmt: skip
EDIT = st.tuples(
    st.integers(0, len(BLOCK)),
    st.integers(0, 6) | st.just(0),
    st.just(b" ") | st.sampled_from(PARTS) | st.binary(max_size=3),
)


def sound_or_refused(content: bytes) -> None:
    """What is read is what the library reads too; anything else is a BundleError."""
    try:
        header = read(content)
    except BundleError:
        return
    theirs = dict(safetensors.deserialize(content))
    assert {e.name: (e.dtype, list(e.shape), e.end - e.begin) for e in header.entries} == {
        name: (found["dtype"], found["shape"], len(found["data"])) for name, found in theirs.items()
    }
    assert header.body + sum(e.end - e.begin for e in header.entries) == len(content)


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_are_read_as_the_library_reads_them_or_refused(content: bytes) -> None:
    sound_or_refused(content)
    sound_or_refused(framed(content))


@given(st.lists(EDIT, min_size=1, max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_damaged_headers_are_read_as_the_library_reads_them_or_refused(
    edits: list[tuple[int, int, bytes]], keep_length: bool
) -> None:
    text = bytearray(BLOCK[8:])
    for position, dropped, put in edits:
        text[position : position + dropped] = put
    length = len(BLOCK) - 16 if keep_length else len(text) - 8
    sound_or_refused(max(length, 0).to_bytes(8, "little") + bytes(text))


NUMBERS = st.sampled_from([0, 1, 2, 3, 8, -1, 2**31, 2**62, 2**63, 2**64, True, 1.0, None, "1", []])


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A sound header, in half of the cases with one thing in it replaced, and the size of its body."""
    table: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.sampled_from(["a", "b c", "é", '"']), max_size=3, unique=True)):
        code = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + math.prod(shape) * int(re.sub(r"\D", "", code) or 8) // 8
        table[name] = tensor(code, shape, [position, end])
        position = end
    if table and draw(st.booleans()):
        fields = table[draw(st.sampled_from(sorted(table)))]
        kind = draw(st.sampled_from(["dtype", "shape", "data_offsets", "begin", "end", "name", "more"]))
        if kind in ("begin", "end"):
            fields["data_offsets"][kind == "end"] = draw(NUMBERS)
        elif kind == "name":
            table[draw(st.sampled_from(["", "\u200b", "__metadata__", "more"]))] = table.pop(
                draw(st.sampled_from(sorted(table)))
            )
        elif kind == "dtype":
            fields["dtype"] = draw(st.sampled_from(["U64", "U32", "F8_E4M3", "f32", None, 4]))
        else:
            fields[kind] = draw(NUMBERS | st.lists(NUMBERS, max_size=3))
    return table, position + draw(st.sampled_from([0, 0, 0, 1, -1]))


@given(tables())
@settings(max_examples=300, deadline=None)
def test_tables_with_wrong_numbers_are_read_as_the_library_reads_them_or_refused(
    drawn: tuple[dict[str, Any], int],
) -> None:
    table, body = drawn
    sound_or_refused(framed(table, bytes(max(body, 0))))


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda n: n.isprintable() and n != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=4)),
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_again(table: dict[str, tuple[str, list[int]]]) -> None:
    tensors = {
        name: torch.arange(math.prod(shape)).reshape(shape).to(DTYPES[code])
        for name, (code, shape) in table.items()
    }
    content = bundle.encode(tensors)
    sound_or_refused(content)
    bundle.check_schema(read(content), bundle.specs_of(tensors))
    found = bundle.decode(content)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
