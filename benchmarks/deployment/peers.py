"""What a round costs elsewhere: FedAvg on a tiny model with five clients of Flower's deployment engine.

``python -m benchmarks.deployment.peers`` at the root of the repository, beside `round_overhead`. A SuperLink
and five SuperNodes run as processes on loopback in plain text; their clients answer at once without
training, so that the whole period of a round is overhead. Where Flower is not installed, or its processes
do not start without a network, the program says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.deployment.measuring import keep, machine

PYPROJECT = """
[project]
name = "tiny"
version = "1.0.0"
description = "a tiny federation"
license = "Apache-2.0"
dependencies = []
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "fedsim"
[tool.flwr.app.components]
serverapp = "tiny.server:app"
clientapp = "tiny.client:app"
[tool.flwr.app.config]
rounds = {rounds}
clients = {clients}
times = "{times}"
"""

CLIENT = '''
"""A client that answers at once."""
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    arrays = message.content["arrays"]
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
'''

SERVER = '''
"""FedAvg that writes down when each round begins."""
import json
import time

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    times: list = []

    def configure_train(self, server_round, arrays, config, grid):
        self.times.append(time.time())
        return super().configure_train(server_round, arrays, config, grid)


@app.main()
def main(grid, context):
    count = context.run_config["clients"]
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count,
                     min_available_nodes=count)
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(610, np.float32)]),
                   num_rounds=context.run_config["rounds"])
    strategy.times.append(time.time())
    with open(context.run_config["times"], "w") as file:
        json.dump(strategy.times, file)
'''


class Skipped(Exception):
    """Flower could not be measured, for this reason."""


def prepare(folder: Path, *, clients: int, rounds: int, port: int) -> Path:
    """The app and the connection; the file that the server writes its times into."""
    app, times = folder / "app", folder / "times.json"
    (app / "tiny").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PYPROJECT.format(rounds=rounds, clients=clients, times=times))
    for name, text in (("__init__", ""), ("client", CLIENT), ("server", SERVER)):
        (app / "tiny" / f"{name}.py").write_text(text)
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    return times


def measured(folder: Path, *, clients: int, rounds: int, seconds: float) -> list[float]:
    """Seconds of each round.

    Raises:
        Skipped: it did not work.
    """
    programs = Path(sys.executable).parent
    if not (programs / "flower-superlink").exists():
        raise Skipped("flower-superlink is not installed")
    ports = free_ports(clients + 1)
    times = prepare(folder, clients=clients, rounds=rounds, port=ports[0])
    environ = {
        **os.environ, "FLWR_HOME": str(folder / "home"), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{programs}:{os.environ.get('PATH', '')}",
    }  # fmt: skip
    link = f"127.0.0.1:{ports[0]}"
    commands = [[
        "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(ports[0]), "--database",
        str(folder / "state.db"), "--disable-runtime-dependency-installation",
    ]]  # fmt: skip
    for number, port in enumerate(ports[1:]):
        commands.append([
            "flower-supernode", "--insecure", "--superlink", link, "--host", "127.0.0.1", "--port", str(port),
            "--node-config", f"partition-id={number} num-partitions={clients}",
        ])  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    log = (folder / "flower.log").open("wb")
    try:
        for command in commands:
            running.append(start(command, environ, log))
            time.sleep(3.0 if len(running) == 1 else 0.2)
        time.sleep(5.0)
        run = ["flwr", "run", str(folder / "app"), "lab", "--stream"]
        running.append(start(run, environ, log))
        end = time.monotonic() + seconds
        while not times.exists() or not times.read_text():
            if time.monotonic() > end or running[0].poll() is not None:
                tail = (folder / "flower.log").read_bytes()[-1500:].decode("utf-8", "replace")
                raise Skipped(f"no result within {seconds:g} s; the end of its log:\n{tail}")
            time.sleep(0.5)
    finally:
        for child in reversed(running):
            child.terminate()
        for child in running:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        log.close()
    stamps = json.loads(times.read_text())
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def start(command: list[str], environ: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    """A program of Flower. Any: a file."""
    path = str(Path(sys.executable).parent / command[0])
    return subprocess.Popen([path, *command[1:]], env=environ, stdout=log, stderr=subprocess.STDOUT)


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240.0, help="after which it is given up")
    parser.add_argument("--json", type=Path, help="result file (beside this module)")
    options = parser.parse_args()
    facts = machine()
    folder = Path(tempfile.mkdtemp(prefix="fedsim-bench-"))
    try:
        found = measured(folder, clients=options.clients, rounds=options.rounds, seconds=options.seconds)
    except Skipped as reason:
        print(f"Flower: not measured: {reason}")
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    import flwr

    median = statistics.median(found)
    print(f"Flower {flwr.__version__}: {median:.2f} s a round ({min(found):.2f} to {max(found):.2f}), "
          f"{options.clients} clients that answer at once, {len(found)} rounds")  # fmt: skip
    keep(options.json, __file__, {
        "machine": facts, "flwr": flwr.__version__, "clients": options.clients, "seconds": found,
        "median_seconds": median,
    })  # fmt: skip


if __name__ == "__main__":
    main()
