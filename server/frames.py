"""Chunks as bytes of the wire, without a message around them: a chunk is large, and every copy costs.

protobuf copies the payload of a message when it is set, when it is read, when it is written and when it is
parsed. A frame of an upload is therefore taken apart where it lies, and a chunk of a download is put together
once. What is not laid out as every writer does it is left to protobuf, so that the wire is as the contract
says, and no other.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import grpc

from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import add_FleetServicer_to_server

_FIRST, _SECOND, _THIRD = 0x08, 0x12, 0x1D  # offset: varint; data, or the chunk: length; crc32: four bytes
_CRC_BYTES = 4
_MOST_VARINT = 10
_LARGEST = 1 << 64


class Piece(NamedTuple):
    """A chunk of an upload.

    Args:
        data: may be a view into the frame that it came in.
    """

    offset: int
    data: memoryview | bytes
    crc32: int


def add_fleet(fleet: Any, server: Any) -> None:
    """Serve `Fleet` with the generated handlers, but `Fetch` and `Upload` with bytes.

    Args:
        fleet: its `Fetch` writes what `chunk_message` makes, its `Upload` reads what `frame_of` returns.
        server: `Services`. One of gRPC's own would ask the generated handlers first. Any, as with `fleet`.
    """
    handlers = {
        "Fetch": grpc.unary_stream_rpc_method_handler(
            fleet.Fetch, request_deserializer=pb.FetchRequest.FromString, response_serializer=None
        ),
        "Upload": grpc.stream_unary_rpc_method_handler(
            fleet.Upload,
            request_deserializer=frame_of,
            response_serializer=pb.UploadStatusReply.SerializeToString,
        ),
    }
    # Whoever is asked first decides.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedsim.v1.Fleet", handlers),))
    add_FleetServicer_to_server(fleet, server)  # type: ignore[no-untyped-call]


def chunk_message(offset: int, data: bytes | bytearray | memoryview) -> bytes:
    """A serialised `Chunk`."""
    head, crc32 = bytearray(), zlib.crc32(data)
    if offset:
        head.append(_FIRST)
        _add_varint(head, offset)
    if data:
        head.append(_SECOND)
        _add_varint(head, len(data))
    tail = bytes([_THIRD]) + crc32.to_bytes(_CRC_BYTES, "little") if crc32 else b""
    return b"".join((head, data, tail))


def frame_of(message: bytes) -> Piece | pb.UploadFrame:
    """A frame of an upload; one that holds a chunk in the usual layout becomes a piece.

    Raises:
        DecodeError: of protobuf; it is no frame.
    """
    try:
        piece = _piece(message)
    except IndexError:
        piece = None
    return pb.UploadFrame.FromString(message) if piece is None else piece


def _piece(message: bytes) -> Piece | None:
    if message[0] != _SECOND:
        return None
    size, at = _varint(message, 1)
    if at + size != len(message):
        return None
    offset = 0
    if message[at] == _FIRST:
        offset, at = _varint(message, at + 1)
    if message[at] != _SECOND or offset >= _LARGEST:
        return None
    size, at = _varint(message, at + 1)
    end, crc32 = at + size, 0
    if end + 1 + _CRC_BYTES == len(message) and message[end] == _THIRD:
        crc32 = int.from_bytes(message[end + 1 :], "little")
    elif end != len(message):
        return None
    return Piece(offset, memoryview(message)[at:end], crc32)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends; one that is too long is none.

    Raises:
        IndexError: as where the message ends in the middle.
    """
    value = 0
    for shift in range(_MOST_VARINT):
        byte = message[at + shift]
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, at + shift + 1
    raise IndexError


def _add_varint(to: bytearray, value: int) -> None:
    while value >= 0x80:
        to.append(value & 0x7F | 0x80)
        value >>= 7
    to.append(value)
