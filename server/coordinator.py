"""The coordinator's process: port, state, services, signals, and an orderly end.

The port is opened first and says NOT_SERVING while the state is taken up. SIGTERM and SIGINT drain: health
says so, nobody gets work any more, what is under way may end, runs stop where they are, everything is
written back, exit code 0. A second signal ends the process at once; the state is made for that.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc

from fedsim import __version__
from fedsim.connections import Address
from fedsim.errors import EnvironmentProblem
from fedsim.pb.federation_pb2_grpc import add_ControlServicer_to_server
from fedsim.server import memory
from fedsim.server.control import ControlParts, ControlService
from fedsim.server.fleet import Fleet
from fedsim.server.fleet_parts import FleetParts
from fedsim.server.frames import add_fleet
from fedsim.server.health import DRAINING, OPENING, STORAGE, Health
from fedsim.server.http import HttpServer, read_token
from fedsim.server.leases import STANDSTILL_SECONDS, standstill
from fedsim.server.logs import start_logging, stop_logging
from fedsim.server.server_run import ServerRun
from fedsim.server.services import Services
from fedsim.server.settings import ServerSettings
from fedsim.server.state import State, listening_file
from fedsim.server.telemetry import Telemetry
from fedsim.storage import write_atomically
from fedsim.transport import server_credentials, server_options

SWITCH_SECONDS = 0.001
COLLECT_AFTER = 20_000  # new objects
GRACE_SECONDS = 30.0
"""So long transfers and submissions may go on after the first signal."""
AT_ONCE = 130
_LOOK_SECONDS = 1.0
_STORAGE_SECONDS = 5.0
_COUNT_SECONDS = 15.0
_GARBAGE_SECONDS = 3_600.0
# Health checks and operators come on top of the calls that the services count themselves.
_SPARE_CALLS = 512
_QUIET_LOOKS, _QUIET_SECONDS = 10, 0.1

log = logging.getLogger(__name__)


async def serve(settings: ServerSettings) -> int:
    """Run a coordinator until it is told to end: its exit code.

    Raises:
        FedsimError: it cannot start: a port is taken, the state cannot be used, a certificate is missing.
    """
    handler = start_logging(settings.server.log_format, settings.server.log_level)
    # The event loop, the ledger's writer and the runs hand each other work all the time; with the usual
    # 5 ms each would wait that long for whoever computes (benchmarks/deployment/throughput.py).
    sys.setswitchinterval(SWITCH_SECONDS)
    memory.share_arenas()
    try:
        await Coordinator(settings, on_serving=lambda address: _collect_seldom()).run()
    finally:
        stop_logging(handler)
    return 0


def _collect_seldom() -> None:
    """What was loaded and opened stays, the collector need not look at it again.

    A call makes some hundred objects that go when it is answered; collecting after every 700 of them, as
    usual, took a twentieth of the processor's time while a thousand clients answered.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


class Coordinator:
    """One coordinator; `run` once.

    Args:
        settings: checked.
        grace_seconds: see `GRACE_SECONDS`.
        on_serving: called with the address once everything is served; for whoever runs it in a process
            of its own making.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        grace_seconds: float = GRACE_SECONDS,
        on_serving: Callable[[Address], None] | None = None,
    ) -> None:
        self.settings = settings
        self._grace_seconds = grace_seconds
        self._on_serving = on_serving
        self._ending = asyncio.Event()
        self._telemetry = Telemetry(settings.server.state)
        self._health = Health()
        self._work = ThreadPoolExecutor(4, "work")
        self._disk = ThreadPoolExecutor(16, "disk")
        self._operators = ThreadPoolExecutor(8, "operators")
        self._fleet: Fleet

    def drain(self) -> None:
        """Begin to end; again does nothing more."""
        if not self._ending.is_set():
            log.info("draining")
        self._ending.set()

    async def run(self) -> None:
        """Serve until `drain` or a signal."""
        async with AsyncExitStack() as undo:
            for pool in (self._work, self._disk, self._operators):
                undo.callback(pool.shutdown, wait=False)
            await self._health.unfit(OPENING, "the coordinator opens its state")
            services = Services()
            server, address = await self._listen(services)
            undo.push_async_callback(server.stop, None)
            http = self._http()
            http_address = await http.start()
            undo.push_async_callback(http.stop)
            self._catch_signals(undo)
            loop = asyncio.get_running_loop()
            state = await loop.run_in_executor(self._disk, State, self.settings)
            undo.push_async_callback(loop.run_in_executor, None, state.close)
            state.runs.on_window = self._window_done
            state.runs.on_over = self._telemetry.forget_run
            state.database.writer.on_commit = self._telemetry.committed
            self._fleet, control = self._serve(state, services)
            undo.callback(self._fleet.presence.close)
            watching = [
                asyncio.create_task(self._look_after()),
                asyncio.create_task(self._watch(state)),
                asyncio.create_task(self._telemetry.sample_lag()),
            ]
            for task in watching:
                undo.callback(task.cancel)
            await self._announce(state, undo, address, http_address)
            await self._ending.wait()
            await self._drain(server, control)
        log.info("the coordinator has ended")

    async def _listen(self, services: Services) -> tuple[Any, Address]:
        """Open the port."""
        own, limits = self.settings.server, self.settings.limits
        most = limits.concurrent_rpcs + limits.parked_polls + _SPARE_CALLS
        server = grpc.aio.server(options=server_options(), maximum_concurrent_rpcs=most)
        from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

        add_HealthServicer_to_server(self._health.servicer, server)
        server.add_generic_rpc_handlers((services,))
        listen = self.settings.listen
        try:
            if own.cert is not None and own.cert_key is not None:
                credentials = server_credentials(own.cert, own.cert_key, client_ca=own.client_ca)
                port = server.add_secure_port(str(listen), credentials)
            else:
                port = server.add_insecure_port(str(listen))
        except RuntimeError as error:
            raise _port_taken(listen, str(error)) from error
        if not port:
            raise _port_taken(listen, "the system gave no reason")
        await server.start()
        return server, Address(listen.host, port)

    def _window_done(
        self, run: ServerRun, name: str, record: dict[str, Any], phases: Mapping[str, float]
    ) -> None:
        """Count a window that was committed; in the run's thread."""
        telemetry = self._telemetry
        telemetry.round(name, record["round"])
        for phase, seconds in phases.items():
            telemetry.phase(phase, seconds)
        if "aggregate" in phases:
            telemetry.aggregated(run.config.strategy.name, phases["aggregate"])
        outcomes = {"received": "answered", "refused": "failed", "lost": "failed", "late": "late"}
        for key, outcome in outcomes.items():
            telemetry.task(outcome, record[key])

    def _http(self) -> HttpServer:
        path = self.settings.server.http_token
        return HttpServer(
            self.settings.http,
            self._telemetry,
            lambda: self._health.reason,
            token=None if path is None else read_token(path),
        )

    def _serve(self, state: State, services: Services) -> tuple[Fleet, ControlService]:
        """Put the services together and let calls in."""
        fleet = Fleet(
            FleetParts(
                auth=state.auth,
                runs=state.runs,
                uploads=state.uploads,
                objects=state.objects,
                key=state.key,
                settings=self.settings,
                telemetry=self._telemetry,
                work=self._work,
                disk=self._disk,
                incarnation=state.incarnation,
                seen=state.nodes.seen,
            )
        )
        control = ControlService(
            ControlParts(
                auth=state.auth,
                nodes=state.nodes,
                runs=state.runs,
                audit=state.audit,
                telemetry=self._telemetry,
                server_id=state.key.public,
                work=self._operators,
                online=lambda: fleet.presence.told,
                drain=self.drain,
                revoked=fleet.forget,
                incarnation=state.incarnation,
                chunk_bytes=self.settings.limits.chunk_bytes,
            )
        )
        add_fleet(fleet, services)
        add_ControlServicer_to_server(control, services)  # type: ignore[no-untyped-call]
        return fleet, control

    async def _announce(
        self, state: State, undo: AsyncExitStack, address: Address, http_address: Address
    ) -> None:
        """Healthy from here on; the addresses, which may have been chosen by the system, are written down."""
        file = listening_file(state.folder)
        content = {"address": str(address), "http": str(http_address), "pid": os.getpid()}
        write_atomically(file, json.dumps(content).encode() + b"\n")
        undo.callback(file.unlink, missing_ok=True)
        await self._health.fit(OPENING)
        log.info(
            "serving address=%s http=%s server=%s build=%s state=%s",
            address, http_address, state.key.node_id, __version__, state.folder,
        )  # fmt: skip
        if self._on_serving is not None:
            self._on_serving(address)

    async def _drain(self, server: Any, control: ControlService) -> None:
        """Let what is under way end, then close the port."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._grace_seconds
        await self._health.unfit(DRAINING, "the coordinator drains")
        self._fleet.drain()
        # A submission follows an upload after a moment: quiet is several looks in a row.
        quiet = 0
        while quiet < _QUIET_LOOKS and loop.time() < until:
            await asyncio.sleep(_QUIET_SECONDS)
            quiet = 0 if self._fleet.running else quiet + 1
        control.close()
        await server.stop(1.0)

    # What has to be looked at again and again.

    async def _look_after(self) -> None:
        """Leases and nodes whose time is over."""
        leases = self.settings.leases
        gap = standstill(leases.seconds, leases.heartbeat_seconds, look_seconds=_LOOK_SECONDS)
        late = False
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                # A loop that is late each time hears its nodes all the same, and must see who is silent.
                late = self._fleet.look_after(STANDSTILL_SECONDS if late else gap)
            except Exception:
                log.exception("leases could not be looked after; tried again in %g s", _LOOK_SECONDS)

    async def _watch(self, state: State) -> None:
        """Space on the disk, numbers for the metrics, uploads that nobody goes on with."""
        loop = asyncio.get_running_loop()
        counted = collected = loop.time()
        while True:
            await asyncio.sleep(_STORAGE_SECONDS)
            try:
                problem = await loop.run_in_executor(self._disk, state.problem)
                if problem is None:
                    await self._health.fit(STORAGE)
                else:
                    await self._health.unfit(STORAGE, problem)
                if loop.time() - counted >= _COUNT_SECONDS:
                    counted = loop.time()
                    self._telemetry.nodes(await loop.run_in_executor(self._disk, self._count, state))
                if loop.time() - collected >= _GARBAGE_SECONDS:
                    collected = loop.time()
                    await loop.run_in_executor(self._disk, state.runs.leftovers.collect)
            except Exception:
                log.exception("the state folder could not be looked after; tried again")

    def _count(self, state: State) -> dict[str, int]:
        counts = {"online": len(self._fleet.presence)}
        for node in state.nodes.list():
            counts[node.state] = counts.get(node.state, 0) + 1
        return counts

    # Signals.

    def _catch_signals(self, undo: AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        handlers = {"SIGTERM": self._told_to_end, "SIGINT": self._told_to_end, "SIGHUP": self._reload}
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            # Windows has no SIGHUP and no handlers of a loop, and only a main thread hears signals.
            with suppress(NotImplementedError, RuntimeError, ValueError):
                if number is not None:
                    loop.add_signal_handler(number, handler)
                    undo.callback(loop.remove_signal_handler, number)

    def _told_to_end(self) -> None:
        if self._ending.is_set():
            log.warning("a second signal: stopping at once")
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(AT_ONCE)
        self.drain()

    def _reload(self) -> None:
        # The files are looked at with every handshake; connections and leases go on.
        log.info("certificates that changed are used from the next connection on")


def _port_taken(listen: Address, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the port {listen} cannot be opened",
        code="FS-SRV-001",
        where=f"[server] listen = {listen}",
        why=why,
        hint="end the process that has it (fedsim doctor), or choose another port with --listen",
    )
