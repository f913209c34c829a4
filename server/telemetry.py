"""What a coordinator counts and measures, for ``/metrics``: one registry, names that stay.

Every label has a bounded number of values, whatever nodes, runs and plugins are called: words that are
not on a list become ``other``, and runs beyond the latest 64 lose their lines. Nodes are no label.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
OTHER = "other"
PHASES = ("wait", "collect", "aggregate", "evaluate", "commit")
OUTCOMES = ("answered", "failed", "expired", "cancelled", "late")
VERDICTS = ("accepted", "duplicate", "late", "rejected", "retry")
REASONS = ("", "schema", "non_finite", "weight", "norm", "digest", "not_leased", "policy", "signature")
DIRECTIONS = ("down", "up")
KINDS = ("message", "update", "state", "artifact")
STATES = ("online", "approved", "pending", "revoked")
MOST_RUNS = 64
MOST_STRATEGIES = 64

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROUND_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0, 86_400.0)
_LAG_EVERY = 0.5  # seconds between two samples
_LAG_KEPT = 20  # samples whose worst is shown: a stall stays visible until the next scrape


class Telemetry:
    """The instruments of one coordinator; every method may be called from any thread and returns at once.

    Args:
        state: folder whose file system is watched for space.
    """

    def __init__(self, state: Path | None = None) -> None:
        # A second line for every counter that nobody reads; the package leaves this function untyped.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, None] = OrderedDict()
        self._strategies: set[str] = set()
        own = self.registry
        self._nodes = Gauge("fedsim_nodes", "Nodes by state.", ["state"], registry=own)
        self._round = Gauge("fedsim_round", "Last round that is committed.", ["run"], registry=own)
        self._round_seconds = Histogram(
            "fedsim_round_seconds",
            "Duration of a part of a round.",
            ["phase"],
            buckets=_ROUND_SECONDS,
            registry=own,
        )
        self._tasks = Counter("fedsim_tasks", "Tasks by their end.", ["outcome"], registry=own)
        self._updates = Counter("fedsim_updates", "Answers by verdict.", ["verdict", "reason"], registry=own)
        self._bytes = Counter(
            "fedsim_bytes", "Bytes of objects on the wire.", ["direction", "kind"], registry=own
        )
        self._resumes = Counter("fedsim_upload_resumes", "Uploads that went on from an offset.", registry=own)
        self._expired = Counter("fedsim_lease_expired", "Leases that ended without an answer.", registry=own)
        self._aggregate = Histogram(
            "fedsim_aggregate_seconds",
            "Duration of an aggregation.",
            ["strategy"],
            buckets=_SECONDS,
            registry=own,
        )
        self._validate = Histogram(
            "fedsim_validate_seconds", "Duration of the checks of one update.", buckets=_SECONDS, registry=own
        )
        self._epsilon = Gauge("fedsim_epsilon", "Privacy spent by a run.", ["run"], registry=own)
        self._commit = Histogram(
            "fedsim_db_commit_seconds",
            "Duration of a commit of the database.",
            buckets=_SECONDS,
            registry=own,
        )
        self._free = Gauge("fedsim_disk_free_bytes", "Free bytes of the state folder's disk.", registry=own)
        self._lag = Gauge(
            "fedsim_event_loop_lag_seconds", "Worst lateness of the loop of late.", registry=own
        )
        self._dropped = Counter("fedsim_watchers_dropped", "Watchers that read too slowly.", registry=own)
        if state is not None:
            self._free.set_function(lambda: float(shutil.disk_usage(state).free))

    def nodes(self, counts: Mapping[str, int]) -> None:
        """How many nodes are in each of `STATES`; a state that is not named has none."""
        for state in STATES:
            self._nodes.labels(state).set(counts.get(state, 0))

    def round(self, run: str, number: int) -> None:
        """Run `run` (its name) has committed round `number`."""
        with self._lock:
            self._round.labels(self._run(run)).set(number)

    def phase(self, phase: str, seconds: float) -> None:
        """A part of a round, one of `PHASES`, took so long."""
        self._round_seconds.labels(_word(phase, PHASES)).observe(seconds)

    def epsilon(self, run: str, value: float) -> None:
        """The privacy that run `run` has spent."""
        with self._lock:
            self._epsilon.labels(self._run(run)).set(value)

    def forget_run(self, run: str) -> None:
        """The run is over: its lines go."""
        with self._lock:
            self._drop(_label(run))

    def task(self, outcome: str, count: int = 1) -> None:
        """Tasks came to an end, one of `OUTCOMES`."""
        self._tasks.labels(_word(outcome, OUTCOMES)).inc(count)

    def update(self, verdict: str, reason: str = "") -> None:
        """An answer got its verdict, one of `VERDICTS`, for a reason, one of `REASONS`."""
        self._updates.labels(_word(verdict.lower(), VERDICTS), _word(reason, REASONS)).inc()

    def moved(self, direction: str, kind: str, size: int) -> None:
        """Bytes of an object went ``down`` to a node or came ``up`` from it; see `KINDS`."""
        self._bytes.labels(_word(direction, DIRECTIONS), _word(kind, KINDS)).inc(size)

    def upload_resumed(self) -> None:
        """An upload went on from an offset above zero."""
        self._resumes.inc()

    def lease_expired(self) -> None:
        """A lease ended without an answer."""
        self._expired.inc()

    def aggregated(self, strategy: str, seconds: float) -> None:
        """A strategy made a new model out of its updates."""
        with self._lock:
            name = _label(strategy)
            if name not in self._strategies and len(self._strategies) >= MOST_STRATEGIES:
                name = OTHER
            self._strategies.add(name)
        self._aggregate.labels(name).observe(seconds)

    def validated(self, seconds: float) -> None:
        """One update was checked."""
        self._validate.observe(seconds)

    def committed(self, seconds: float) -> None:
        """The database committed one group of operations."""
        self._commit.observe(seconds)

    def watcher_dropped(self) -> None:
        """A watcher was cut because it read too slowly."""
        self._dropped.inc()

    def render(self) -> bytes:
        """Everything in the text format of Prometheus, see `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    async def sample_lag(self) -> None:
        """Measure for ever how late the event loop wakes; cancel it to end it."""
        loop = asyncio.get_running_loop()
        late: list[float] = []
        while True:
            due = loop.time() + _LAG_EVERY
            await asyncio.sleep(_LAG_EVERY)
            late = [*late[1 - _LAG_KEPT :], max(0.0, loop.time() - due)]
            self._lag.set(max(late))

    def _run(self, run: str) -> str:
        """The label of a run; the one that was quiet for longest makes room for a new one."""
        name = _label(run)
        self._runs[name] = None
        self._runs.move_to_end(name)
        while len(self._runs) > MOST_RUNS:
            self._drop(next(iter(self._runs)))
        return name

    def _drop(self, name: str) -> None:
        self._runs.pop(name, None)
        for gauge in (self._round, self._epsilon):
            gauge.remove_by_labels({"run": name})


def describe_verdict(verdict: int) -> str:
    """The label of a verdict of the wire."""
    return VERDICTS[verdict - 1] if 1 <= verdict <= len(VERDICTS) else OTHER


def _word(word: str, known: tuple[str, ...]) -> str:
    return word if word in known else OTHER


def _label(name: str) -> str:
    """A name that somebody chose, short and without surprises for whoever reads the page."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name[:64]) or OTHER
