"""One worker process as its parent sees it: the order under way, progress, cancelling, its end."""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import SpawnProcess

from fedsim.client import frames
from fedsim.client.frames import Header, Payload
from fedsim.client.worker_process import main

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]  # (steps done, steps of the task)


class Child:
    """One process, its two pipes, and the order that it is at.

    Args:
        options: for `fedsim.client.worker_process.main`.
    """

    def __init__(self, options: Header) -> None:
        self.loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        self.orders, theirs = context.Pipe()
        listening, self.control = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(
            target=main, args=(theirs, listening, options, os.getpid()), name="fedsim-worker"
        )
        self.process.start()
        theirs.close()
        listening.close()
        atexit.register(self._kill)
        self.alive = True
        self.gone = asyncio.Event()
        self.stopping: str | None = None  # the code with which the order under way shall end
        self._order = 0
        self._waiting: asyncio.Future[tuple[Header, list[bytes]]] | None = None
        self._on_progress: OnProgress | None = None
        self._force: asyncio.TimerHandle | None = None
        threading.Thread(target=self._read, name="fedsim-worker-reader", daemon=True).start()

    async def ask(
        self, order: int, header: Header, payloads: Sequence[Payload], on_progress: OnProgress | None
    ) -> tuple[Header, list[bytes]]:
        """The reply to one order; the end of the process is a reply too."""
        self._order, self._on_progress, self.stopping = order, on_progress, None
        self._waiting = self.loop.create_future()
        try:
            # A child that is still starting takes nothing yet, and a pipe holds little.
            await asyncio.to_thread(self._send, {**header, "order": order}, payloads)
            return await self._waiting
        finally:
            self._waiting = None
            if self._force is not None:
                self._force.cancel()
                self._force = None

    def cancel(self, code: str, grace: float) -> None:
        """Ask the order under way to stop, and force it after `grace` seconds."""
        if self._waiting is None or self.stopping is not None:
            return
        self.stopping = code
        with suppress(OSError):
            frames.send(self.control, {"cancel": self._order})
        self._force = self.loop.call_later(grace, self.end, code)

    def end(self, code: str) -> None:
        """Kill the process; an order under way ends with `code`."""
        self.stopping = self.stopping or code
        self._kill()

    def _kill(self) -> None:
        with suppress(ValueError):  # it is closed
            self.process.kill()

    def _send(self, header: Header, payloads: Sequence[Payload]) -> None:
        # Its end is noticed by whoever reads, and that thread may close the pipe under a write.
        with suppress(OSError, TypeError):
            frames.send(self.orders, header, payloads)

    def _read(self) -> None:
        """In a thread: whatever the child says, until it ends."""
        try:
            while True:
                header, payloads = frames.receive(self.orders)
                self._tell(self._heard, header, payloads)
        except (EOFError, OSError, ValueError):
            self.process.join()
            self._tell(self._ended)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(function, *arguments)

    def _heard(self, header: Header, payloads: list[bytes]) -> None:
        if self._waiting is None or self._waiting.done() or header["order"] != self._order:
            return
        if header["reply"] == "progress":
            if self._on_progress is not None:
                self._on_progress(*header["at"])
            return
        if header.get("broken"):
            self.alive = False
        if header["reply"] == "failed" and header["code"] == "cancelled" and self.stopping is not None:
            header = _failed(self.stopping, "stopped")
        self._waiting.set_result((header, payloads))

    def _ended(self) -> None:
        self.alive = False
        self.gone.set()
        atexit.unregister(self._kill)
        self.orders.close()
        self.control.close()
        if self._waiting is not None and not self._waiting.done():
            how = _how(self.process.exitcode)
            log.warning("pid=%s ended=%s order=%d", self.process.pid, how, self._order)
            text = "stopped" if self.stopping else f"the training process ended: {how}"
            self._waiting.set_result((_failed(self.stopping or "exception", text), []))


def _failed(code: str, text: str) -> Header:
    return {"reply": "failed", "code": code, "text": text, "traceback": ""}


def _how(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name} (perhaps the system ran out of memory)" if name == "SIGKILL" else name
    return f"exit code {exit_code}"
