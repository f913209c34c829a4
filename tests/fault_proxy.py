"""A TCP proxy that does to connections what networks do: cut, hold, delay, throttle, repeat.

It knows nothing of what it carries. Its own event loop runs in a thread, so that tests steer it with plain
calls while coordinator and clients are processes of their own.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

_BLOCK = 64 * 1024


class Direction:
    """One way through the proxy, over all connections; set its fields from any thread.

    Args:
        rate: bytes per second, None for as fast as it goes.
        longest_delay: seconds; every block waits a random part of it.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.rate: float | None = None
        self.longest_delay = 0.0
        self.carried = 0
        """Bytes that went through."""
        self.held = False
        """Nothing goes through; what arrives waits."""
        self.waiting = 0
        """Blocks that arrived and wait because the direction is held."""
        self.hold_at: int | None = None
        """`held` becomes true when so many bytes went through."""

    async def let_through(self, size: int) -> None:
        """Wait as long as a block of `size` bytes has to."""
        if self.longest_delay:
            await asyncio.sleep(self._rng.uniform(0.0, self.longest_delay))
        if self.rate is not None:
            await asyncio.sleep(size / self.rate)
        if self.hold_at is not None and self.carried >= self.hold_at:
            self.held, self.hold_at = True, None
        self.waiting += 1
        try:
            while self.held:
                await asyncio.sleep(0.01)
        finally:
            self.waiting -= 1
        self.carried += size

    @property
    def block(self) -> int:
        """Bytes to read at a time: small ones on a slow link."""
        return _BLOCK if self.rate is None else max(512, min(_BLOCK, int(self.rate / 10)))


class FaultProxy:
    """Stands between clients and ``127.0.0.1:PORT``; use it in a ``with`` block.

    Args:
        target: port of the coordinator.
        seed: of delays.
    """

    def __init__(self, target: int, *, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.up, self.down = Direction(rng), Direction(rng)
        self.repeats = False
        """Whatever clients send is sent a second time over a connection of its own (new connections only)."""
        self.repeated = 0
        """Bytes that were sent so."""
        self.connections = 0
        """That were opened so far."""
        self.port = 0
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="fault-proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30), "the proxy does not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._closing.set)
        self._thread.join(30)

    @property
    def address(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection; what was held is lost."""
        done = threading.Event()

        def cutting() -> None:
            for writer in list(self._open):
                writer.transport.abort()
            done.set()

        self._call(cutting)
        assert done.wait(30), "the proxy hangs"

    def heal(self) -> None:
        """Carry everything again, as fast as it goes."""
        self.repeats = False
        for way in (self.up, self.down):
            way.rate, way.longest_delay, way.hold_at, way.held = None, 0.0, None, False

    def _call(self, what: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(what)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._closing.wait()
        server.close()
        for writer in list(self._open):
            writer.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        second: asyncio.StreamWriter | None = None
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()  # as a port that nobody listens on
            return
        ends = {writer, back}
        if self.repeats:
            echo, second = await asyncio.open_connection("127.0.0.1", self._target)
            ends.add(second)
        self._open |= ends
        pumps: list[Any] = [
            asyncio.create_task(self._pump(reader, back, self.up, second)),
            asyncio.create_task(self._pump(there, writer, self.down, None)),
        ]
        if second is not None:
            pumps.append(asyncio.create_task(_drain(echo)))
        try:
            # The first end that closes takes the other one with it.
            await asyncio.wait(pumps[:2], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: Direction,
        second: asyncio.StreamWriter | None,
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(way.block):
                await way.let_through(len(data))
                writer.write(data)
                if second is not None and not second.is_closing():
                    second.write(data)
                    self.repeated += len(data)
                await writer.drain()


async def _drain(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        while await reader.read(_BLOCK):
            pass
