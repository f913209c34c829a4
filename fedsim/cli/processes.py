"""Processes that a command starts and must not leave behind: named, logged, ended in order."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import EnvironmentProblem
from fedsim.printable import printable_lines
from fedsim.storage import problem

_TAIL_BYTES = 4_000
# What the child does first: it ends when this process does, however that ends. A function that runs between
# fork and exec could do the same, but a process in which gRPC has threads must not be forked.
_BOOT = """
import os, sys
parent = int(sys.argv.pop(1))
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)
sys.argv[0] = "fedsim"
from fedsim.cli import main
main()
"""


@dataclass(slots=True)
class Process:
    """One child.

    Args:
        name: for messages; words: what was started; log: where its output goes.
    """

    name: str
    words: Sequence[str]
    log: Path
    child: subprocess.Popen[bytes]

    @property
    def ended(self) -> int | None:
        """Its exit code, None while it runs."""
        return self.child.poll()

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log."""
        try:
            content = self.log.read_bytes()[-_TAIL_BYTES:]
        except OSError:
            return ""
        return "\n".join(printable_lines(content.decode("utf-8", "replace"))[-lines:])


class Processes:
    """The children of a command, in the order in which they were started; ends them in the reverse one.

    Args:
        logs: folder of their logs, which is made.
        environ: variables of the children beside those of this process.
    """

    def __init__(self, logs: Path, environ: Mapping[str, str]) -> None:
        self._logs = logs
        self._environ = {**os.environ, **environ}
        self.running: list[Process] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, words: Sequence[str]) -> Process:
        """Start ``fedsim WORDS`` with this very installation.

        Raises:
            EnvironmentProblem: it cannot be started, or its log cannot be written.
        """
        path = self._logs / f"{name}.log"
        try:
            with path.open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, str(os.getpid()), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environ,
                    # Ctrl-C reaches this process alone, which then ends the others in order.
                    start_new_session=True,
                )
        except OSError as error:
            raise problem(error, path) from error
        process = Process(name, words, path, child)
        self.running.append(process)
        return process

    def check(self) -> None:
        """See that all of them are alive.

        Raises:
            EnvironmentProblem: FS-SRV-029, one has ended by itself.
        """
        for process in self.running:
            code = process.ended
            if code is not None:
                raise EnvironmentProblem(
                    f"the {process.name} has ended by itself with exit code {code}",
                    code="FS-SRV-029",
                    where=str(process.log),
                    why=process.tail() or "its log is empty",
                    hint=f"start it by hand to see more: {command(process.words)}",
                )

    def wait_until(self, done: Callable[[], bool], *, seconds: float) -> bool:
        """Wait until `done`, while all of them live; False where it took longer."""
        until = time.monotonic() + seconds
        while not done():
            self.check()
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def stop(self, *, grace: float = 20.0) -> None:
        """End them all, the last one first; who does not end in `grace` seconds is killed."""
        until = time.monotonic() + grace
        try:
            # The one that all others talk to was the first, and ends when they have said goodbye.
            for wave in (self.running[1:], self.running[:1]):
                for process in wave:
                    if process.ended is None:
                        with suppress(ProcessLookupError):
                            process.child.send_signal(signal.SIGTERM)
                for process in wave:
                    with suppress(subprocess.TimeoutExpired):
                        process.child.wait(max(0.1, until - time.monotonic()))
        finally:  # also where a second Ctrl-C ended the waiting
            for process in self.running:
                if process.ended is None:
                    # It leads its own session: its workers go with it.
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.child.pid, signal.SIGKILL)
                    process.child.wait()
            self.running.clear()


def command(words: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """``fedsim WORDS`` as it can be typed."""
    before = [f"{name}={shlex.quote(value)}" for name, value in (environ or {}).items()]
    return " ".join([*before, "fedsim", *(shlex.quote(str(word)) for word in words)])
