"""What gRPC can do at best here: chunks over TLS and loopback in both directions, and nothing else.

No checksum, no digest, no disk, no ledger: the same library, credentials, options and chunk size as the
coordinator. `BareStream.kept` adds what no coordinator can leave out, in the plainest way: every chunk is
hashed and written to a file in a thread while the next one arrives, and the file is synced at the end.
``python -m benchmarks.deployment.bare_stream`` serves; `BareStream` starts it and calls it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from fedsim.pb import federation_pb2 as pb
from fedsim.transport import Tls, open_channel, server_credentials, server_options

_SERVICE = "bare.Stream"


class BareStream:
    """The bare server as a process, and streams to and from it.

    Args:
        tls: folder with ca.pem, server.pem and server.key.
        size: bytes of one transfer; chunk_bytes: of one message.
    """

    def __init__(self, tls: Path, *, size: int, chunk_bytes: int) -> None:
        self.tls, self.size, self.chunk_bytes = tls, size, chunk_bytes
        words = ["--tls", str(tls), "--size", str(size), "--chunk-bytes", str(chunk_bytes)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.deployment.bare_stream", *words],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._child.stdout is not None
        self._address = f"127.0.0.1:{int(self._child.stdout.readline())}"
        self._channels: list[Any] = []

    @property
    def pid(self) -> int:
        return self._child.pid

    async def down(self, streams: int) -> None:
        """So many transfers at a time from the server."""
        await asyncio.gather(*(self._down(channel) for channel in self._opened(streams)))

    async def up(self, streams: int) -> None:
        """So many transfers at a time to the server."""
        await asyncio.gather(*(self._up(channel) for channel in self._opened(streams)))

    async def kept(self, streams: int) -> None:
        """So many transfers at a time to the server, each hashed, written and synced there."""
        await asyncio.gather(*(self._up(channel, "Kept") for channel in self._opened(streams)))

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._child.terminate()
        self._child.wait()

    def _opened(self, count: int) -> list[Any]:
        while len(self._channels) < count:
            self._channels.append(open_channel(self._address, Tls(self.tls / "ca.pem")))
        return self._channels[:count]

    async def _down(self, channel: Any) -> None:
        call = channel.unary_stream(
            f"/{_SERVICE}/Down",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=pb.Chunk.FromString,
        )(pb.FetchRequest())
        got = 0
        async for chunk in call:
            got += len(chunk.data)
        if got != self.size:
            raise RuntimeError(f"{got} bytes came, {self.size} were expected")

    async def _up(self, channel: Any, method: str = "Up") -> None:
        call = channel.stream_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=pb.Chunk.SerializeToString,
            response_deserializer=pb.UploadStatusReply.FromString,
        )
        reply = await call(_chunks(self.size, self.chunk_bytes))
        if reply.offset != self.size:
            raise RuntimeError(f"{reply.offset} bytes arrived, {self.size} were sent")


async def _chunks(size: int, chunk_bytes: int) -> AsyncIterator[pb.Chunk]:
    data = os.urandom(min(size, chunk_bytes))
    for at in range(0, size, chunk_bytes):
        yield pb.Chunk(offset=at, data=data[: size - at])


async def _serve(tls: Path, size: int, chunk_bytes: int) -> None:
    async def down(_: pb.FetchRequest, context: Any) -> None:
        async for chunk in _chunks(size, chunk_bytes):
            await context.write(chunk)

    async def up(_: Any, context: Any) -> pb.UploadStatusReply:
        got = 0
        while (chunk := await context.read()) is not grpc.aio.EOF:
            got += len(chunk.data)
        return pb.UploadStatusReply(offset=got)

    async def kept(_: Any, context: Any) -> pb.UploadStatusReply:
        got, hashed, writing = 0, hashlib.sha256(), None
        # Beside the certificates: on the disk that the coordinator writes to.
        with tempfile.TemporaryFile(dir=tls, buffering=0) as file:

            def keep(data: bytes) -> None:
                hashed.update(data)
                file.write(data)

            while (chunk := await context.read()) is not grpc.aio.EOF:
                data = chunk.data
                got += len(data)
                if writing is not None:
                    await writing
                writing = asyncio.ensure_future(asyncio.to_thread(keep, data))
            if writing is not None:
                await writing
            await asyncio.to_thread(os.fsync, file.fileno())
        return pb.UploadStatusReply(offset=got)

    handlers = {
        "Kept": grpc.stream_unary_rpc_method_handler(
            kept, pb.Chunk.FromString, pb.UploadStatusReply.SerializeToString
        ),
        "Down": grpc.unary_stream_rpc_method_handler(
            down, pb.FetchRequest.FromString, pb.Chunk.SerializeToString
        ),
        "Up": grpc.stream_unary_rpc_method_handler(
            up, pb.Chunk.FromString, pb.UploadStatusReply.SerializeToString
        ),
    }
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    credentials = server_credentials(tls / "server.pem", tls / "server.key")
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tls", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--chunk-bytes", type=int, required=True)
    options = parser.parse_args()
    asyncio.run(_serve(options.tls, options.size, options.chunk_bytes))


if __name__ == "__main__":
    main()
