"""A worker without a process: answers what it was told to, when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from fedsim.client.job import Answer, Facts, Job
from fedsim.client.worker import WorkerFailed
from fedsim.pb import federation_pb2 as pb


class FakeWorker:
    """Stands for `fedsim.client.worker.Worker`.

    Args:
        update: bundle of every answer; in a file where `in_file`.
        state: content of the new client state, None for a client that keeps nothing.
        examples: what the client has.
    """

    def __init__(
        self,
        update: bytes = b"update",
        *,
        in_file: bool = False,
        state: bytes | None = None,
        examples: int = 100,
    ) -> None:
        self.update = update
        self.in_file = in_file
        self.state = state
        self.examples = examples
        self.jobs: list[Job] = []
        self.seen: list[tuple[bytes, bytes | None, bytes | None]] = []  # message, lent, state of each job
        self.asked = 0  # calls of facts
        self.failure: WorkerFailed | None = None  # of the next job
        self.go = asyncio.Event()  # a job ends when it is set
        self.go.set()
        self.started = asyncio.Event()
        self._stop: asyncio.Event | None = None

    async def train(self, job: Job, on_progress: Callable[[int, int], None]) -> Answer:
        self.jobs.append(job)
        self.seen.append((_content(job.message) or b"", _content(job.lent), _content(job.state)))
        self.started.set()
        on_progress(1, 4)
        self._stop = asyncio.Event()
        if not self.go.is_set():
            waits = [asyncio.ensure_future(self.go.wait()), asyncio.ensure_future(self._stop.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if self._stop.is_set():
            raise WorkerFailed("cancelled", "stopped")
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        task = pb.Task.FromString(job.task)
        update: bytes | Path = self.update
        if self.in_file:
            update = job.out / "update.safetensors"
            update.write_bytes(self.update)
        state = None
        if self.state is not None:
            state = job.out / "state.safetensors"
            state.write_bytes(self.state + task.task_id)
        return Answer(update, state, self.examples, 4, 4.0, 0.5, {"loss": 1.5, "secret": 2.0})

    async def facts(self, config: bytes, client: int, population: int) -> Facts:
        self.asked += 1
        return Facts(self.examples)

    def cancel(self) -> None:
        if self._stop is not None:
            self._stop.set()


def _content(place: bytes | Path | None) -> bytes | None:
    return place.read_bytes() if isinstance(place, Path) else place
