"""All runs of a coordinator: taken up, submitted, paused, stopped; and where their tasks and answers go."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from fedsim.config import from_dict, resolve, to_toml
from fedsim.errors import ConfigError, FedsimError
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.runs.folder import RunFolder
from fedsim.server.board import OPEN, Board, OpenTask, RunFacts, UpdateLimits
from fedsim.server.database import Database
from fedsim.server.desk import Decision, Desk, Place
from fedsim.server.leftovers import Leftovers
from fedsim.server.logs import fields
from fedsim.server.members import Candidate, Members
from fedsim.server.objects import Objects
from fedsim.server.planning import Planner
from fedsim.server.run_ledger import FINISHED, FOR_GOOD, Forgotten, RunLedger
from fedsim.server.run_table import RunTable, described
from fedsim.server.run_thread import NO_SPACE, RunThread
from fedsim.server.segments import Segments
from fedsim.server.server_run import ServerRun, server_config
from fedsim.server.tables import runs, submissions, tasks
from fedsim.server.uploads import Uploads
from fedsim.wire import client_config

log = logging.getLogger(__name__)

PAUSED_RETRY_SECONDS = 5.0
SWEEP_SECONDS = 1.0
MAX_RECOVERIES = 5
SPACE_SECONDS = 3.0, 60.0
"""Between two tries to go on with a run that found the disk full: at first, and at most."""

OnWindow = Callable[[ServerRun, str, dict[str, Any], Mapping[str, float]], None]
"""(run, its name, record, seconds of each phase): a window was committed."""


class Runs:
    """Thread-safe; the service and operators call it.

    Args:
        database, objects, segments, uploads: of the coordinator.
        state: its folder; run folders lie in ``runs/`` below it.
        key: of the server, which signs tasks.
        candidates: (label expression, node ids) -> those of them that are approved clients and fit.
        inline_bytes: bundles up to this size travel inside offers.
        lease_seconds: after which a task is given up whose node never came for it.
    """

    def __init__(
        self,
        database: Database,
        objects: Objects,
        segments: Segments,
        uploads: Uploads,
        state: Path,
        key: Key,
        *,
        candidates: Callable[[str, frozenset[str]], list[Candidate]],
        inline_bytes: int,
        lease_seconds: float,
    ) -> None:
        self.database, self.objects, self.segments = database, objects, segments
        self.leftovers = Leftovers(database, objects, segments, uploads)
        self._table = RunTable(database)
        self.runs_folder = state / "runs"
        self.board = Board(key)
        self.on_events: Callable[[], None] = lambda: None
        self.on_window: OnWindow = lambda run, name, record, phases: None
        self.on_over: Callable[[str], None] = lambda name: None  # no run of this name goes on
        self._candidates = candidates
        self._inline_bytes, self._lease_seconds = inline_bytes, lease_seconds
        self._door = threading.RLock()
        self._threads: dict[str, RunThread] = {}
        self._desks: dict[str, Desk] = {}
        self._nodes = threading.Lock()  # between what is said of nodes and a run that begins
        self._online: frozenset[str] = frozenset()
        self._revoked: set[str] = set()
        self._seen: dict[str, float] = {}  # node -> when it was last known to be there, monotonic
        self._began = time.monotonic()
        self._full: dict[str, tuple[float, float]] = {}  # run -> when it is tried again, and the wait before
        self._closing = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="tasks-sweeper", daemon=True)

    # ------------------------------------------------------------ for the service of nodes

    @property
    def on_offers(self) -> Callable[[], None]:
        """Called from any thread when tasks may be taken."""
        return self.board.on_offers

    @on_offers.setter
    def on_offers(self, callback: Callable[[], None]) -> None:
        self.board.on_offers = callback

    def offer(self, node_id: str) -> OpenTask | None:
        """The task that this node should do now; the same one again while it is open."""
        return self.board.next_for(node_id)

    def task(self, task_id: bytes) -> OpenTask | None:
        """A task that is open, or whose window is."""
        return self.board.task(task_id)

    def cancelled(self, task_id: bytes) -> bool:
        """Whether an answer to this task would not count any more."""
        task = self.board.task(task_id)
        return task is None or task.status != OPEN

    def fetchable(self, node_id: str, digest: bytes) -> bytes | Path | None:
        """What a digest stands for in a live task of this node."""
        return self.board.fetchable(node_id, digest)

    def accept(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, place: Place
    ) -> Future[Decision]:
        """A valid update; durable before the future is done."""
        desk = self._desks.get(task.run_id)
        return _done(self._closed_run()) if desk is None else desk.accept(task, body, request, place)

    def reject(
        self, task: OpenTask, body: pb.SubmitBody, request: pb.SubmitRequest, reason: str, text: str
    ) -> Future[Decision]:
        """An update that must not count."""
        desk = self._desks.get(task.run_id)
        return _done(self._closed_run()) if desk is None else desk.reject(task, body, request, reason, text)

    def fail(self, task: OpenTask, code: str, text: str) -> Future[Decision]:
        """The client could not do the task."""
        desk = self._desks.get(task.run_id)
        reason = f"{code}: {text}" if text else code
        return _done(self._closed_run()) if desk is None else desk.fail(task, reason)

    def expired(self, task_id: bytes) -> None:
        """The lease of a task is over."""
        task = self.board.task(task_id)
        desk = None if task is None else self._desks.get(task.run_id)
        if task is not None and desk is not None and task.status == OPEN and desk.expired(task) is None:
            self.board.on_offers()

    def earlier(self, node_id: str, body: pb.SubmitBody) -> Decision | None:
        """What a submission is answered whose task is not open; None where this node has no such task."""
        with self.database.read() as connection:
            row = connection.execute(
                select(
                    tasks.c.state, tasks.c.run_id, tasks.c.client, submissions.c.verdict, submissions.c.reason
                )
                .select_from(tasks.outerjoin(submissions, tasks.c.task_id == submissions.c.task_id))
                .where(tasks.c.task_id == body.task_id)
            ).first()
        if row is None:
            return None  # long over, or a guess
        state, run_id, client, verdict, reason = row
        thread = self._threads.get(run_id)
        if thread is not None and thread.members.client_of(node_id) != client:
            return None
        if verdict is not None:
            return Decision(pb.DUPLICATE, reason, "the task was answered before", first=verdict)
        if state == "open" and run_id not in self._desks and self._table.state_of(run_id) not in FINISHED:
            return self._closed_run()
        return Decision(pb.LATE, "late", "the round closed without this answer")

    def forget_objects(self, digests: Sequence[bytes]) -> None:
        """Remove those that no row names; waits for the disk."""
        self.leftovers.clear(Forgotten(objects=digests))

    def set_online(self, node_ids: frozenset[str]) -> None:
        """These nodes are there."""
        now = time.monotonic()
        for node in self._online | node_ids:
            self._seen[node] = now
        with self._nodes:
            self._online = node_ids
            for thread in list(self._threads.values()):
                thread.members.set_online(node_ids)

    def revoke(self, node_id: str) -> None:
        """This node takes no part any more; its answers in open windows do not count."""
        with self._nodes:
            self._revoked.add(node_id)
            for thread in list(self._threads.values()):
                thread.members.revoke(node_id)
        for desk in list(self._desks.values()):
            desk.withdraw_those(node_id.__eq__)

    # ------------------------------------------------------------ for operators

    def submit(self, config_toml: str, name: str, run_key: str, nodes: str) -> pb.Run:
        """Start a run; the same key and content is the same run.

        Raises:
            ConfigError: the configuration cannot be run; FS-SRV-052, the key belongs to another run.
        """
        content = hashlib.sha256("\0".join((config_toml, name, nodes)).encode()).digest()
        known = self._known(run_key, content)
        # Data and model may take seconds, in which other runs go on.
        run = None if known else ServerRun(_config_of(config_toml))
        with self._door:
            known = known or self._known(run_key, content)
            if known or run is None:
                return self.get(known)
            run_id = secrets.token_hex(6)
            title = name or run.config.run.name or f"{run.config.strategy.name}-{run.data.dataset.name}"
            folder = RunFolder.create(
                self.runs_folder,
                title,
                config_text=to_toml(run.config),
                facts={**run.facts, "baseline": None, "run_id": run_id},
                command=["fedsim", "run", "--engine", "server"],
            )
            row = {
                "run_id": run_id, "name": title, "run_key": run_key or None, "content_digest": content,
                "config": to_toml(run.config), "nodes": nodes, "state": "running", "created": time.time(),
                "folder": folder.path.name,
            }  # fmt: skip
            self.database.writer.run(lambda connection: connection.execute(insert(runs), row).rowcount)
            self._start(run, run_id, title, nodes, folder)
        return self.get(run_id)

    def _known(self, run_key: str, content: bytes) -> str:
        """The run that was submitted under this key, "" for none."""
        known = self._table.by_key(run_key) if run_key else None
        if known is None:
            return ""
        if known.content_digest != content:
            raise ConfigError(
                "this run key belongs to another run",
                code="FS-SRV-052",
                where=f"run key {run_key!r}",
                why=f"run {known.run_id} was submitted under it with another configuration",
                hint="submit under another key",
            )
        return str(known.run_id)

    def list(self) -> Sequence[pb.Run]:
        """All runs, oldest first."""
        return [described(row, self._threads.get(row.run_id)) for row in self._table.all()]

    def get(self, run: str) -> pb.Run:
        """One run by its identifier, the beginning of it, or its name.

        Raises:
            NoSuchRun: none, or several.
        """
        row = self._table.find(run)
        return described(row, self._threads.get(row.run_id))

    def pause(self, run: str) -> pb.Run:
        """Stop a run at once, to be resumed."""
        row = self._table.find(run)
        self._full.pop(row.run_id, None)
        thread = self._thread(row.run_id)
        if thread is not None:
            thread.halt("paused", "by an operator")
            thread.join()
        return self.get(row.run_id)

    def resume(self, run: str) -> pb.Run:
        """Go on with a run that is paused, stopped or failed; one that came to its end stays as it is."""
        run_id = self._table.find(run).run_id
        self._thread(run_id)
        with self._door:
            row = self._table.find(run_id)
            if row.run_id not in self._threads and row.state not in FOR_GOOD:
                self._set_state(row.run_id, "running", "taken up")
                self._take_up(row)
        return self.get(row.run_id)

    def stop(self, run: str, now: bool) -> pb.Run:
        """End a run, after its open round or at once."""
        run_id = self._table.find(run).run_id
        thread, by = self._thread(run_id), "by an operator"
        if thread is not None:
            if not now:
                thread.end_after_round("stopped", by)
                if self._table.set_stopping(run_id) != "paused":
                    self.on_events()
                    return self.get(run_id)
            thread.halt("stopped", by)  # too late for one that was about to pause
            thread.join()
        row = self._table.find(run_id)
        if row.state not in FINISHED:
            self._set_state(run_id, "stopped", by)
            self.leftovers.run_over(run_id, "stopped", Forgotten())
            self._say_over(row.name)
        return self.get(run_id)

    def events(self, run_id: str, after: int) -> Sequence[pb.Event]:
        """What happened in a run after a revision, oldest first; 1,000 at most."""
        return self._table.events(run_id, after)

    def folder(self, run: str) -> Path:
        """The run folder of a run."""
        return self.runs_folder / str(self._table.find(run).folder)

    # ------------------------------------------------------------ start and end

    def recover(self) -> None:
        """Take up every run that was running when the coordinator ended; start watching over tasks."""
        self._sweeper.start()
        self.leftovers.sweep()
        for row in self._table.all():
            waits_for_space = row.state == "paused" and row.detail.startswith(NO_SPACE)
            if row.state not in ("running", "stopping") and not waits_for_space:
                continue
            if row.recoveries >= MAX_RECOVERIES:
                detail = f"crash_loop: taken up {row.recoveries} times without completing a round"
                self._set_state(row.run_id, "paused", detail)
                continue
            self._table.count_recovery(row.run_id)
            try:
                self._take_up(row)
            except FedsimError as error:
                log.error("the run cannot be taken up: %s", error, extra=fields(run=row.run_id))
                self._set_state(row.run_id, "paused", f"{error.code}: {error.what}")

    def close(self) -> None:
        """Stop every run where it is; a coordinator on the same state goes on there."""
        self._closing.set()
        with self._door:
            threads = list(self._threads.values())
        for thread in threads:
            ending = thread.ending is not None
            thread.halt("stopping" if ending else "running", "the coordinator is down")
        for thread in threads:
            thread.join()
        if self._sweeper.is_alive():
            self._sweeper.join()

    def _take_up(self, row: Any) -> None:
        folder = RunFolder(self.runs_folder / row.folder)
        run = ServerRun(_config_of(row.config))
        folder.add_session(["fedsim", "server"])
        self._start(run, row.run_id, row.name, row.nodes, folder, stopping=row.state == "stopping")

    def _start(
        self, run: ServerRun, run_id: str, name: str, nodes: str, folder: RunFolder, *, stopping: bool = False
    ) -> None:
        ledger = RunLedger(self.database, run_id)
        members = Members(
            self.database, run_id, run.population, lambda online: self._candidates(nodes, online)
        )
        limits = run.config.deployment
        facts = RunFacts(
            run_id,
            name,
            client_config(run.config),
            run.spec.digest,
            run.population,
            UpdateLimits(limits.max_weight, limits.max_norm, limits.over_norm),
            self._inline_bytes,
            self._lease_seconds,
        )
        planner = Planner(
            facts,
            objects=self.objects,
            segments=self.segments,
            node_of=members.node_of,
            layout=run.layout,
            durable=not run.synchronous,
        )
        thread = RunThread(
            run,
            folder,
            ledger=ledger,
            board=self.board,
            planner=planner,
            members=members,
            segments=self.segments,
            leftovers=self.leftovers,
            on_ready=self._ready,
            on_end=self._ended,
            on_change=lambda: self.on_events(),
            on_window=lambda record, phases: self.on_window(run, name, record, phases),
        )
        if stopping:
            thread.end_after_round("stopped", "by an operator")
        with self._nodes:
            self._threads[run_id] = thread
            members.set_online(self._online)
            for node_id in self._revoked:
                members.revoke(node_id)
        thread.start()

    def _ready(self, thread: RunThread) -> None:
        limits = thread.run_parts.config.deployment
        desk = self._desks[thread.ledger.run_id] = Desk(
            thread.engine,
            self.board,
            self.segments,
            max_strikes=limits.max_strikes,
            excluded=thread.members.exclude,
            max_attempts=limits.max_attempts,
            waits=limits.on_expired == "wait",
        )
        # Answers of before whose nodes were revoked while the run paused do not count either.
        thread.engine.on_caught_up = lambda: desk.withdraw_those(thread.members.is_revoked)

    def _ended(self, thread: RunThread) -> None:
        with self._door:
            self._desks.pop(thread.ledger.run_id, None)
            self._threads.pop(thread.ledger.run_id, None)
            if thread.out_of_space:
                self._wait_for_space(thread.ledger.run_id, again=thread.last_record is None)
            else:
                self._full.pop(thread.ledger.run_id, None)
            if thread.ended_as in FINISHED:
                self._say_over(thread.planner.facts.name)

    def _thread(self, run_id: str) -> RunThread | None:
        """The thread of a run that goes on; one whose last word is said already is waited for."""
        with self._door:  # an end is whole: others have been told of it
            thread = self._threads.get(run_id)
        if thread is not None and thread.ended_as:
            thread.join()
            return None
        return thread

    def _say_over(self, name: str) -> None:
        if all(thread.planner.facts.name != name for thread in self._threads.values()):
            self.on_over(name)

    def _wait_for_space(self, run_id: str, *, again: bool) -> None:
        first, most = SPACE_SECONDS
        wait = min(2 * self._full.get(run_id, (0.0, first / 2))[1], most) if again else first
        self._full[run_id] = time.monotonic() + wait, wait

    def _try_for_space(self) -> None:
        """Go on with runs that paused because the disk was full; where it still is, they pause again."""
        now = time.monotonic()
        for run_id in [run for run, (due, _) in list(self._full.items()) if due <= now]:
            with self._door:
                if self._closing.is_set():
                    return
                try:
                    row = self._table.find(run_id)
                    # The ledger itself may have been full: then it still says that the run goes on.
                    if row.state not in ("paused", "running") or run_id in self._threads:
                        self._full.pop(run_id, None)
                        continue
                    self._wait_for_space(run_id, again=True)
                    self.resume(run_id)
                except FedsimError as error:
                    log.warning("the run cannot go on yet: %s", error.what, extra=fields(run=run_id))

    # ------------------------------------------------------------ parts

    def _sweep(self) -> None:
        """Give up tasks whose nodes went away before they came for them."""
        while not self._closing.wait(SWEEP_SECONDS):
            now = time.monotonic()
            for thread in list(self._threads.values()):
                engine = getattr(thread, "engine", None)
                for task in [] if engine is None else list(engine.tasks.values()):
                    if task.status != OPEN or task.node_id in self._online:
                        continue
                    since = max(self._seen.get(task.node_id, self._began), task.offered_at)
                    if now - since > self._lease_seconds:
                        task.offered_at = now
                        self.expired(task.task_id)
            if self._full:
                self._try_for_space()

    def _set_state(self, run_id: str, state: str, detail: str) -> None:
        self._table.set_state(run_id, state, detail)
        self.on_events()

    def _closed_run(self) -> Decision:
        text = "the run is not taking answers now; send it again"
        return Decision(pb.RETRY, "paused", text, delay=PAUSED_RETRY_SECONDS)


def _config_of(text: str) -> Any:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("the configuration is no TOML", code="FS-CFG-131", why=str(error)) from error
    values.pop("expected", None)
    return server_config(resolve(from_dict(values), {}))


def _done(decision: Decision) -> Future[Decision]:
    future: Future[Decision] = Future()
    future.set_result(decision)
    return future
