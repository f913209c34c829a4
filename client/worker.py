"""The parent's side of the worker: orders go in, answers come out, crashes become codes.

One warm child does one order after the other. It is started anew after it crashed, and ended when it
holds a GPU that nobody has used for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.client.frames import Header, Payload
from fedsim.client.job import Answer, DeviceFacts, Facts, Job
from fedsim.client.worker_child import Child, OnProgress

__all__ = ["Answer", "Facts", "Job", "OnProgress", "Worker", "WorkerFailed", "WorkerOptions"]

log = logging.getLogger(__name__)

CODES = ("oom", "cuda_oom", "data", "exception", "cancelled", "timeout")
_GRACE_SECONDS = 5.0  # for a cancelled task to come to the end of its step


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a client trains.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.
        threads: most threads of a tensor operation, 0 for what the run says.
        data: file or folder with this client's examples; None for the run's own.
        data_function: ``package.module:function`` or an entry point that returns them.
        idle_seconds: after which a GPU that nobody uses is given back.
        copy: where this machine keeps the run's own data set.
        log: file for tracebacks, which never leave this machine; None for the parent's log alone.
        grace_seconds: a cancelled task that has not stopped by then is stopped by force.
    """

    device: str = "cpu"
    threads: int = 0
    data: Path | None = None
    data_function: str | None = None
    idle_seconds: float = 300.0
    copy: Path | None = None
    log: Path | None = None
    grace_seconds: float = _GRACE_SECONDS


class WorkerFailed(Exception):
    """An order came to nothing.

    Args:
        code: one of `CODES`, for the coordinator.
        text: what the coordinator may read.
        traceback: for this machine alone.
    """

    def __init__(self, code: str, text: str, traceback: str = "") -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text
        self.traceback = traceback


class Worker:
    """One warm child; every method belongs to one event loop.

    The child dies with the thread that starts it, so the loop must run in a thread that lives as long
    as the client: the main thread.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self._turn = asyncio.Lock()
        self._child: Child | None = None
        self._order = 0
        self._idle: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the child, None while there is none."""
        return None if self._child is None else self._child.process.pid

    async def train(self, job: Job, on_progress: OnProgress, *, timeout: float | None = None) -> Answer:
        """Do one task.

        Args:
            timeout: seconds after which it is given up, None for none.

        Raises:
            WorkerFailed: with a code of `CODES`.
        """
        places = {"message": job.message, "lent": job.lent}
        inside = [content for content in places.values() if isinstance(content, bytes)]
        header: Header = {name: _place(content) for name, content in places.items()}
        header |= {"kind": "train", "state": _place(job.state), "out": str(job.out)}
        reply, payloads = await self._ask(header, [job.task, *inside], on_progress, timeout)
        update = payloads[0] if reply["update"] == "inside" else Path(reply["update"])
        state = None if reply["state"] is None else Path(reply["state"])
        named = {name: reply[name] for name in Answer._fields}
        return Answer(**{**named, "update": update, "state": state})

    async def facts(self, config: bytes, client: int, population: int) -> Facts:
        """What this client has for a run.

        Args:
            config: of a task; client, population: its index and N.

        Raises:
            WorkerFailed: the data cannot be read or do not fit.
        """
        header: Header = {"kind": "facts", "client": client, "population": population}
        reply, _ = await self._ask(header, [config])
        return Facts(reply["examples"])

    async def device(self) -> DeviceFacts:
        """The device and its free memory.

        Raises:
            WorkerFailed: there is no such device.
        """
        reply, _ = await self._ask({"kind": "device"}, [])
        return DeviceFacts(*(reply[name] for name in DeviceFacts._fields))

    def cancel(self) -> None:
        """Stop the order under way, which then fails with the code ``cancelled``; nothing without one."""
        if self._child is not None:
            self._child.cancel("cancelled", self.options.grace_seconds)

    async def close(self) -> None:
        """End the child; an order under way fails with the code ``cancelled``."""
        self._closed = True
        child = self._child
        self._let_go()
        if child is not None:
            await child.gone.wait()

    async def _ask(
        self,
        header: Header,
        payloads: Sequence[Payload],
        on_progress: OnProgress | None = None,
        timeout: float | None = None,
    ) -> tuple[Header, list[bytes]]:
        async with self._turn:
            if self._closed:
                raise WorkerFailed("cancelled", "the worker is closed")
            if self._idle is not None:
                self._idle.cancel()
            if self._child is None or not self._child.alive:
                self._child = Child(_plain(self.options))
            child = self._child
            self._order += 1
            timer = None
            if timeout is not None:
                grace = self.options.grace_seconds
                timer = asyncio.get_running_loop().call_later(timeout, child.cancel, "timeout", grace)
            try:
                reply, content = await child.ask(self._order, header, payloads, on_progress)
            except asyncio.CancelledError:
                # Whoever waited is gone; what the child would say now is nobody's.
                self._let_go()
                raise
            finally:
                if timer is not None:
                    timer.cancel()
                if not child.alive and self._child is child:
                    self._child = None
            self._rest(str(reply.get("device", "cpu")))
        if reply["reply"] == "failed":
            if reply["traceback"]:
                log.error("order=%d code=%s\n%s", self._order, reply["code"], reply["traceback"])
            raise WorkerFailed(reply["code"], reply["text"], reply["traceback"])
        return reply, content

    def _rest(self, device: str) -> None:
        """After an order: a GPU is given back if nobody asks for a while."""
        if device.startswith("cuda"):
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(self.options.idle_seconds, self._give_back)

    def _give_back(self) -> None:
        if not self._turn.locked():
            # Only the end of the process frees the whole context on the GPU.
            log.info("idle_seconds=%g action=free-gpu", self.options.idle_seconds)
            self._let_go()

    def _let_go(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._child is not None:
            self._child.end("cancelled")
            self._child = None


def _place(content: bytes | Path | None) -> str | None:
    """How an order says where a bundle is."""
    if content is None:
        return None
    return str(content) if isinstance(content, Path) else "inside"


def _plain(options: WorkerOptions) -> Header:
    return {
        "device": options.device,
        "threads": options.threads,
        "data": options.data and str(options.data),
        "data_function": options.data_function,
        "copy": options.copy and str(options.copy),
        "log": options.log and str(options.log),
    }
