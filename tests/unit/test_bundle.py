"""Tensor bundles: canonical to write, strict to read, bounded in memory."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import bundle, bundle_check
from fedsim.bundle import DTYPES, BundleError, Header, TensorSpec
from fedsim.errors import EnvironmentProblem

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


# Writing.


def test_the_bytes_are_those_that_the_library_writes() -> None:
    tensors = {name: t.contiguous() for name, t in every_type().items()}
    assert bundle.encode(tensors) == safetensors.torch.save(tensors)


def test_equal_content_gives_equal_bytes_whatever_the_order_and_the_layout() -> None:
    tensors = every_type()
    metadata = {"fedsim.kind": "update", "a": "b"}
    first = bundle.encode(tensors, metadata)
    backwards = {name: tensors[name] for name in reversed(tensors)}
    strided = {name: torch.stack([t, t], dim=-1)[..., 0] if t.numel() else t for name, t in backwards.items()}
    assert bundle.encode(strided, dict(reversed(metadata.items()))) == first
    assert read(first).metadata == metadata


def test_views_that_share_memory_or_are_not_contiguous_are_written_as_what_they_show() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "same": base,
        "columns": base[:, ::2],
        "transposed": base.t(),
        "one row three times": base[0].expand(3, 4),
        "negated without a copy": torch.complex(base, base).conj().imag,
    }
    for name, found in bundle.decode(bundle.encode(tensors)).items():
        assert torch.equal(found, tensors[name]), name


@pytest.mark.parametrize("block", [16, 64, 8 << 20])
def test_a_file_holds_the_same_bytes_and_its_digest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(bundle, "_COPY_BYTES", block)
    cube = torch.arange(120.0).reshape(4, 5, 6)
    tensors = every_type() | {"cube": cube.permute(2, 0, 1), "strided": torch.arange(99.0)[::3]}
    content = bundle.encode(tensors)
    path = tmp_path / "update.safetensors"
    written = bundle.encode_to(path, tensors)
    assert path.read_bytes() == content
    assert written == bundle.Object(hashlib.sha256(content).digest(), len(content))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_tensor_that_must_be_copied_is_copied_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_COPY_BYTES", 64)
    wide = torch.arange(400.0).reshape(4, 100).t()
    pieces = list(bundle._pieces(wide, 64))
    assert max(map(len, pieces)) <= 64
    assert b"".join(pieces) == wide.contiguous().numpy().tobytes()


def test_writing_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "update.safetensors"
    path.write_bytes(b"old")

    def breaking() -> Any:
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem) as found:
        bundle.write_pieces(path, breaking())
    assert found.value.code == "FS-ENV-021"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(EnvironmentProblem) as found:
        bundle.encode_to(tmp_path / "no folder" / "x", {})
    assert found.value.code == "FS-ENV-020"


@pytest.mark.parametrize(
    "tensors",
    [
        {"complex": torch.zeros(2, dtype=torch.complex64)},
        {"sparse": torch.zeros(2, 2).to_sparse()},
        {"meta": torch.zeros(2, device="meta")},
        {"": torch.zeros(2)},
        {"n" * 257: torch.zeros(2)},
        {"escape \x1b[31m": torch.zeros(2)},
        {"half a pair \ud800": torch.zeros(2)},
        {"__metadata__": torch.zeros(2)},
        {"rank 9": torch.zeros([1] * 9)},
    ],
    ids=lambda tensors: ascii(next(iter(tensors)))[:20],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BundleError):
        bundle.encode(tensors)
    with pytest.raises(BundleError):
        bundle.encode_to(tmp_path / "x", tensors)
    assert not list(tmp_path.iterdir())


# Reading.


def test_every_type_scalars_and_empty_tensors_come_back(tmp_path: Path) -> None:
    tensors = every_type()
    content = bundle.encode(tensors)
    (tmp_path / "b").write_bytes(content)
    sources = [bundle.decode(content), bundle.decode(bytearray(content)), bundle.decode_file(tmp_path / "b")]
    for found in sources:
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)


def test_an_empty_bundle_and_one_of_empty_tensors_are_legal(tmp_path: Path) -> None:
    assert bundle.decode(bundle.encode({})) == {}
    content = bundle.encode({"a": torch.zeros(0), "b": torch.zeros(3, 0, dtype=torch.int16)})
    (tmp_path / "b").write_bytes(content)
    for found in (bundle.decode(content), bundle.decode_file(tmp_path / "b")):
        assert {name: tuple(t.shape) for name, t in found.items()} == {"a": (0,), "b": (3, 0)}


def test_a_change_of_a_decoded_tensor_reaches_neither_bytes_nor_file(tmp_path: Path) -> None:
    content = bundle.encode({"a": torch.ones(4)})
    path = tmp_path / "b"
    path.write_bytes(content)
    kept = bytes(bytearray(content))
    bundle.decode(content)["a"].zero_()
    bundle.decode_file(path)["a"].zero_()
    assert content == kept
    assert path.read_bytes() == kept


def test_memory_that_may_be_written_is_viewed_not_copied() -> None:
    content = bytearray(bundle.encode({"a": torch.ones(4)}))
    bundle.decode(content)["a"].zero_()
    assert bundle.decode(content)["a"].tolist() == [0, 0, 0, 0]


def test_tensors_that_are_not_aligned_are_copied() -> None:
    values = np.arange(4, dtype="<f4").tobytes()
    table = {"bytes": tensor("U8", [1], [0, 1]), "floats": tensor("F32", [4], [1, 17])}
    found = bundle.decode(bytearray(framed(table, b"\x07" + values)))
    assert found["floats"].tolist() == [0, 1, 2, 3]
    assert found["floats"].data_ptr() % 4 == 0


def test_the_header_is_read_from_a_file_that_gives_few_bytes_at_a_time() -> None:
    content = bundle.encode(every_type(), {"kind": "x"})

    class Slow(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:3])

    assert bundle.read_header(Slow(content), len(content)) == read(content)
    with pytest.raises(BundleError, match="FS-WIR-001"):
        bundle.read_header(Slow(content[:40]), len(content))


def test_the_header_alone_suffices_when_the_size_is_known() -> None:
    content = bundle.encode({"a": torch.ones(1000)})
    header = read(content)
    assert bundle.read_header(content[: header.body], len(content)) == header


def test_metadata_and_other_tensors_do_not_mix() -> None:
    header = read(framed({"__metadata__": {"x": "1"}, "a": tensor()}, bytes(8)))
    assert [entry.name for entry in header.entries] == ["a"]
    assert header.metadata == {"x": "1"}


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


# The schema.


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ([("a", "F32", (2,)), ("b", "I64", ())], None),
        ([("b", "I64", ()), ("a", "F32", (2,))], None),
        ([("a", "F32", (2,))], "tensor 'b' does not belong there"),
        ([("c", "F32", (2,)), ("a", "F32", (2,)), ("b", "I64", ())], "tensor 'c' is missing"),
        ([("a", "F64", (2,)), ("b", "I32", ())], "tensor 'a' is F32, it must be F64"),
        ([("b", "I64", (1,)), ("a", "F64", (2,))], "tensor 'b' has shape [], not [1]"),
        ([("a", "F32", (2, 1)), ("b", "I64", ())], "tensor 'a' has shape [2], not [2, 1]"),
    ],
)
def test_the_schema_is_compared_by_name_and_the_first_difference_is_named(
    wanted: list[tuple[str, str, tuple[int, ...]]], reason: str | None
) -> None:
    header = read(bundle.encode({"a": torch.zeros(2), "b": torch.tensor(1)}))
    schema = [TensorSpec(*each) for each in wanted]
    if reason is None:
        bundle.check_schema(header, schema)
    else:
        with pytest.raises(BundleError) as found:
            bundle.check_schema(header, schema)
        assert found.value.reason == reason


# Values.


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, code: str, value: float, place: int
) -> None:
    bad = torch.ones(200_000, dtype=DTYPES[code])
    bad[place] = value
    content = bundle.encode({"a": torch.ones(3), "bad": bad, "integers": torch.ones(3, dtype=torch.int64)})
    (tmp_path / "b").write_bytes(content)
    assert bundle.first_not_finite(content) == "bad"
    assert bundle.first_not_finite(tmp_path / "b") == "bad"


@pytest.mark.parametrize("code", FLOATS)
def test_every_finite_value_passes(code: str) -> None:
    info = torch.finfo(DTYPES[code])
    values = [0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal / 2, -1.0]
    content = bundle.encode({"a": torch.tensor(values, dtype=DTYPES[code]).repeat(40_000)})
    assert bundle.first_not_finite(content) is None


@pytest.mark.parametrize("code", ["F16", "BF16"])
def test_all_words_of_sixteen_bits_are_judged_as_torch_judges_them(code: str) -> None:
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    finite = torch.isfinite(words.view(DTYPES[code])).tolist()
    judged = [not bundle_check.is_bad(code, iter([memoryview(word.tobytes())])) for word in words.numpy()]
    assert judged == finite


def test_integers_that_look_like_a_nan_are_no_nan() -> None:
    pattern = torch.full((4,), 0x7FC0_0000, dtype=torch.int32)
    assert bundle.first_not_finite(bundle.encode({"a": pattern})) is None


def test_a_truth_value_other_than_0_and_1_is_refused(tmp_path: Path) -> None:
    content = framed({"flags": tensor("BOOL", [3], [0, 3])}, b"\x00\x01\x02")
    (tmp_path / "b").write_bytes(content)
    assert bundle.first_not_finite(content) == "flags"
    for attempt in (lambda: bundle.decode(content), lambda: bundle.decode_file(tmp_path / "b")):
        with pytest.raises(BundleError, match="truth value"):
            attempt()


@pytest.mark.parametrize("code", FLOATS)
def test_the_norm_is_that_of_the_values(tmp_path: Path, code: str) -> None:
    values = torch.randn(150_001, generator=torch.Generator().manual_seed(1)).to(DTYPES[code])
    content = bundle.encode({"a": values})
    header = read(content)
    found = bundle_check.norm(content, header, header.entries[0])
    assert found == pytest.approx(float(values.double().norm()), rel=1e-12)
    (tmp_path / "b").write_bytes(content)
    with (tmp_path / "b").open("rb") as file:
        assert bundle_check.norm(file, header, header.entries[0]) == found


@pytest.mark.parametrize(
    ("values", "norm"),
    [
        (torch.full((4,), 3e38), 6e38),
        (torch.full((4,), 1e200, dtype=torch.float64), 2e200),
        (torch.full((4,), 1.7e308, dtype=torch.float64), math.inf),
        (torch.zeros(4), 0.0),
        (torch.zeros(0), 0.0),
    ],
)
def test_the_norm_of_huge_values_does_not_overflow_before_it_must(values: torch.Tensor, norm: float) -> None:
    content = bundle.encode({"a": values})
    header = read(content)
    assert bundle_check.norm(content, header, header.entries[0]) == pytest.approx(norm)


def test_a_file_that_is_gone_is_a_problem_of_the_machine(tmp_path: Path) -> None:
    for reader in (bundle.decode_file, bundle.first_not_finite):
        with pytest.raises(EnvironmentProblem) as found:
            reader(tmp_path / "none")
        assert found.value.code == "FS-ENV-024"
