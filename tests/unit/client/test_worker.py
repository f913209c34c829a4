"""The worker: warm between orders, its failures as codes, its end with its parent."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import bundle
from fedsim.client import frames, worker_process
from fedsim.client.job import Job
from fedsim.client.worker import Worker, WorkerFailed, WorkerOptions
from fedsim.errors import ConfigError, DataError
from fedsim.pb import federation_pb2 as pb
from tests.wired import Exchange, config, exchanges, same

ENDLESS = 30_000  # steps: many seconds of training


@pytest.fixture(scope="module")
def found() -> list[Exchange]:
    """Three rounds of scaffold, which keeps a state."""
    return list(exchanges(config("scaffold", engine={"name": "loop", "dtype": "float32"})))


def job(exchange: Exchange, out: Path, *, steps: int | None = None, state: Path | None = None) -> Job:
    task = pb.Task.FromString(exchange.task)
    if steps is not None:
        task.steps = steps
    return Job(task.SerializeToString(), exchange.message, exchange.lent, state, out)


def quiet(done: int, total: int) -> None:
    """Progress that nobody wants."""


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to that")


def with_worker(use: Callable[[Worker], Awaitable[None]], **options: Any) -> None:
    async def whole() -> None:
        worker = Worker(WorkerOptions(**options))
        try:
            await use(worker)
        finally:
            await worker.close()
        assert worker.pid is None

    asyncio.run(whole())


def alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if not Path("/proc").is_dir():
        return True
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended since
        return False


@pytest.mark.slow
def test_a_warm_worker_does_one_order_after_the_other(found: list[Exchange], tmp_path: Path) -> None:
    """States carried in files, failures in between, and a GPU given back at the end; one process."""
    mine = [exchange for exchange in found if exchange.client == 1]
    log = tmp_path / "log" / "worker.log"

    async def use(worker: Worker) -> None:
        facts = await worker.facts(pb.Task.FromString(mine[0].task).config, 1, 4)
        assert facts.examples == mine[0].block.examples[0]
        pid, state = worker.pid, None
        for number, exchange in enumerate(mine):
            answer = await worker.train(job(exchange, tmp_path / str(number), state=state), quiet)
            assert isinstance(answer.update, bytes)
            sent = bundle.decode(answer.update)
            assert all(same(sent[f"vectors/{n}"], v[0]) for n, v in exchange.block.vectors.items())
            assert answer.metrics["loss"] == exchange.block.metrics["loss"][0]
            assert answer.train_seconds > 0
            state = answer.state
            assert state == tmp_path / str(number) / "state.safetensors"
        message = tmp_path / "message.safetensors"
        message.write_bytes(mine[0].message)
        again = await worker.train(job(mine[0], tmp_path / "file")._replace(message=message), quiet)
        assert isinstance(again.update, bytes)
        assert same(bundle.decode(again.update)["vectors/delta"], mine[0].block.vectors["delta"][0])

        with pytest.raises(WorkerFailed) as failed:
            await worker.train(job(mine[0], tmp_path / "out", state=tmp_path / "gone"), quiet)
        assert failed.value.code == "exception"
        assert failed.value.text.startswith("FS-ENV-024")
        assert str(tmp_path) not in failed.value.text
        assert "Traceback" in failed.value.traceback
        assert failed.value.traceback in log.read_text()
        with pytest.raises(WorkerFailed) as failed:
            await worker.facts(pb.Task.FromString(mine[0].task).config, 1, 7)
        assert failed.value.code == "data"
        with pytest.raises(WorkerFailed) as failed:
            await worker.train(job(mine[0], tmp_path)._replace(task=b"\xff no task"), quiet)
        assert failed.value.code == "exception"

        heard: list[tuple[int, int]] = []

        def stop(done: int, total: int) -> None:
            heard.append((done, total))
            worker.cancel()

        with pytest.raises(WorkerFailed) as failed:
            await worker.train(job(mine[0], tmp_path, steps=ENDLESS), stop)
        assert failed.value.code == "cancelled"
        assert heard[0] == (0, ENDLESS)
        with pytest.raises(WorkerFailed) as failed:
            await worker.train(job(mine[0], tmp_path, steps=ENDLESS), quiet, timeout=0.1)
        assert failed.value.code == "timeout"
        worker.cancel()  # nothing is under way: the next order is not touched
        await worker.train(job(mine[0], tmp_path), quiet)
        assert worker.pid == pid  # all of it in one process

        assert (await worker.device()).memory_bytes > 0
        worker._rest("cuda")  # what follows an order on a GPU
        await until(lambda: worker.pid is None)
        await until(lambda: not alive(pid))

    with_worker(use, log=log, idle_seconds=0.05, grace_seconds=60.0)


@pytest.mark.slow
def test_a_killed_worker_is_a_failure_and_the_next_order_gets_a_fresh_one(
    found: list[Exchange], tmp_path: Path
) -> None:
    async def use(worker: Worker) -> None:
        def kill(done: int, total: int) -> None:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)

        with pytest.raises(WorkerFailed) as failed:
            await worker.train(job(found[0], tmp_path, steps=ENDLESS), kill)
        assert failed.value.code == "exception"
        assert "SIGKILL" in failed.value.text
        assert worker.pid is None
        answer = await worker.train(job(found[0], tmp_path), quiet)
        assert isinstance(answer.update, bytes)
        pid = worker.pid
        assert pid is not None
        # Nobody waits any more: the process goes too, whatever it is at.
        task = asyncio.create_task(worker.train(job(found[0], tmp_path, steps=ENDLESS), quiet))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not alive(pid))

    with_worker(use)


@pytest.mark.slow
def test_what_does_not_stop_in_time_is_stopped_by_force(found: list[Exchange], tmp_path: Path) -> None:
    async def use(worker: Worker) -> None:
        await worker.train(job(found[0], tmp_path), quiet)
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        task = asyncio.create_task(worker.train(job(found[0], tmp_path), quiet))
        await asyncio.sleep(0.1)
        worker.cancel()
        with pytest.raises(WorkerFailed) as failed:
            await task
        assert failed.value.code == "cancelled"
        assert not alive(pid)
        await worker.train(job(found[0], tmp_path), quiet)

    with_worker(use, grace_seconds=0.2)


@pytest.mark.slow
def test_options_that_cannot_be_met_are_the_answer_to_an_order(found: list[Exchange], tmp_path: Path) -> None:
    async def use(worker: Worker) -> None:
        for _ in range(2):
            with pytest.raises(WorkerFailed) as failed:
                await worker.train(job(found[0], tmp_path), quiet)
            assert "FS-CLI-051" in failed.value.text

    with_worker(use, device="cuda:99")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_dies_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    """Also in the middle of an order, when it does not look at the pipe for orders."""
    (exchange, *_) = exchanges(config("fedavg"))
    (tmp_path / "task").write_bytes(job(exchange, tmp_path, steps=ENDLESS).task)
    (tmp_path / "message").write_bytes(exchange.message)
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import asyncio, pathlib, sys
            from fedsim.client.worker import Job, Worker, WorkerOptions

            async def main():
                here = pathlib.Path(sys.argv[1])
                worker = Worker(WorkerOptions())
                job = Job((here / "task").read_bytes(), here / "message", None, None, here)
                await worker.train(job, lambda done, total: print(worker.pid, flush=True))

            if __name__ == "__main__":
                asyncio.run(main())
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(number)
        parent.wait(60)
        for _ in range(3000):
            if not alive(pid):
                break
            time.sleep(0.02)
        assert not alive(pid)
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()


def test_only_bytes_cross_the_pipe() -> None:
    here, there = multiprocessing.Pipe()
    payloads = [b"", b"\x80\x04pickle?", memoryview(b"view")]
    frames.send(here, {"kind": "train", "n": float("inf")}, payloads)
    header, content = frames.receive(there)
    assert header == {"kind": "train", "n": float("inf")}
    assert content == [b"", b"\x80\x04pickle?", b"view"]
    here.send_bytes(b"\x80\x04\x95")  # a pickle is no header
    with pytest.raises(ValueError, match="utf-8|Expecting"):
        frames.receive(there)
    here.close()
    with pytest.raises(EOFError):
        frames.receive(there)
    there.close()


@pytest.mark.parametrize(
    ("error", "code", "broken", "text"),
    [
        (MemoryError(), "oom", False, "MemoryError"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "oom", False, "RuntimeError",
        ),
        (torch.cuda.OutOfMemoryError("out of memory"), "cuda_oom", False, "OutOfMemoryError"),
        (
            RuntimeError("CUDA error: device-side assert triggered"),
            "exception", True, "RuntimeError: CUDA error: device-side assert triggered",
        ),
        (ValueError("first\nsecond"), "exception", False, "ValueError: first"),
        (
            DataError("the data have no column 'a'", code="FS-CLI-042", where="/home/x.csv", why="names"),
            "data", False, "FS-CLI-042: the data have no column 'a'",
        ),
        (ConfigError("no", code="FS-CFG-001", hint="h"), "exception", False, "FS-CFG-001: no"),
        (worker_process.Cancelled(), "cancelled", False, "cancelled"),
    ],
)  # fmt: skip
def test_each_failure_has_its_code_and_what_is_private_stays(
    error: Exception, code: str, broken: bool, text: str
) -> None:
    reply = worker_process._failure(error, {"order": 1, "kind": "train"})
    assert (reply["code"], reply["broken"], reply["text"]) == (code, broken, text)


def test_the_log_of_tracebacks_is_bounded_and_never_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_LARGEST_LOG", 100)
    path = tmp_path / "deep" / "log"
    for number in range(5):
        worker_process._keep("x" * 80, {"order": number, "kind": "train"}, {"log": str(path)})
    assert "order=4" in path.read_text()
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 600
    (tmp_path / "file").write_text("")
    worker_process._keep("x", {}, {"log": str(tmp_path / "file" / "log")})
    worker_process._keep("x", {}, {"log": None})
