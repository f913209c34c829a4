"""Workers that die, stop, or are left behind: the numbers stay, and nothing hangs or goes on by itself."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.errors import RunFailed
from fedsim.local import LocalSpec
from fedsim.runs.lock import is_locked, locked
from fedsim.simulation.pool import Pool
from fedsim.strategies.scaffold import scaffold
from tests.federations import Small, build
from tests.processes import SMALL, config, start, wait_for_lines

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

PARENT = os.getpid()


@pytest.fixture
def hire() -> Iterator[Callable[..., Pool]]:
    """Pools that end with the test."""
    pools: list[Pool] = []

    def hired(workers: int, **parameters: Any) -> Pool:
        pools.append(Pool(workers, **parameters))
        return pools[-1]

    yield hired
    for pool in pools:
        pool.close()


def dying(folder: Path, *, at: int, times: int, how: Callable[[], None] | None = None) -> Any:
    """A gradient in which the process ends, `times` times, over the client with `at` examples."""

    def wrap(inner: Any) -> Any:
        def grad_fn(x: Any, batch: Any) -> Any:
            done = len(list(folder.iterdir()))
            if os.getpid() != PARENT and len(batch.inputs) == at and done < times:
                (folder / str(done)).touch()
                (how or (lambda: os.kill(os.getpid(), signal.SIGKILL)))()
            return inner(x, batch)

        return grad_fn

    return wrap


@contextmanager
def heard(words: str, then: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Do `then` with every line of the pool's log that has these words, as soon as it is written."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if words in record.getMessage():
                then(record)

    logger, ear = logging.getLogger("fedsim.simulation.pool"), Ear()
    logger.addHandler(ear)
    try:
        yield
    finally:
        logger.removeHandler(ear)


def model(small: Small, windows: int = 3) -> torch.Tensor:
    for _ in range(windows):
        assert small.federation.run_window().error is None
    return small.federation.model


# With full batches, a client's batch has all its examples: 13, 1, 8, 3, 7.
SPEC = LocalSpec(steps=2, batch_size=0, lr=0.1)


@pytest.mark.parametrize("filed", [False, True], ids=["states in memory", "states in files"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_is_killed_is_replaced_and_the_numbers_stay(
    tmp_path: Path, hire: Any, caplog: pytest.LogCaptureFixture, workers: int, times: int, filed: bool
) -> None:
    states = tmp_path.with_name(f"{tmp_path.name}-states") if filed else None
    small = build(scaffold(), spec=SPEC, grad=dying(tmp_path, at=8, times=times), folder=states)
    pool = small.engine.crew = hire(workers)
    assert torch.equal(model(small), model(build(scaffold(), spec=SPEC)))
    assert len(list(tmp_path.iterdir())) == times
    assert sum("ended by SIGKILL" in r.message for r in caplog.records) == times
    assert len(pool.pids) == workers


def test_a_worker_killed_between_two_rounds_is_replaced(hire: Any) -> None:
    small = build(scaffold(), spec=SPEC)
    pool = small.engine.crew = hire(2)
    model(small, 1)
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    assert torch.equal(model(small, 2), model(build(scaffold(), spec=SPEC)))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (None, "SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGALRM), "SIGALRM"),
        (lambda: os._exit(7), "code 7"),
    ],
)
def test_clients_that_end_every_worker_end_the_run(tmp_path: Path, hire: Any, how: Any, named: str) -> None:
    small = build(scaffold(), spec=SPEC, grad=dying(tmp_path, at=3, times=99, how=how))
    pool = small.engine.crew = hire(2)
    with pytest.raises(RunFailed) as caught:
        small.federation.run_window()
    assert caught.value.code == "FS-RUN-030"
    assert caught.value.where == "clients 3"
    assert named in (caught.value.why or "")
    assert len(list(tmp_path.iterdir())) == 3
    assert pool.pids == []


def test_a_stopped_worker_is_told_of_and_can_go_on(
    tmp_path: Path, hire: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.pool.LOOK_SECONDS", 0.05)
    stop = dying(tmp_path, at=7, times=1, how=lambda: os.kill(os.getpid(), signal.SIGSTOP))
    small = build(scaffold(), spec=SPEC, grad=stop)
    small.engine.crew = hire(1)

    def go_on(record: logging.LogRecord) -> None:
        os.kill(record.args[0], signal.SIGCONT)  # type: ignore[index,arg-type]

    with heard("is stopped", go_on):  # and do what the message says
        assert torch.equal(model(small), model(build(scaffold(), spec=SPEC)))
    assert any("kill -CONT" in r.message for r in caplog.records)


def test_a_worker_that_takes_long_is_told_of_with_its_clients(
    tmp_path: Path, hire: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.pool.LOOK_SECONDS", 0.02)
    told = tmp_path.with_name(f"{tmp_path.name}-told")

    def take_long() -> None:
        # Until somebody has told of it: a machine with other work may look at it late.
        end = time.monotonic() + 60
        while not told.exists() and time.monotonic() < end:
            time.sleep(0.01)

    slow = dying(tmp_path, at=7, times=1, how=take_long)
    small = build(scaffold(), spec=SPEC, grad=slow)
    small.engine.crew = hire(1, patience=0.01)
    with heard("clients=4 ", lambda _: told.touch()):
        model(small, 1)
    assert any("clients=4 " in r.message for r in caplog.records)


def test_the_lock_of_a_run_is_not_kept_by_workers(tmp_path: Path, hire: Any) -> None:
    small = build(scaffold(), spec=SPEC)
    pool = small.engine.crew = hire(2)
    with locked(tmp_path):
        model(small, 1)
    assert len(pool.pids) == 2
    assert not is_locked(tmp_path)


def test_workers_of_a_thread_outlive_it(hire: Any) -> None:
    small = build(scaffold(), spec=SPEC)
    pool = small.engine.crew = hire(2)
    thread = threading.Thread(target=model, args=(small, 1))
    thread.start()
    thread.join()
    pids = pool.pids
    assert len(pids) == 2
    assert torch.equal(model(small, 2), model(build(scaffold(), spec=SPEC)))
    assert pool.pids == pids


PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, sys.argv[1])
from fedsim.local import LocalSpec
from fedsim.simulation.pool import Pool
from fedsim.strategies.fedavg import fedavg
from tests.federations import build

parent = os.getpid()
def slow(inner):
    def grad_fn(x, batch):
        if os.getpid() != parent:
            open(sys.argv[2] + "/" + str(os.getpid()), "w").close()
            time.sleep(600)
        return inner(x, batch)
    return grad_fn

small = build(fedavg(), grad=slow)
small.engine.crew = Pool(2)
small.federation.run_window()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_program_also_in_the_middle_of_a_block(
    repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(repository), str(tmp_path)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while len(list(tmp_path.iterdir())) < 2:
        assert program.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(program.pid, number)  # as Ctrl-C does it
    else:
        program.kill()
    _, said = program.communicate(timeout=60)  # the pipe closes when the last of them has ended
    assert said.count("Traceback") == (number == signal.SIGINT)
    assert "pool_worker" not in said


WITH_WORKERS = (
    SMALL.replace("rounds = 3", "rounds = 100000")
    + """
[engine]
name = "stacked"
block = 2
workers = 2
"""
)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_workers_after_its_round_and_leaves_none(tmp_path: Path) -> None:
    run = start(tmp_path, "run", config(tmp_path, WITH_WORKERS), start_new_session=True)
    wait_for_lines(run, tmp_path / "runs", 3)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(workers) == 2
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=240)
    assert run.returncode == 5
    assert "FS-INT-001" in said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_nobody_writes_rows_that_are_not_asked_for_any_more(
    hire: Callable[..., Pool], tmp_path: Path
) -> None:
    """Their places in the files are given to others; an interrupt does not wait for the blocks either."""
    small = build(scaffold(), spec=SPEC, folder=tmp_path)
    pool = small.engine.crew = hire(2)
    assert small.federation.run_window().error is None
    collect, left, ended = small.engine.collect, [], []

    def impatient(*args: Any) -> Iterator[Any]:
        answers = collect(*args)
        yield next(answers)
        answers.close()  # type: ignore[attr-defined]
        left.extend(task for seat in pool._staff for task in seat.tasks)
        ended.extend(pool.pids)
        raise KeyError("enough")

    small.engine.collect = impatient  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="enough"):
        small.federation.run_window()
    assert not left
    assert not ended
    small.engine.collect = collect  # type: ignore[method-assign]
    small.engine.cancel()
    assert small.federation.run_window().error is None
