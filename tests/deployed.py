"""A deployment of real processes: a coordinator and its clients over TLS, which tests start, break and heal.

The set-up (certificates, invitations, policies) is made once and serves many runs: starting a process costs
seconds, a run of a small model a fraction of one. Client 1 always speaks through a `FaultProxy`, which is
transparent until a test says otherwise.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tomli_w

from fedsim.cli.node_local import opened
from fedsim.cli.processes import _BOOT
from fedsim.client.operator import Operator
from fedsim.client.operator_views import RemoteRun
from fedsim.config import config_from, to_toml
from fedsim.connections import Connection
from fedsim.identity import Key
from fedsim.runs.folder import RunFolder
from fedsim.server import certificates
from fedsim.server.state_keys import ADMIN_KEY
from fedsim.storage import sha256
from tests.deployed_values import replayed, simulated
from tests.fault_proxy import FaultProxy
from tests.ports import free_port
from tests.processes import Ended, fedsim

COORDINATOR = "coordinator"
SECONDS = 120.0
"""For anything that must happen; a machine with other work on it is no failure."""
LIMITS = {"min_free_bytes": 0, "inline_bytes": "64KiB", "chunk_bytes": "64KiB"}
"""Small, so that small models are fetched and uploaded in pieces."""
LEASES = {"seconds": 60, "heartbeat_seconds": 1.0, "grace_seconds": 0}


def until(condition: Callable[[], Any], what: str, *, seconds: float = SECONDS) -> Any:
    """Wait for `condition`; what it returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"in {seconds:g} s: not {what}"
        time.sleep(0.01)
    return found


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """These processes stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Member:
    """One process of the deployment, which may be started again.

    Args:
        words: of the program; prefix: what it is started by, such as ``ip netns exec h1``.
        log: takes its output, of all its lives.
    """

    def __init__(
        self, words: Sequence[str], log: Path, *, environ: Mapping[str, str], prefix: Sequence[str] = ()
    ) -> None:
        self.words, self.log = tuple(words), log
        self.environ = dict(environ)
        self._begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            # The child ends with this process, however that ends.
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", _BOOT, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | self.environ,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        """What this life of it has written."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode("utf-8", "replace")

    @property
    def children(self) -> list[int]:
        """Its own processes: of a client the worker."""
        found: set[int] = set()
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(OSError):  # a thread that has just ended
                found.update(map(int, (task / "children").read_text().split()))
        workers = []
        for pid in sorted(found):
            with suppress(OSError):  # a process that has just ended
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    workers.append(pid)
        return workers

    def signal(self, number: signal.Signals) -> None:
        """Send it, to this process alone."""
        self.process.send_signal(number)

    def all(self, number: signal.Signals) -> None:
        """Send it to this process and its worker."""
        os.killpg(self.pid, number)

    def ended(self, seconds: float = SECONDS) -> int:
        """Its exit code, waited for."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to the process, not to its worker, and the end of it."""
        self.process.kill()
        self.process.wait(SECONDS)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        if self.alive:
            with suppress(ProcessLookupError):
                self.all(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            try:
                return self.ended(60)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    self.all(signal.SIGKILL)
        return self.ended()


class Deployment:
    """A coordinator and clients below one folder; `close` in every case.

    Args:
        folder: for everything.
        most: clients that are invited.
    """

    def __init__(self, folder: Path, *, most: int = 5) -> None:
        self.folder = folder
        self.state = folder / COORDINATOR
        self.tls = folder / "tls"
        self.ca = self.tls / "ca.pem"
        self.port, self.http = free_port(), free_port()
        self.members: dict[str, Member] = {}
        self.extra: list[Member] = []
        self._operator: Operator | None = None
        self._simulated: dict[str, str] = {}
        self._runs = 0
        self.tls.mkdir(parents=True)
        # Old enough for certificates that have expired.
        certificates.make_ca(self.tls, now=datetime.now(UTC) - timedelta(days=60))
        self.certify()
        self._write_settings()
        self._invite(most)
        self.proxy = FaultProxy(self.port)
        self.proxy.__enter__()

    def certify(self, **more: Any) -> None:
        """A new certificate of the coordinator; `more` as of `certificates.issue`."""
        certificates.issue(self.tls, ["localhost", "127.0.0.1"], **more)

    def _write_settings(self) -> None:
        tables: dict[str, Any] = {
            "server": {
                "state": str(self.state), "listen": self.address, "http": f"127.0.0.1:{self.http}",
                "cert": str(self.tls / "server.pem"), "cert_key": str(self.tls / "server.key"),
            },
            "limits": LIMITS,
            "leases": LEASES,
        }  # fmt: skip
        (self.folder / "server.toml").write_text(tomli_w.dumps(tables))

    def _invite(self, most: int) -> None:
        with opened(self.state, None) as local:
            self.server_id = local.key.public
            for name in (f"client-{number}" for number in range(1, most + 1)):
                home = self.home(name)
                home.mkdir(mode=0o700)
                bundle = {
                    "server": self.address, "server_id": self.server_id.hex(), "ca": self.ca.read_text(),
                    "token": local.nodes.invite(name=name),
                }  # fmt: skip
                path = home / "bundle.toml"
                path.touch(0o600)
                path.write_text(tomli_w.dumps(bundle))
                self.allow(name, strategies=["*"])

    def allow(self, name: str, *, strategies: Sequence[str]) -> None:
        """The policy of a client: every run of this coordinator, with these strategies."""
        policy = {
            "coordinators": {"allow": [self.server_id.hex()]},
            "runs": {"names": ["*"]},
            "plugins": {"strategies": list(strategies), "models": ["*"], "datasets": ["*"]},
        }
        (self.home(name) / "policy.toml").write_text(tomli_w.dumps(policy))

    # ------------------------------------------------------------ processes

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def coordinator(self) -> Member:
        return self.members[COORDINATOR]

    def home(self, name: str) -> Path:
        """State folder of a client."""
        return self.folder / name

    def start_coordinator(self, **environ: str) -> Member:
        """Start it and wait until it serves.

        Args:
            environ: such as ``FEDSIM_FAILPOINT`` or ``FEDSIM_SERVER__LEASES__SECONDS``.
        """
        member = self.launch_coordinator(**environ)
        self.await_serving()
        return member

    def launch_coordinator(self, **environ: str) -> Member:
        """Start it without waiting."""
        words = ("server", "--config", str(self.folder / "server.toml"))
        member = Member(words, self.folder / "coordinator.log", environ=environ)
        self.members[COORDINATOR] = member
        return member

    def await_serving(self) -> None:
        """Wait until the coordinator serves."""
        member, file = self.coordinator, self.state / "listening.json"

        def serving() -> bool:
            assert member.alive, member.said
            try:
                return bool(json.loads(file.read_text())["pid"] == member.pid)
            except (OSError, ValueError):
                return False

        until(serving, "a coordinator that serves")

    def restart_coordinator(self, **environ: str) -> Member:
        """End it politely where it lives, and start it with this environment."""
        if COORDINATOR in self.members:
            self.coordinator.stop()
        return self.start_coordinator(**environ)

    def crash(self, **environ: str) -> Member:
        """SIGKILL it and start it again."""
        self.coordinator.kill()
        return self.start_coordinator(**environ)

    def start_client(self, name: str, *more: str, **environ: str) -> Member:
        """Start a client without waiting for it."""
        home = self.home(name)
        server = self.proxy.address if name == "client-1" else self.address
        words = (
            "client", "--bundle", str(home / "bundle.toml"), "--server", server, "--state", str(home),
            "--device", "cpu", "--threads", "1", *more,
        )  # fmt: skip
        member = Member(words, self.folder / f"{name}.log", environ=environ)
        self.members[name] = member
        return member

    def online(self) -> set[str]:
        """Names of the clients that the coordinator hears of."""
        return {node.name for node in self.operator.nodes() if node.online and node.role == "client"}

    def await_online(self, *names: str) -> None:
        """Wait until these clients are there."""

        def there() -> bool:
            for name in names:
                assert self.members[name].alive, self.members[name].said
            return self.online() >= set(names)

        until(there, f"{', '.join(names)} online")

    @property
    def operator(self) -> Operator:
        """An administrator."""
        if self._operator is None:
            path = self.state / ADMIN_KEY
            connection = Connection(self.address, ca=self.ca, key=path, server_id=self.server_id)
            self._operator = Operator(connection, Key.load(path), patience=60.0)
        return self._operator

    def ready(self, clients: int) -> None:
        """As for the first test: coordinator and clients 1 to `clients` as they should be, and no run."""
        self.proxy.heal()
        for member in self.extra:
            member.stop()
        self.extra.clear()
        with suppress(ProcessLookupError):
            for member in self.members.values():
                if member.alive:
                    member.all(signal.SIGCONT)
        if COORDINATOR not in self.members or not self.coordinator.alive or self.coordinator.environ:
            self.restart_coordinator()
        names = [f"client-{number}" for number in range(1, clients + 1)]
        for name in names:
            known = self.members.get(name)
            if known is not None and known.alive and "--data-function" in known.words:
                known.stop()
            if known is None or not known.alive:
                self.start_client(name)
        for run in self.operator.list():
            if not run.over:
                self.operator.stop(run.run_id, now=True)
        self.await_online(*names)

    def close(self) -> None:
        """End everything."""
        self.proxy.heal()
        if self._operator is not None:
            self._operator.close()
        members = [*self.extra, *reversed(self.members.values())]
        for member in members:
            if member.alive:
                with suppress(ProcessLookupError):
                    member.all(signal.SIGKILL)
                member.ended()
        self.proxy.__exit__(None, None, None)

    def command(self, *words: str) -> Ended:
        """``fedsim WORDS --connect …`` as the administrator, to its end."""
        key = str(self.state / ADMIN_KEY)
        return fedsim(self.folder, *words, "--connect", self.address, "--ca", str(self.ca), "--key", key)

    # ------------------------------------------------------------ runs

    def submit(self, values: Mapping[str, Any]) -> Run:
        """Start a run of the first clients, as many as its data are for."""
        self._runs += 1
        text = to_toml(config_from(dict(values), {}))
        names = (f"client-{number}" for number in range(1, values["data"]["partition"]["clients"] + 1))
        nodes = f"name in {{{', '.join(names)}}}"
        return Run(self, self.operator.submit(text, name=f"run-{self._runs}", nodes=nodes))

    def simulated(self, values: Mapping[str, Any]) -> str:
        """`simulated`, once for each configuration."""
        text = to_toml(config_from(dict(values), {}))
        if text not in self._simulated:
            folder = self.folder / "simulated" / str(len(self._simulated))
            folder.mkdir(parents=True)
            self._simulated[text] = simulated(values, folder)
        return self._simulated[text]

    def metric(self, name: str) -> float:
        """A number of the coordinator's /metrics, all its labels together."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.split("[{ ]", line)[0] == name)


class Run:
    """One run of a deployment."""

    def __init__(self, deployment: Deployment, submitted: RemoteRun) -> None:
        self.deployment, self.run_id = deployment, submitted.run_id
        self.folder = RunFolder(deployment.state / "runs" / submitted.folder)

    def get(self) -> RemoteRun:
        """What the coordinator says of it."""
        return self.deployment.operator.get(self.run_id)

    def end(self) -> RemoteRun:
        """Wait until it is over; its last state."""
        found: RemoteRun = until(lambda: (run := self.get()).over and run, f"the end of {self.run_id}")
        return found

    def ok(self) -> RemoteRun:
        """Wait until it is over, with success."""
        found = self.end()
        assert found.state == "ok", (found.state, found.detail)
        return found

    @property
    def records(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl`` that are complete."""
        return _lines(self.folder.path / "metrics.jsonl")

    @property
    def journal(self) -> list[dict[str, Any]]:
        """Lines of ``journal.jsonl``."""
        return _lines(self.folder.path / "journal.jsonl")

    @property
    def clients(self) -> list[dict[str, Any]]:
        """Lines of ``clients.jsonl``."""
        return _lines(self.folder.path / "clients.jsonl")

    def await_round(self, number: int) -> None:
        """Wait until so many rounds are done."""
        until(lambda: len(self.records) > number, f"round {number} of {self.run_id}")

    @property
    def digest(self) -> str:
        """SHA-256 of ``final.safetensors``."""
        return sha256(self.folder.path / "checkpoints" / "final.safetensors")

    def replayed(self) -> str:
        """See `replayed`."""
        place = self.deployment.folder / "replayed" / self.run_id
        place.mkdir(parents=True)
        return replayed(self.folder, place)

    def assert_as_simulated(self, values: Mapping[str, Any]) -> None:
        """It ends well, with the very model of the simulator, every answer counted exactly once."""
        rounds = values["run"]["rounds"]
        self.ok()
        assert [record["round"] for record in self.records] == list(range(rounds + 1))
        cohort = values["round"]["sample"]
        assert [record["received"] for record in self.records[1:]] == [cohort] * rounds
        assert self.digest == self.deployment.simulated(values)
        arrived = [line["payload"]["task"] for line in self.journal if line["kind"] == "arrived"]
        assert len(arrived) == len(set(arrived)) == cohort * rounds


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def held(deployment: Deployment, name: str) -> bool:
    """Whether a client has a task in hand."""
    return (deployment.home(name) / "held").exists()


def unsent(deployment: Deployment, name: str) -> bool:
    """Whether a client has an answer that was not handed in."""
    return any((deployment.home(name) / "unsent").glob("*/submit"))


def accepted(deployment: Deployment, name: str, run: Run) -> bool:
    """Whether a client was told that an answer of it counts in `run`."""
    lines = deployment.members[name].said.splitlines()
    return any(f"run={run.run_id}" in line and "verdict=ACCEPTED" in line for line in lines)


@contextmanager
def deployment(folder: Path, **more: Any) -> Iterator[Deployment]:
    """A deployment that is closed at the end of the block."""
    found = Deployment(folder, **more)
    try:
        yield found
    finally:
        found.close()
