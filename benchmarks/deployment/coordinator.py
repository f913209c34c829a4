"""The coordinator under test: a real `fedsim server` process on loopback, with TLS and invited nodes."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedsim.cli.node_local import opened
from fedsim.cli.processes import Processes
from fedsim.client.health import check_health
from fedsim.connections import Connection
from fedsim.errors import FedsimError
from fedsim.runs.folder import RunFolder
from fedsim.server.certificates import issue, make_ca

START_SECONDS = 60.0
OPERATOR = "operator"


@dataclass(eq=False)
class Coordinator:
    """A process that is started by ``with`` and ended with it.

    Args:
        folder: for all its files, empty or not there yet.
        nodes: names of clients that are invited.
        settings: tables of ``server.toml`` beside ``[server]``.
        environ: variables of the process.
    """

    folder: Path
    nodes: Sequence[str] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1"})
    tokens: dict[str, str] = field(default_factory=dict)
    operator: str = ""  # token of the operator

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def ca(self) -> Path:
        return self.folder / "tls" / "ca.pem"

    @property
    def pid(self) -> int:
        return self._processes.running[0].child.pid

    def __enter__(self) -> Coordinator:
        tls = self.folder / "tls"
        make_ca(tls)
        issue(tls, ["localhost", "127.0.0.1"])
        self.address, http = (f"127.0.0.1:{port}" for port in _free_ports(2))
        server = {
            "state": str(self.state), "listen": self.address, "http": http,
            "cert": str(tls / "server.pem"), "cert_key": str(tls / "server.key"),
        }  # fmt: skip
        tables = {"limits": {"min_free_bytes": "200MiB"}, **self.settings, "server": server}
        config = self.folder / "server.toml"
        config.write_text(tomli_w.dumps(tables), encoding="utf-8")
        with opened(self.state, None) as local:
            self.operator = local.nodes.invite(role=OPERATOR, name=OPERATOR)
            self.tokens = {name: local.nodes.invite(name=name) for name in self.nodes}
        self._processes = Processes(self.folder / "logs", self.environ)
        process = self._processes.start("coordinator", ["server", "--config", str(config)])
        if not self._processes.wait_until(self._serves, seconds=START_SECONDS):
            raise RuntimeError(f"the coordinator does not serve:\n{process.tail()}")
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.stop()

    def check(self) -> None:
        """Raise where the process has ended by itself."""
        self._processes.check()

    def run_folder(self) -> RunFolder:
        """Of the one run."""
        (path,) = (self.state / "runs").iterdir()
        return RunFolder(path)

    def _serves(self) -> bool:
        try:
            return check_health(Connection(self.address, ca=self.ca), seconds=2.0) == "SERVING"
        except FedsimError:
            return False


def synthetic(clients: int, model: dict[str, Any], rounds: int, *, features: int = 60) -> str:
    """A run as TOML in which everybody takes part in every round, and nothing but the rounds costs time.

    Args:
        model: the table ``[model]``.
        features: of an example.
    """
    return tomli_w.dumps({
        "run": {"rounds": rounds, "seed": 1},
        "data": {
            "name": "synthetic", "features": features, "clients": clients, "examples": 10,
            "partition": {"kind": "natural"},
        },
        "model": model,
        "client": {"batch_size": 16, "epochs": 1, "lr": 0.01},
        "round": {"sample": "all", "quorum": clients},
        "evaluation": {"central": False, "clients": "never"},
        "output": {"report": False, "plots": False, "checkpoint_every": 0},
    })  # fmt: skip


def records(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for each in sockets:
        each.close()
    return ports
