"""Three hosts on one machine: a federation over a network of its own, with a link that is cut in the middle.

Each host is a network namespace; a pair of virtual Ethernet devices joins each client's to the coordinator's,
where the cable can be pulled. Needs the right to make them, which
containers and ordinary users often lack; then the test is skipped and says so.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsim.config import config_from, to_toml
from fedsim.runs.folder import RunFolder
from fedsim.server import certificates
from fedsim.storage import sha256
from tests.deployed import LEASES, LIMITS, Member, stopped, until
from tests.deployed_values import simulated, values_of
from tests.processes import fedsim

pytestmark = pytest.mark.slow

ADDRESS = "10.213.0.1"
SERVER = f"{ADDRESS}:8470"
CLIENTS = ("client-1", "client-2")


def ip(*words: str) -> None:
    """One command of iproute2."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def hosts() -> Iterator[list[str]]:
    """Names of three network namespaces: the coordinator's, which has `ADDRESS`, and one of each client."""
    own = f"fedsim-{os.getpid()}-"
    names = [f"{own}{number}" for number in range(1 + len(CLIENTS))]
    centre = names[0]
    try:
        try:
            ip("netns", "add", centre)
            ip("-n", centre, "link", "set", "lo", "up")
            ip("-n", centre, "address", "add", f"{ADDRESS}/32", "dev", "lo")
            for number, name in enumerate(names[1:], start=1):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
                cable = f"eth{number}"
                ip("-n", centre, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("-n", centre, "address", "add", f"10.213.{number}.1/24", "dev", cable)
                ip("-n", centre, "link", "set", cable, "up")
                ip("-n", name, "address", "add", f"10.213.{number}.2/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "route", "add", "default", "via", f"10.213.{number}.1")
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield names
    finally:
        for name in names:
            with suppress(OSError):
                ip("netns", "delete", name)


class Hosts:
    """The processes on the three hosts; the first one is the coordinator's."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self.members: list[Member] = []
        self.environ = {"FEDSIM_HOME": str(folder / "operator")}

    def home(self, name: str) -> Path:
        return self.folder / name

    def start(self, host: int, name: str, *words: str) -> Member:
        """Start a process on a host."""
        prefix = ("ip", "netns", "exec", self.names[host])
        member = Member(words, self.folder / f"{name}.log", environ=self.environ, prefix=prefix)
        self.members.append(member)
        return member

    def link(self, host: int, state: str) -> None:
        """Pull the cable of a client's host at the coordinator's end, ``down``, or put it back, ``up``."""
        ip("-n", self.names[0], "link", "set", f"eth{host}", state)

    def prepare(self, values: dict[str, Any]) -> None:
        """Certificates for addresses, invitations, policies, the configuration."""
        at = self.folder
        certificates.make_ca(at / "tls")
        certificates.issue(at / "tls", [ADDRESS])
        tables = {
            "server": {
                "state": str(at / "coordinator"), "listen": SERVER, "http": "127.0.0.1:8471",
                "cert": str(at / "tls" / "server.pem"), "cert_key": str(at / "tls" / "server.key"),
            },
            "limits": LIMITS,
            "leases": LEASES,
        }  # fmt: skip
        (at / "server.toml").write_text(tomli_w.dumps(tables))
        self._invite("operator", at / "operator.toml")
        for name in CLIENTS:
            self.home(name).mkdir(mode=0o700)
            self._invite("client", self.home(name) / "bundle.toml")
            found = re.search(r'server_id = "(\w+)"', (self.home(name) / "bundle.toml").read_text())
            assert found is not None
            policy = {
                "coordinators": {"allow": [found[1]]},
                "runs": {"names": ["*"]},
                "plugins": {"strategies": ["*"], "models": ["*"], "datasets": ["*"]},
            }
            (self.home(name) / "policy.toml").write_text(tomli_w.dumps(policy))
        (at / "federation.toml").write_text(to_toml(config_from(values, {})))

    def _invite(self, role: str, bundle: Path) -> None:
        ended = fedsim(
            self.folder, "node", "invite", "--state", str(self.folder / "coordinator"), "--role", role,
            "--name", bundle.parent.name if role == "client" else role, "--server", SERVER,
            "--ca", str(self.folder / "tls" / "ca.pem"), "--out", str(bundle),
        )  # fmt: skip
        assert ended.code == 0, ended.err

    def run_folder(self) -> RunFolder | None:
        """Of the only run, once there is one."""
        found = list((self.folder / "coordinator" / "runs").glob("[!.]*"))
        return RunFolder(found[0]) if found else None


def test_three_hosts_make_the_model_of_the_simulator_through_a_cut_link(tmp_path: Path) -> None:
    """TLS with names that are addresses; the cable of one client is pulled in mid-run and put back."""
    values = values_of("scaffold", clients=2, rounds=6)
    with hosts() as names:
        lab = Hosts(tmp_path, names)
        lab.prepare(values)
        try:
            coordinator = lab.start(0, "coordinator", "server", "--config", str(tmp_path / "server.toml"))
            until(
                lambda: (tmp_path / "coordinator" / "listening.json").exists() or not coordinator.alive,
                "a coordinator",
            )
            assert coordinator.alive, coordinator.said
            clients = [
                lab.start(
                    host, name, "client", "--bundle", str(lab.home(name) / "bundle.toml"),
                    "--state", str(lab.home(name)), "--device", "cpu", "--threads", "1",
                )
                for host, name in enumerate(CLIENTS, start=1)
            ]  # fmt: skip
            # The operator sits on the third host.
            bundle = str(tmp_path / "operator.toml")
            assert lab.start(2, "connect", "connect", "lab", "--bundle", bundle).ended() == 0
            for client in clients:
                until(lambda client=client: "logged in" in client.said, "a client that is there")
            with stopped(*clients[0].children):
                config = str(tmp_path / "federation.toml")
                run = lab.start(2, "run", "run", config, "--engine", "server", "--connect", "lab")
                until(lambda: (lab.home("client-1") / "held").exists() or not run.alive, "a task in hand")
                assert run.alive, run.said
                lab.link(1, "down")
            # The client trains on without its network, and cannot hand in what it has.
            until(lambda: any((lab.home("client-1") / "unsent").glob("*/submit")), "an answer")
            lab.link(1, "up")
            assert run.ended() == 0, run.said
            folder = lab.run_folder()
            assert folder is not None
            assert sha256(folder.path / "checkpoints" / "final.safetensors") == simulated(values, tmp_path)
            assert coordinator.stop() == 0
        finally:
            for member in lab.members:
                if member.alive:
                    member.process.kill()
                    member.ended()
