"""Chunks as bytes: what is read and written by hand is what protobuf reads and writes."""

from __future__ import annotations

import zlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedsim.pb import federation_pb2 as pb
from fedsim.server.frames import Piece, chunk_message, frame_of

OFFSETS = st.integers(0, (1 << 64) - 1)
CRCS = st.integers(0, (1 << 32) - 1)


@given(offset=OFFSETS, data=st.binary(max_size=400))
def test_a_chunk_is_written_as_protobuf_writes_it(offset: int, data: bytes) -> None:
    chunk = pb.Chunk(offset=offset, data=data, crc32=zlib.crc32(data))
    assert chunk_message(offset, data) == chunk.SerializeToString()
    assert chunk_message(offset, memoryview(bytearray(data))) == chunk.SerializeToString()


@given(offset=OFFSETS, data=st.binary(min_size=1, max_size=400), crc32=CRCS)
def test_a_chunk_in_the_usual_layout_is_read_without_protobuf(offset: int, data: bytes, crc32: int) -> None:
    frame = pb.UploadFrame(chunk=pb.Chunk(offset=offset, data=data, crc32=crc32))
    found = frame_of(frame.SerializeToString())
    assert isinstance(found, Piece)
    assert (found.offset, bytes(found.data), found.crc32) == (offset, data, crc32)


_VALID = pb.UploadFrame(chunk=pb.Chunk(offset=7, data=b"abc", crc32=9)).SerializeToString()


@given(
    st.one_of(
        st.binary(max_size=40),
        st.tuples(st.integers(0, len(_VALID) - 1), st.integers(0, 255)).map(
            lambda change: _VALID[: change[0]] + bytes([change[1]]) + _VALID[change[0] + 1 :]
        ),
    )
)
def test_whatever_comes_is_understood_as_protobuf_does_or_refused_by_it(message: bytes) -> None:
    try:
        wanted = pb.UploadFrame.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            frame_of(message)
        return
    found = frame_of(message)
    if isinstance(found, Piece):
        assert wanted.WhichOneof("frame") == "chunk"
        assert found == (wanted.chunk.offset, wanted.chunk.data, wanted.chunk.crc32)
    else:
        assert found == wanted


def test_a_first_frame_and_an_empty_chunk_are_left_to_protobuf() -> None:
    for frame in (
        pb.UploadFrame(start=pb.UploadStart(generation=1)),
        pb.UploadFrame(chunk=pb.Chunk(offset=3)),
    ):
        assert frame_of(frame.SerializeToString()) == frame
