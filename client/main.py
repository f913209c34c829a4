"""`fedsim client`: the parts put together, and the signals.

The first SIGTERM or SIGINT ends the batch under way, keeps what is in hand and says goodbye; the second one
ends the process at once, from which the next start recovers like from a crash.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points

# Before grpc is imported: its fork handlers would stop the worker from being started.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from fedsim.client.connection import POLL_SECONDS, Connection, Introduction
from fedsim.client.policy import PolicyFile
from fedsim.client.runtime import Runtime
from fedsim.client.settings import ClientSettings
from fedsim.client.state import StateFolder
from fedsim.client.worker import Worker, WorkerFailed, WorkerOptions
from fedsim.errors import EnvironmentProblem
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.transport import backoff, open_channel

PLUGINS = {"strategy": "fedsim.strategies", "model": "fedsim.models", "dataset": "fedsim.datasets"}

log = logging.getLogger(__name__)


def run_client(settings: ClientSettings) -> None:
    """Run a client until it is told to stop; call it in the main thread.

    Raises:
        CoordinatorProblem: exit 3. SupersededError: exit 7. ConfigError, EnvironmentProblem.
        KeyboardInterrupt: the second signal.
    """
    folder = StateFolder(settings.state)
    try:
        key = own_key(settings)
        policy = PolicyFile(settings.policy)
        if policy.policy() is None:
            log.warning("there is no policy in %s: every task will be refused", settings.policy)
        asyncio.run(_serve(settings, folder, key, policy))
    finally:
        folder.close()


def own_key(settings: ClientSettings) -> Key:
    """The key of this client; a new one where there is none yet.

    Raises:
        EnvironmentProblem: it cannot be read, or others can read it.
    """
    if not settings.key.exists():
        key = Key.new()
        settings.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key.save(settings.key)
        log.info("key=%s node=%s made", settings.key, key.node_id)
        return key
    return Key.load(settings.key)


async def _serve(settings: ClientSettings, folder: StateFolder, key: Key, policy: PolicyFile) -> None:
    wait = partial(_backoff, random.Random())
    channel = open_channel(
        settings.server,
        settings.tls(),
        insecure=settings.insecure,
        insecure_beyond_loopback=settings.insecure_beyond_loopback,
    )
    who = Introduction(settings.server, settings.server_id, settings.token, settings.name, settings.labels)
    connection = Connection(channel, key, folder, who, backoff=wait, max_retries=settings.max_retries)
    worker = Worker(
        WorkerOptions(
            device=settings.device,
            threads=settings.threads,
            data=settings.data,
            data_function=settings.data_function,
            idle_seconds=settings.idle_seconds,
            copy=settings.copy,
            log=settings.state / "worker.log",
        )
    )
    runtime: Runtime | None = None
    main = asyncio.current_task()

    def stop() -> None:
        if runtime is not None:
            runtime.stop()
        elif main is not None:
            main.cancel()

    with _signals(stop):
        try:
            request = await _request(worker)
            runtime = Runtime(connection, folder, policy, worker, request=request, backoff=wait)
            await runtime.run()
        except asyncio.CancelledError:
            if runtime is not None:
                raise
        finally:
            await worker.close()
            await connection.close()


async def _request(worker: Worker) -> pb.LeaseRequest:
    """What this client can run; asking for the device also warms the worker up.

    Raises:
        EnvironmentProblem: FS-CLI-051, there is no such device.
    """
    try:
        device = await worker.device()
    except WorkerFailed as failed:
        raise EnvironmentProblem(
            "the training process cannot use its device",
            code="FS-CLI-051",
            where="--device",
            why=failed.text,
            hint="use --device cpu, or auto for a GPU where there is one",
        ) from failed
    plugins = [
        pb.Plugin(kind=kind, name=entry.name, version="" if entry.dist is None else entry.dist.version)
        for kind, group in PLUGINS.items()
        for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)
    ]
    return pb.LeaseRequest(
        wait_seconds=POLL_SECONDS, device=device.device, memory_bytes=device.memory_bytes, plugins=plugins
    )


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop` once; the next one ends the process by KeyboardInterrupt."""
    loop = asyncio.get_running_loop()
    asked = False

    def told() -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stop()

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            loop.add_signal_handler(number, told)
    except NotImplementedError:  # Windows
        for number in numbers:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(told))
        yield
        return
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _backoff(rng: random.Random, attempt: int) -> float:
    return backoff(attempt, rng)
