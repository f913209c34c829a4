"""`fedsim up`: a whole federation on this machine, with the processes and the security of a real one.

A coordinator and N clients start as processes of their own, with certificates, keys and policies that are
made on the spot; then a run is submitted and followed. Every command is printed as it can be typed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tomli_w
import typer

from fedsim.cli import output
from fedsim.cli.arguments import ConfigFile, Sets, load
from fedsim.cli.processes import Processes, command
from fedsim.cli.settings import Settings, settings_of
from fedsim.errors import ConfigError, FedsimError, Interrupted

if TYPE_CHECKING:
    from fedsim.config import Loaded

CLIENTS, MOST_CLIENTS, ROUNDS = 3, 64, 20
NAME = "up"
START_SECONDS = 60.0


def up(
    context: typer.Context,
    config: ConfigFile = None,
    clients: Annotated[
        int | None, typer.Option(min=1, max=MOST_CLIENTS, help="Client processes.  [default: 3]")
    ] = None,
    sets: Sets = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for keys, state and logs.  [default: a new one]"),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep that folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Prepare it, print the commands and start nothing.")
    ] = False,
) -> None:
    """Start a coordinator and clients on this machine and run a federation.

    Each is a process of its own; they speak TLS over loopback and log in with keys made on the spot.
    Ctrl-C stops all of them.
    """
    # Before grpc is loaded: this process starts others, and never forks.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    settings = settings_of(context)
    loaded = _loaded(config, clients, sets)
    folder, own = _folder(state)
    keep = keep or dry_run or not own
    stage = Stage(settings, folder, clients=loaded.config.data.partition.clients or CLIENTS, dry=dry_run)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        stage.run(loaded)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            "stopped; coordinator and clients have ended",
            code="FS-INT-004",
            where=str(folder),
            hint="start again with fedsim up",
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        stage.stop()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if keep:
        output.note(settings, f"keys, state and logs: {folder}")


class Stage:
    """The folder, the processes and the commands of one federation.

    Args:
        folder: for everything that is made.
        clients: client processes.
        dry: prepare the folder, and print what would be started.
    """

    def __init__(self, settings: Settings, folder: Path, *, clients: int, dry: bool = False) -> None:
        self.settings = settings
        self.folder = folder
        self.clients = clients
        self.dry = dry
        self.commands: list[str] = []
        self.environ = {"FEDSIM_HOME": str(folder / "operator")}
        self.processes = Processes(folder / "logs", {**self.environ, "OMP_NUM_THREADS": "1"})
        self.listen, self.http = (f"127.0.0.1:{port}" for port in _free_ports(2))

    def run(self, loaded: Loaded) -> None:
        """Prepare, start, run, show; `stop` afterwards in any case."""
        before = os.environ.get("FEDSIM_HOME")
        os.environ |= self.environ
        try:
            self._prepare()
            self._start()
            self._submit(loaded)
        finally:
            if before is None:
                del os.environ["FEDSIM_HOME"]
            else:
                os.environ["FEDSIM_HOME"] = before

    def stop(self) -> None:
        """End the processes; the clients first."""
        self.processes.stop()

    def _prepare(self) -> None:
        """Certificates, settings, invitations and policies."""
        at = self.folder
        self._call("certs", "dev", str(at / "tls"), "--name", "localhost", "--name", "127.0.0.1")
        _write(at / "server.toml", {
            "server": {
                "state": str(at / "coordinator"), "listen": self.listen, "http": self.http,
                "cert": str(at / "tls" / "server.pem"), "cert_key": str(at / "tls" / "server.key"),
            },
            "limits": {"min_free_bytes": "200MiB"},
            "leases": {"seconds": 30, "heartbeat_seconds": 5},
        })  # fmt: skip
        self._invite("operator", "operator", at / "operator.toml")
        for name in self._names():
            self._invite("client", name, at / name / "bundle.toml")
        from fedsim.client.operator_enrol import read_bundle

        server_id = read_bundle(at / "operator.toml").server_id
        for name in self._names():
            _write(at / name / "policy.toml", {
                "coordinators": {"allow": [server_id.hex()]},
                "runs": {"names": ["*"]},
                "plugins": {"strategies": ["*"], "models": ["*"], "datasets": ["*"]},
            })  # fmt: skip

    def _start(self) -> None:
        self._spawn("coordinator", "server", "--config", str(self.folder / "server.toml"))
        ca = self.folder / "tls" / "ca.pem"
        if not self.dry:
            self._await(lambda: _serves(self.listen, ca), "the coordinator does not serve")
        for name in self._names():
            at = self.folder / name
            self._spawn(
                name, "client", "--bundle", str(at / "bundle.toml"), "--state", str(at), "--policy",
                str(at / "policy.toml"), "--device", "cpu", "--threads", "1",
            )  # fmt: skip
        words = ("connect", NAME, "--bundle", str(self.folder / "operator.toml"))
        if self.dry:
            self._say(*words)
        else:
            self._call(*words)

    def _submit(self, loaded: Loaded) -> None:
        from fedsim.cli.following import finish, follow
        from fedsim.client.operator import connect
        from fedsim.config import to_toml

        path = self.folder / "federation.toml"
        path.write_text(to_toml(loaded.config), encoding="utf-8")
        words = ("run", str(path), "--engine", "server", "--connect", NAME)
        if self.dry:
            self._say(*words)
            data = {"state_folder": str(self.folder), "commands": self.commands}
            output.result(self.settings, data, [f"Next: type the commands above; all is in {self.folder}"])
            return
        with connect(NAME) as operator:
            self._await(
                lambda: sum(n.online and n.role == "client" for n in operator.nodes()) >= self.clients,
                f"not all of the {self.clients} clients came",
            )
            self._say(*words)
            run = operator.submit(path, name=loaded.config.run.name or "")
            self.settings.result = {"run_id": run.run_id, "state_folder": str(self.folder)}
            run = follow(self.settings, operator, run, target=NAME, alive=self.processes.check)
            finish(self.settings, operator, run)

    def _names(self) -> list[str]:
        return [f"client-{number}" for number in range(1, self.clients + 1)]

    def _invite(self, role: str, name: str, bundle: Path) -> None:
        bundle.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._call(
            "node", "invite", "--state", str(self.folder / "coordinator"), "--role", role, "--name", name,
            "--server", self.listen, "--ca", str(self.folder / "tls" / "ca.pem"), "--out", str(bundle),
        )  # fmt: skip

    def _call(self, *words: str) -> None:
        """A short command, in this process: the same words in a terminal do the same."""
        from fedsim.cli import call

        self._say(*words)
        said, complaints = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
            code = call([*words, "--quiet"])
        if code:
            raise ConfigError(
                "a step of the preparation failed",
                code="FS-SRV-030",
                where=command(words),
                why=complaints.getvalue().strip() or f"exit code {code}",
                hint="type that command to see more",
            )

    def _spawn(self, name: str, *words: str) -> None:
        self._say(*words)
        if not self.dry:
            self.processes.start(name, words)

    def _say(self, *words: str) -> None:
        # Where an operator's own files lie; the other commands name all that they need.
        typed = command(words, self.environ if words[0] in ("connect", "run") else None)
        self.commands.append(typed)
        output.note(self.settings, f"$ {typed}")

    def _await(self, done: Callable[[], bool], otherwise: str) -> None:
        from fedsim.client.operator_problems import timed_out

        if not self.processes.wait_until(done, seconds=START_SECONDS):
            hint = f"the logs are in {self.folder / 'logs'}; --keep keeps them"
            raise timed_out(otherwise, START_SECONDS, where=str(self.folder), hint=hint)


def _loaded(config: Path | None, clients: int | None, sets: Sequence[str] | None) -> Loaded:
    """The configuration; where nobody says how many clients there are, three.

    Raises:
        ConfigError: FS-CFG-006, more clients than one machine should run as processes.
    """
    own = load(config, sets=list(sets or []))
    named = own.sources.get("data.partition.clients", "default") != "default"
    count = clients or (own.config.data.partition.clients if named else CLIENTS) or CLIENTS
    if count > MOST_CLIENTS:
        raise ConfigError(
            f"{count} client processes are too many for one machine",
            code="FS-CFG-006",
            where="[data.partition] clients",
            why=f"each is a process of its own; at most {MOST_CLIENTS} are started",
            hint="give --clients N, or simulate: fedsim run",
        )
    flags: dict[str, tuple[str, object]] = {"data.partition.clients": ("--clients", count)}
    sample = own.config.round.sample
    if own.sources.get("round.sample", "default") == "default" or (
        isinstance(sample, int) and sample > count
    ):
        flags["round.sample"] = ("--clients", count)
    if own.sources.get("run.rounds", "default") == "default":
        flags["run.rounds"] = ("fedsim up", ROUNDS)
    return load(config, sets=list(sets or []), flags=flags)


def _folder(state: Path | None) -> tuple[Path, bool]:
    """The folder of everything, and whether it was made here.

    Raises:
        ConfigError: FS-SRV-030, it holds something already.
    """
    if state is None:
        return Path(tempfile.mkdtemp(prefix="fedsim-up-")), True
    if state.exists() and any(state.iterdir()):
        raise ConfigError(
            "the folder is not empty",
            code="FS-SRV-031",
            where=f"--state {state}",
            why="certificates, keys and state are made anew",
            hint="name another folder, or remove this one",
        )
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    return state.absolute(), False


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for each in sockets:
        each.close()
    return ports


def _serves(address: str, ca: Path) -> bool:
    from fedsim.client.health import check_health
    from fedsim.connections import Connection

    try:
        return check_health(Connection(address, ca=ca), seconds=2.0) == "SERVING"
    except FedsimError:
        return False


def _write(path: Path, tables: dict[str, dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
