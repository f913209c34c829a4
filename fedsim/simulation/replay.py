"""A coordinator's run gone through again in the simulator, by its journal.

The same decisions and the same events at the same times, but every answer is computed here, from the data
of the configuration. A run whose clients trained on those data ends with the same model, bit for bit; so
does an asynchronous one, which no other simulation could repeat.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fedsim.config import Config, config_from
from fedsim.engine import Event
from fedsim.errors import RunFailed
from fedsim.journal import Entry, Playback, drawn, entry_of, event_of
from fedsim.simulation.engine import SimulatedEngine
from fedsim.simulation.run import Simulation
from fedsim.simulation.sent import Sent, TaskKey
from fedsim.types import Ids, Task

JOURNAL = "journal.jsonl"


class ReplayEngine(SimulatedEngine):
    """The simulated fleet, told by a journal who answers when.

    Args:
        engine: whose place, trainer and client states are used.
        entries: the whole journal of a run.
    """

    def __init__(self, engine: SimulatedEngine, entries: Iterable[Entry]) -> None:
        super().__init__(
            engine.place, engine.trainer, engine.algorithm, devices=engine.devices, store=engine.store
        )
        self.playback = Playback(entries)
        self.seconds: dict[str, float] = {
            e.payload["task"]: e.payload["seconds"] for e in self.playback.events if e.kind == "arrived"
        }
        self.names: dict[TaskKey, str] = {}
        self._now = 0.0

    @property
    def now(self) -> float:
        return self._now

    def open_window(self) -> None:
        """The next window opens when it did."""
        entry = self.playback.decision("window")
        if entry is not None:
            self._now = max(self._now, entry.now)

    def draw(self) -> Ids:
        """The clients that were drawn."""
        entry = self.playback.decision("draw")
        if entry is None:
            raise _ended()
        return drawn(entry)

    def submit(self, task: Task) -> None:
        entry = self.playback.decision("dispatch")
        if entry is None:
            raise _ended()
        names: list[str] = entry.payload["tasks"]
        steps = self.place.clients.steps(task, task.ids)
        seconds = np.array([self.seconds.get(name, 0.0) for name in names])
        self.sent.add(Sent(task, steps, seconds, np.zeros(len(names), bool)))
        for client, name in zip(task.ids.tolist(), names, strict=True):
            self.names[client, task.version] = name

    def set_timer(self, name: str, at: float) -> None:
        """The journal says when timers went off."""

    def settle(self) -> list[Event]:
        entry = self.playback.decision("settle")
        if entry is None:
            raise _ended()
        return [e for found in self.playback.before(entry.seq) if (e := self._taken(found)) is not None]

    def next_event(self) -> Event:
        while (entry := self.playback.event()) is not None:
            event = self._taken(entry)
            if event is not None:
                return event
        raise _ended()

    def _taken(self, entry: Entry) -> Event | None:
        """The event of an entry; None where it is about a task that was no longer the client's."""
        self._now = max(self._now, entry.now)
        if entry.kind == "timer":
            return event_of(entry)
        key = entry.payload["client"], entry.payload["version"]
        if self.names.get(key) != entry.payload["task"]:
            return None
        named = (np.array([part], np.int64) for part in key)
        if entry.kind == "arrived":
            self.sent.announce(*named)
        elif not self.sent.is_announced(key):
            self.sent.end(*named)
            del self.names[key]
        return event_of(entry)

    def cancel(self) -> None:
        super().cancel()
        self.names.clear()


class Replay(Simulation):
    """The simulation that repeats a run of a coordinator.

    Args:
        config: of the run; entries: its whole journal.
    """

    def __init__(self, config: Config, entries: Iterable[Entry]) -> None:
        super().__init__(config_from(config, {"engine": {"name": "loop"}}))
        self.engine: ReplayEngine = ReplayEngine(self.engine, entries)
        self.federation.engine = self.engine
        self.federation.sample = lambda window, draw, count, busy: self.engine.draw()

    def _round(self, phases: dict[str, float]) -> dict[str, object]:
        self.engine.open_window()
        return super()._round(phases)


def read_journal(path: Path) -> list[Entry]:
    """The entries of ``journal.jsonl``.

    Raises:
        RunFailed: FS-RUN-022, it is not there or damaged.
    """
    try:
        return [entry_of(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise RunFailed(
            "the journal cannot be read",
            code="FS-RUN-022",
            where=str(path),
            why=str(error),
            hint="only runs of a coordinator have one; copy its whole run folder",
        ) from error


def _ended() -> RunFailed:
    return RunFailed(
        "the journal ends before the run does",
        code="FS-RUN-022",
        why="the run was stopped, or its folder was copied while it ran",
        hint="replay a run that has ended",
    )
