"""Programs to be measured as child processes that take turns: one works, the others wait on their pipes.

A pool of processes, the thread setting of a library and an allocator's state belong to a process; two
programs in one would disturb each other. By turns they see the same machine within seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.tree import PeakMemory, cpu_seconds

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Program:
    """What to start.

    Args:
        name: in the table, such as ``fedsim flat``; command: its words.
        environment: variables beside those of this process.
        same: it follows the planned cohorts and batch order, so its global model can be compared.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    same: bool = True


@dataclass(eq=False)
class Measured:
    """What was seen of a program.

    Args:
        facts: what it said of itself; startup: seconds from its start until it could begin a round.
        seconds: of each round, the first apart in `first`; evaluated: whether a round had an evaluation.
        cpu: seconds of all rounds together but the first turn's; counted: rounds that `cpu` is of.
        peak: bytes, PSS of the process tree, from a run of its own.
    """

    program: Program
    facts: dict[str, Any] = field(default_factory=dict)
    startup: float = 0.0
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    evaluated: list[bool] = field(default_factory=list)
    cpu: float = 0.0
    counted: int = 0
    peak: int = 0

    @property
    def plain(self) -> list[float]:
        """Seconds of the rounds without an evaluation, the first left out."""
        return [s for s, e in zip(self.seconds, self.evaluated, strict=True) if not e]


class Child:
    """A started program."""

    def __init__(self, program: Program, *, log: Path) -> None:
        self.program = program
        self._log = log
        # Threads are each program's own affair: none of them inherits a setting.
        inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        began = time.perf_counter()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                list(program.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                cwd=ROOT, env={**inherited, **program.environment}, text=True, bufsize=1,
            )  # fmt: skip
        self.facts = self._hear()
        self.startup = time.perf_counter() - began

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            tail = self._log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"{self.program.name} ended with {self.process.returncode}:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **wish: Any) -> dict[str, Any]:
        """Send a wish and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(wish) + "\n")
        return self._hear()

    def model(self, path: Path) -> dict[str, np.ndarray] | None:
        """The global model as it stands, by name; None where the program cannot say."""
        if not self.ask(save=str(path)).get("saved"):
            return None
        with np.load(path) as file:
            return {name: file[name] for name in file.files}

    def end(self) -> None:
        """Close its pipe, and wait until it has written what it has to."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def by_turns(
    programs: Sequence[Program], scratch: Path, *, rounds: int, turn: int
) -> tuple[list[Measured], dict[str, dict[str, Any]]]:
    """Run the same rounds in every program, a few at a time.

    Args:
        rounds: of each, beside a first one; turn: in a row.

    Returns:
        What was seen of each, and the models: ``{program: {"first": …, "last": …}}``, by parameter name.
    """
    children: list[Child] = []
    found: list[Measured] = []
    models: dict[str, dict[str, Any]] = {}
    try:
        for number, program in enumerate(programs):
            child = Child(program, log=scratch / f"{number}.log")
            children.append(child)
            found.append(Measured(program, child.facts, child.startup))
        for number, (child, one) in enumerate(zip(children, found, strict=True)):
            one.first = child.ask(rounds=1)["seconds"][0]
            models[one.program.name] = {"first": child.model(scratch / f"{number}-first.npz")}
        for done in range(0, rounds, turn):
            count = min(turn, rounds - done)
            # Whoever goes first finds the machine as the last one left it: go round.
            shift = (done // turn) % len(children)
            for number in [*range(shift, len(children)), *range(shift)]:
                child, one = children[number], found[number]
                before = cpu_seconds(child.process.pid)
                answer = child.ask(rounds=count)
                one.cpu += cpu_seconds(child.process.pid) - before
                one.counted += count
                one.seconds += answer["seconds"]
                one.evaluated += answer["evaluated"]
        for number, child in enumerate(children):
            models[child.program.name]["last"] = child.model(scratch / f"{number}-last.npz")
    finally:
        for child in children:
            child.end()
    return found, models


def peak_memory(program: Program, scratch: Path, *, rounds: int) -> int:
    """Most PSS in bytes of the program's tree, from its start to the end of so many rounds.

    A run of its own: to read the memory of a process slows it down.
    """
    ready, wanted = json.dumps({"rounds": rounds}) + "\n", 2
    with (scratch / "memory.log").open("wb") as log:
        process = subprocess.Popen(
            list(program.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
            env={**os.environ, **program.environment}, text=True,
        )  # fmt: skip
        with PeakMemory(process.pid) as memory:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(ready)
            process.stdin.flush()
            heard = [process.stdout.readline() for _ in range(wanted)]
    process.stdin.close()
    process.wait(120)
    process.stdout.close()
    if not all(heard):
        raise SystemExit(f"{program.name} ended before its rounds, see its log")
    return memory.peak
