"""One worker process as its pool sees it: how it is started, how its end is noticed, how it is ended.

Where nothing speaks against it the worker is forked: it then has the model, the data and all Python objects
of the run already, and no script needs a guard. CUDA and gRPC do not survive a fork; with them a worker is a
fresh program that builds the same run from its configuration.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.simulation import pool_messages, pool_worker
from fedsim.simulation.crew import Bench

_STARTING = threading.Lock()  # between a fork and the closing of its socket no other fork may come
_END_SECONDS = 5.0


class Recipe(NamedTuple):
    """How a fresh process builds the run again.

    Args:
        config: of the run, as `fedsim.config.to_dict` gives it, resolved.
        objects: what was given from Python and is not in the configuration, by name.
    """

    config: Mapping[str, Any]
    objects: Sequence[str] = ()


class Process:
    """A worker that lives until it is ended, dies, or its pool's process does.

    Args:
        pid: of the worker; channel: to it.
    """

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self.alive = True
        self.how = ""  # it ended, in words
        self._owner = os.getpid()

    def look(self) -> bool:
        """Whether it still runs; once it does not, `how` says how it ended."""
        if self.alive:
            self._wait(os.WNOHANG)
        return self.alive

    def ended(self) -> None:
        """Its channel broke: wait for its end, and force it where it does not come."""
        until = time.monotonic() + _END_SECONDS
        while self.look() and time.monotonic() < until:
            time.sleep(0.005)
        self.end()

    def end(self) -> None:
        """Kill it; nothing in it is worth saving."""
        if self._owner != os.getpid():
            return  # a copy of this object in a process that was forked later
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._wait(0)
        self.channel.close()

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP); only Linux says so."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as file:
                return file.read().rpartition(")")[2].split()[0] in ("T", "t")
        except (OSError, IndexError):
            return False

    def _wait(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:
            self.alive, self.how = False, "in a way that nobody saw"  # somebody else has waited for it
            return
        if pid:
            self.alive, self.how = False, _how(os.waitstatus_to_exitcode(status))


def start(
    bench: Bench, number: int, *, device: str | None, recipe: Recipe | None, siblings: Sequence[socket.socket]
) -> Process:
    """Start a worker.

    Args:
        bench: of the run, for a forked worker.
        number: of the worker, from 0.
        device: where it trains, None for where the bench is.
        recipe: for a worker that cannot be forked.
        siblings: channels to the other workers, which a forked one must not keep open.

    Raises:
        ConfigError: the worker cannot be forked, and the run was made of Python objects.
        EnvironmentProblem: the system cannot start another process, or has no workers at all.
    """
    against = why_no_fork(device)
    try:
        with _STARTING:
            mine, theirs = socket.socketpair()
            try:
                if against is None:
                    return Process(_forked(bench, number, theirs, [mine, *siblings]), mine)
                return Process(_fresh(number, theirs, mine, against, device, recipe), mine)
            except BaseException:
                mine.close()
                raise
            finally:
                theirs.close()
    except OSError as error:
        raise EnvironmentProblem(
            "a worker process could not be started",
            code="FS-ENV-005",
            where=f"[engine] workers, number {number}",
            why=error.strerror or str(error),
            hint="use fewer workers, or raise the limit of processes (ulimit -u) and files (ulimit -n)",
        ) from error


def why_no_fork(device: str | None) -> str | None:
    """Why workers of this process must be fresh programs; None where they can be forked."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no safe fork"
    if device is not None and device != "cpu":
        return f"a worker on {device} needs a context of its own on the GPU"
    if torch.cuda.device_count():
        return "torch has threads for its GPUs, which a fork would lose"
    if "grpc" in sys.modules and os.environ.get("GRPC_ENABLE_FORK_SUPPORT") != "0":
        return "gRPC is loaded, which ends forked processes"
    return None


def _forked(bench: Bench, number: int, channel: socket.socket, others: Sequence[socket.socket]) -> int:
    """The id of a copy of this process that serves `channel`."""
    parent, main = os.getpid(), threading.current_thread() is threading.main_thread()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of every fork beside a thread: the worker takes no lock that one could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        code = 1
        try:
            pool_worker.begin_as_copy(parent if main else None, [s.fileno() for s in others])
            pool_worker.serve(channel, lambda: bench, number)
            code = 0
        finally:
            os._exit(code)  # nothing of the parent's is to be ended or written here
    return pid


def _fresh(
    number: int,
    channel: socket.socket,
    mine: socket.socket,
    against: str,
    device: str | None,
    recipe: Recipe | None,
) -> int:
    """The id of a new program that builds the run and serves `channel`."""
    if sys.platform == "win32":
        raise EnvironmentProblem(
            "this system has no worker processes",
            code="FS-ENV-006",
            where="[engine] workers",
            why="they share memory and sockets in a way that Windows does not have",
            hint="set workers = 1; threads = N uses more cores",
        )
    if recipe is None or recipe.objects:
        named = "" if recipe is None else ", ".join(recipe.objects)
        raise ConfigError(
            "the worker processes cannot be given what this run was made of",
            code="FS-CFG-140",
            where="[engine] workers",
            why=f"{against}; a new process builds the run from its configuration, which does not hold: "
            f"{named or 'anything of it'}",
            hint="set workers = 1, or name model, data and strategy in the configuration "
            "(model.target = 'package.module:Class')",
        )
    words = {
        "config": recipe.config,
        "device": device,
        "path": [os.path.abspath(folder) for folder in sys.path],
        "number": number,
    }
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps(words["path"]), str(channel.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[channel.fileno()],
        env=environ,
    )
    child.returncode = 0  # this module waits for it, not subprocess
    pool_messages.send(mine, words)
    return child.pid


_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from fedsim.simulation.pool_worker import main
main(int(sys.argv[2]))
"""


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    return f"by {name}, as where the system runs out of memory" if name == "SIGKILL" else f"by {name}"
