"""The worker: a process of its own that trains, so that a crash or a CUDA error takes nothing else down.

It is started by `fedsim.client.worker` with the spawn method, does one order after the other and stays
warm between them. It ends when its parent does: at once where the system can tell it (Linux), and in
any case when the pipe for control closes.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.client import frames
from fedsim.client.frames import Header, Payload

if TYPE_CHECKING:
    from fedsim.client.train import Trainee

log = logging.getLogger(__name__)

_PDEATHSIG = 1  # PR_SET_PDEATHSIG of prctl(2)
_PROGRESS_SECONDS = 0.2
_LONGEST_TEXT = 300
_LARGEST_LOG = 4 << 20

Reply = tuple[Header, list[Payload]]


class Cancelled(Exception):
    """The order under way is not wanted any more."""


class Orders:
    """The number of the order that must stop; written by the thread that listens to the parent."""

    def __init__(self) -> None:
        self.cancelled = -1

    def listen(self, control: Connection) -> None:
        """Until the parent is gone; then this process is gone too."""
        try:
            while True:
                header, _ = frames.receive(control)
                self.cancelled = max(self.cancelled, int(header["cancel"]))
        except (EOFError, OSError):
            os._exit(0)  # nobody is left to answer to, and training may go on for hours


def main(orders: Connection, control: Connection, options: Header, parent: int) -> None:
    """Serve the parent until it closes the pipe.

    Args:
        orders: both ways; control: from the parent, for what must be heard while training.
        options: of `fedsim.client.worker.WorkerOptions`, as JSON would hold them.
        parent: its process id.
    """
    _die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group: the parent decides
        signal.signal(number, signal.SIG_IGN)
    stops = Orders()
    threading.Thread(target=stops.listen, args=(control,), daemon=True).start()
    desk: Desk | None = None
    while True:
        try:
            header, payloads = frames.receive(orders)
        except (EOFError, OSError):
            return
        try:
            # Made at the first order: what is wrong with the options is an answer to it.
            desk = desk or Desk(options)
            reply, content = desk.serve(header, payloads, orders, stops)
        except Exception as error:
            reply, content = _failure(error, header), []
        if reply["reply"] == "failed":  # the frames of the error, and their tensors, are gone by now
            _keep(reply["traceback"], header, options)
            _recover(desk, reply["code"])
        try:
            frames.send(orders, {**reply, "order": header["order"]}, content)
        except OSError:
            return
        if reply.get("broken"):
            return  # the context of this process on the GPU is lost: a fresh one must take over


class Desk:
    """Serves orders with one `Trainee`; torch is loaded with it, not with this module."""

    def __init__(self, options: Header) -> None:
        from fedsim.client.data import Source
        from fedsim.client.device import resolve
        from fedsim.client.train import Trainee

        path, copy = options["data"], options["copy"]
        source = Source(path and Path(path), options["data_function"], copy and Path(copy))
        self.device = resolve(options["device"])
        self.trainee: Trainee = Trainee(source, device=self.device, threads=options["threads"])

    def serve(self, header: Header, payloads: list[bytes], orders: Connection, stops: Orders) -> Reply:
        """The reply to one order, with its payloads.

        Raises:
            Exception: whatever the order led to.
        """
        kinds: dict[str, Callable[..., Reply]] = {
            "train": self._train,
            "facts": self._facts,
            "device": self._device,
        }
        reply, content = kinds[header["kind"]](header, payloads, orders, stops)
        return {"reply": "done", "device": self.device, **reply}, content

    def _device(self, header: Header, payloads: list[bytes], *_: Any) -> Reply:
        from fedsim.client.device import facts

        return facts(self.device)._asdict(), []

    def _facts(self, header: Header, payloads: list[bytes], *_: Any) -> Reply:
        count = self.trainee.examples(payloads[0], header["client"], header["population"])
        return {"examples": count}, []

    def _train(self, header: Header, payloads: list[bytes], orders: Connection, stops: Orders) -> Reply:
        from fedsim.client.job import Job

        rest = iter(payloads[1:])

        def given(name: str) -> bytes | Path | None:
            if header[name] == "inside":
                return next(rest)
            return header[name] and Path(header[name])

        message, lent = given("message"), given("lent")
        assert message is not None
        job = Job(payloads[0], message, lent, header["state"] and Path(header["state"]), Path(header["out"]))
        told = 0.0

        def on_step(done: int, total: int) -> None:
            nonlocal told
            if stops.cancelled >= header["order"]:
                raise Cancelled
            now = time.monotonic()
            if now - told >= _PROGRESS_SECONDS:
                told = now
                frames.send(orders, {"reply": "progress", "order": header["order"], "at": [done, total]})

        answer = self.trainee.train(job, on_step)
        reply = {**answer._asdict(), "state": answer.state and str(answer.state)}
        if isinstance(answer.update, Path):
            return {**reply, "update": str(answer.update)}, []
        return {**reply, "update": "inside"}, [answer.update]


def _failure(error: Exception, header: Header) -> Header:
    """What went wrong: a code for the coordinator, a text that may leave, a traceback that stays."""
    code, broken = _code(error)
    return {
        "reply": "failed",
        "code": code,
        "text": _text(error, code),
        "traceback": "" if code == "cancelled" else "".join(traceback.format_exception(error)),
        "broken": broken,
        "kind": header.get("kind"),
    }


def _code(error: Exception) -> tuple[str, bool]:
    """The code of a failure, and whether this process can go on."""
    from fedsim.errors import DataError

    if isinstance(error, Cancelled):
        return "cancelled", False
    if isinstance(error, DataError):
        return "data", False
    said = str(error)
    # torch may not even have been loaded: then the error is none of its own.
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and isinstance(error, cuda.OutOfMemoryError):
        return "cuda_oom", False
    if "CUDA out of memory" in said or "CUBLAS_STATUS_ALLOC_FAILED" in said:
        return "cuda_oom", False
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in said:
        return "oom", False
    if isinstance(error, RuntimeError) and "not enough memory" in said:
        return "oom", False
    # After any other CUDA error, such as a failed assertion, every further call fails too.
    return "exception", "CUDA error" in said or "cudnn" in said.lower()


def _text(error: Exception, code: str) -> str:
    """What the coordinator may read: fedsim's own words; of others' data functions the kind alone."""
    from fedsim.errors import FedsimError

    if isinstance(error, Cancelled):
        return "cancelled"
    if isinstance(error, FedsimError):
        # Where and why may quote paths and values of this machine.
        return f"{error.code}: {error.what}"[:_LONGEST_TEXT]
    said = str(error).splitlines()
    if code in ("oom", "cuda_oom") or not said:
        return type(error).__name__
    return f"{type(error).__name__}: {said[0]}"[:_LONGEST_TEXT]


def _keep(text: str, header: Header, options: Header) -> None:
    """Write the traceback into the client's own log file, which is bounded; never fails."""
    path = options.get("log")
    if path is None or not text:
        return
    try:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.stat().st_size > _LARGEST_LOG:
            file.replace(file.with_name(file.name + ".1"))
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with file.open("a", encoding="utf-8") as opened:
            opened.write(f"{stamp} order={header.get('order')} kind={header.get('kind')}\n{text}\n")
    except OSError as error:
        log.warning("log=%s not written: %s", path, error)


def _recover(desk: Desk | None, code: str) -> None:
    """Give back what a task that ran out of memory held."""
    if code not in ("oom", "cuda_oom") or desk is None:
        return
    desk.trainee.forget()
    gc.collect()
    if desk.device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _die_with(parent: int) -> None:
    """Ask the system to end this process with its parent, where it can do that."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the wish was heard
        os._exit(0)
