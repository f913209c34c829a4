"""The thread of one run: taken up from the ledger, window by window, to its end.

Each window is committed in this order: lines into the run folder, the state into a file of its own, then
one row of the ledger which names that file. A crash anywhere leaves the window before it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from sqlalchemy import Connection

from fedsim.errors import FedsimError, RunFailed
from fedsim.federated_run import Record
from fedsim.journal import Entry, Playback
from fedsim.pb import federation_pb2 as pb
from fedsim.printable import printable
from fedsim.progress import Progress, progress_of, target_of
from fedsim.runs.folder import RunFolder
from fedsim.runs.log import line_of
from fedsim.server import run_folder, run_state
from fedsim.server.answers import answer_of
from fedsim.server.board import Board
from fedsim.server.failpoints import reached
from fedsim.server.ledger_errors import StorageFull
from fedsim.server.leftovers import Leftovers
from fedsim.server.logs import fields
from fedsim.server.members import Members
from fedsim.server.planning import Planner
from fedsim.server.remote import Past, RemoteEngine
from fedsim.server.run_ledger import FINISHED, FOR_GOOD, STOPPING, Forgotten, RunLedger, Stop, Window
from fedsim.server.run_state import Saved
from fedsim.server.segments import Segments
from fedsim.server.server_run import ServerRun
from fedsim.server.tables import runs
from fedsim.storage import sha256

log = logging.getLogger(__name__)

KEEP = 2  # states that a run can be taken up from
NO_SPACE = "storage: no space left"
"""How the detail of a run begins that paused because a disk was full."""


class RunThread(threading.Thread):
    """Runs one run; `engine` is there once it is `ready`.

    Args:
        run: built, not yet joined; folder: its run folder.
        planner: makes its tasks.
        leftovers: removes what it needs no more.
        on_ready: called with this thread once clients can be asked, and answers taken; on_end: at its end.
        on_change: called when watchers can be told something; on_window: with each committed
            record and the seconds of its phases.
    """

    def __init__(
        self,
        run: ServerRun,
        folder: RunFolder,
        *,
        ledger: RunLedger,
        board: Board,
        planner: Planner,
        members: Members,
        segments: Segments,
        leftovers: Leftovers,
        on_ready: Callable[[RunThread], None],
        on_end: Callable[[RunThread], None],
        on_change: Callable[[], None],
        on_window: Callable[[Record, Mapping[str, float]], None],
    ) -> None:
        super().__init__(name=f"run-{ledger.run_id}", daemon=True)
        self.run_parts, self.folder = run, folder
        self.ledger, self.board, self.planner = ledger, board, planner
        self.members, self.segments, self.leftovers = members, segments, leftovers
        self.on_ready, self.on_end = on_ready, on_end
        self.on_change, self.on_window = on_change, on_window
        self.engine: RemoteEngine
        self.progress: Progress = progress_of(run.config, run.evaluator.names)
        self.ending: Stop | None = None  # after the open round
        self.last_record: Record | None = None
        self.ended_as = ""  # state of the run, once the thread has ended
        self.out_of_space = False  # then
        self._halt: Stop | None = None  # at once
        self._archived = 0
        self._waited = 0.0  # seconds for clients, since the last window
        self._forget = 0  # entries up to here are in the state before the last
        self._over = "running"  # how the run ended, where only its folder was not complete
        self._moved = (0, 0)  # bytes down and up since the last checkpoint
        self._previous: Window | None = None
        self._flying: frozenset[bytes] = frozenset()  # tasks under way at the last checkpoint
        self._states: deque[str] = deque()  # files of checkpoints that are older than the last

    # ------------------------------------------------------------ from other threads

    def halt(self, state: str, detail: str = "") -> None:
        """Stop at once, in the middle of a round; the round goes on when the run is taken up again."""
        self._halt = Stop(state, detail)
        if hasattr(self, "engine"):
            self.engine.stop(self._halt)

    def end_after_round(self, state: str, detail: str = "") -> None:
        """Stop once the open round is committed."""
        self.ending = Stop(state, detail)

    # ------------------------------------------------------------ the thread

    def run(self) -> None:
        fedsim_log = logging.getLogger("fedsim")
        try:
            handler = self.folder.log_handler()
        except FedsimError as error:
            self._end("paused", f"storage: {error.what}")
            return
        handler.addFilter(self._concerns)
        fedsim_log.addHandler(handler)
        state, detail = "paused", ""
        try:
            state, detail = self._to_its_end()
        except Stop as stop:
            state, detail = stop.state, stop.detail
        except StorageFull as error:
            state, detail = "paused", f"storage: {error.what}"
        except RunFailed as error:
            state, detail = "failed", f"{error.code}: {error.what}" + (f"; {error.why}" if error.why else "")
        except FedsimError as error:
            storage = error.code.startswith(("FS-ENV", "FS-LED"))
            state, detail = "paused", f"{'storage' if storage else error.code}: {error.what}"
        except Exception as error:
            log.exception("the round failed by a mistake in a plugin or in fedsim", extra=self._about())
            state, detail = "paused", f"error: {type(error).__name__}: {error}"
        finally:
            why = f": {printable(detail)}" if detail else ""
            log.info("the run is %s%s", state, why, extra=self._about())
            fedsim_log.removeHandler(handler)
            handler.close()
        self._close(state, detail)

    def _to_its_end(self) -> tuple[str, str]:
        run = self.run_parts
        met = target_of(run.config)
        patience = run.config.evaluation.early_stop
        self._take_up()
        self.on_ready(self)
        self._say("running", "")
        if self._over != "running":
            return self._over, ""
        if self.ending is not None:
            raise self.ending
        for record in self._rounds():
            improved = self.progress.improved(record, run.evaluator.names)
            if improved:
                self.folder.save_model(run.model_tensors(copy=False), "best")
            outcome = "ok" if run.finished and record["outcome"] != "failed" else "running"
            if record["outcome"] != "failed" and met(record):
                outcome = "target"
            elif patience is not None and self.progress.rounds_since_best >= patience:
                outcome = "early_stop"
            self._commit(record, outcome)
            if outcome != "running":
                return outcome, ""
            if self.ending is not None:
                raise self.ending
        return "ok", ""

    def _rounds(self) -> Iterator[Record]:
        """The records that are left; waits for clients before each window of a synchronous run."""
        run = self.run_parts
        while True:
            if run.started and not run.finished:
                self._wait_for_clients()
            try:
                yield next(self._records)
            except StopIteration:
                return

    def _wait_for_clients(self) -> None:
        """Until as many clients are there as the round needs.

        Raises:
            RunFailed: FS-RUN-020, they did not come in time.
        """
        playback = self.engine.playback
        if playback.decisions or playback.events or (not self.run_parts.synchronous and self.engine.tasks):
            return
        seconds = self.run_parts.config.deployment.wait
        until = time.monotonic() + seconds
        there, shown = self.members.enlist(), -1
        while there < (wanted := self._wanted):
            if self._halt is not None:
                raise self._halt
            if self.ending is not None:
                raise self.ending
            if there != shown:
                self._say("running", f"waiting for clients: {there} of {wanted} are there")
                shown = there
            if time.monotonic() >= until:
                raise RunFailed(
                    "not enough clients",
                    code="FS-RUN-020",
                    where=f"round {self.run_parts.federation.state.round_index + 1}",
                    why=f"not_enough_clients: {there} of {wanted} were there after {seconds:g} s",
                    hint="start more clients and fedsim continue RUN, or lower [deployment] min_clients",
                )
            began = time.perf_counter()
            self.members.wait(min(1.0, max(0.01, until - time.monotonic())))
            self._waited += time.perf_counter() - began
            there = self.members.enlist()
        if shown >= 0:
            self._say("running", "")

    @property
    def _wanted(self) -> int:
        """Clients without which no round opens; who is shut out does not hold the others up by itself."""
        asked = self.run_parts.config.deployment.min_clients
        return asked or max(1, min(self.run_parts.cohort, self.members.possible))

    # ------------------------------------------------------------ taking up

    def _take_up(self) -> None:
        """The run as its last sound checkpoint and the journal since have it."""
        run = self.run_parts
        run.rows.folder = self.folder.state_folder / "rows"
        run.rows.folder.parent.mkdir(exist_ok=True)
        committed = self.ledger.committed(KEEP)
        window = self._sound(committed)
        state, saved = (None, Saved({}, [], 0, 0, 0, {})) if window is None else self._load(window)
        entries = self.ledger.entries(saved.decision_seq, saved.event_seq)
        answers, over = {}, set()
        rows = self.ledger.task_rows()
        for row in rows:
            if row["verdict"] == pb.ACCEPTED:
                answers[row["task_id"]] = answer_of(row)
            elif row["state"] != "open":
                over.add(row["task_id"])
        past = Past(
            Playback(entries),
            answers,
            over,
            0.0 if window is None else window.clock,
            saved.decision_seq,
            saved.event_seq,
        )
        self.engine = RemoteEngine(
            ledger=self.ledger,
            board=self.board,
            planner=self.planner,
            spec=run.spec,
            device=run.place.clients.device,
            counts=run.counts,
            past=past,
            together=run.synchronous and run.config.round.overcommit == 1.0,
        )
        run.join(self.engine, self.members)
        if state is not None:
            run.started = True
            run.failed_in_a_row = saved.failed_in_a_row
            run.federation.state = state
            self.progress = replace(self.progress, **saved.progress)
            if not run.synchronous:
                self._take_up_flight(saved, rows)
        self._close_strays(rows, saved, entries)
        run_folder.cut_back(self.folder, saved.folder, self.ledger.records())
        self._archived = run_folder.journalled(self.folder)
        self._forget = min(saved.decision_seq, saved.event_seq)
        self._over = saved.outcome
        self._previous = window
        self._states = deque(w.state_name for w in reversed(committed) if w is not window)
        self._records: Iterator[Record] = iter(run)
        run.forget_start()
        if window is not None and window.outcome == "failed":
            run.after_failure(RunFailed("the last round failed", code="FS-RUN-021"))
        if entries:
            log.info("taken up, %d entries of the journal again", len(entries), extra=self._about())
        if self._halt is not None:  # not before: what ends here is the run as it was left
            raise self._halt

    def _sound(self, committed: list[Window]) -> Window | None:
        """The newest window whose state is intact; the one before where the disk damaged it."""
        for position, window in enumerate(committed):
            path = self.folder.state_folder / window.state_name
            if path.exists() and bytes.fromhex(sha256(path)) == window.state_digest:
                if position and self.run_parts.strategy.traits.server_vectors_per_client:
                    break  # the rows of the state before may have been overwritten since
                if position:
                    self.ledger.database.writer.run(partial(self.ledger.go_back, last=window))
                return window
            log.error("the state %s is damaged or missing", window.state_name, extra=self._about())
        if committed:
            raise Stop("paused", "damaged: no state of the run is intact; restore the state folder")
        return None

    def _load(self, window: Window) -> tuple[Any, Saved]:
        return run_state.load(self.run_parts, self.folder.state_folder / window.state_name)

    def _take_up_flight(self, saved: Saved, rows: list[Any]) -> None:
        """Tasks that clients work on while versions come and go."""
        wanted = set(saved.flying)
        latest = {(r["client"], r["version"]): r for r in rows if (r["client"], r["version"]) in wanted}
        flying = [key for key in saved.flying if key in latest]
        federation = self.run_parts.federation
        messages, planned = self.planner.taken_up(
            [latest[key] for key in flying], last=self.run_parts.counts.last
        )
        pairs = np.array(flying, np.int64).reshape(-1, 2)
        federation.restore(federation.state, pairs[:, 0], pairs[:, 1], messages)
        self.engine.adopt(planned)

    def _close_strays(self, rows: list[Any], saved: Saved, entries: list[Entry]) -> None:
        """Tasks that the journal does not come to again: their answers were refused before the checkpoint."""
        self._flying = frozenset(task.task_id for task in self.engine.tasks.values())
        again = {name for e in entries if e.kind == "dispatch" for name in e.payload["tasks"]}
        flying = set(saved.flying)
        self.engine.cancelled = [
            row["task_id"]
            for row in rows
            if row["state"] == "open"
            and row["folded_in"] is None
            and row["task_id"].hex() not in again
            and (row["client"], row["version"]) not in flying
        ]

    # ------------------------------------------------------------ committing

    def _commit(self, record: Record, outcome: str) -> None:
        """Make the window durable: by itself in a synchronous run, else by the journal until a checkpoint."""
        run, folder = self.run_parts, self.folder
        began = time.perf_counter()
        reached("before_lines")
        folder.append_record(record)
        self._moved = self._moved[0] + record["bytes_down"], self._moved[1] + record["bytes_up"]
        if run.config.output.clients and (lines := run.last_lines) is not None:
            folder.append_clients(lines)
        every = run.config.deployment.checkpoint_every
        due = run.synchronous or outcome != "running" or self.ending is not None
        if due or record["round"] == 0 or run.federation.state.version % every == 0:
            self._checkpoint(record, outcome)
        else:
            self.ledger.database.writer.submit(lambda c: self.ledger.tell(c, "round", record))
        self.engine.done()
        self.last_record = record
        phases = record["time"]["phases"] | {"wait": self._waited, "commit": time.perf_counter() - began}
        seconds = record["time"]["seconds"] + self._waited + phases["commit"]
        about = fields(run=self.ledger.run_id, round=record["round"], dur_ms=round(1e3 * seconds, 3))
        log.info("committed: %s", line_of(record), extra=about)
        self.on_window(record, phases)
        self._waited = 0.0
        self.on_change()
        done, spacing = record["round"], run.config.output.checkpoint_every
        if spacing and done and done % spacing == 0 and record["outcome"] != "failed":
            folder.save_model(run.model_tensors(copy=False), f"round-{done:05d}")

    def _checkpoint(self, record: Record, outcome: str) -> None:
        run, engine, folder = self.run_parts, self.engine, self.folder
        fresh = self.ledger.entries(self._archived, self._archived)
        run_folder.append_journal(folder, fresh)
        ids, versions = run.federation.in_flight
        progress = {
            "best": self.progress.best,
            "final": self.progress.final,
            "rounds_since_best": self.progress.rounds_since_best,
        }
        saved = Saved(
            progress,
            list(zip(ids.tolist(), versions.tolist(), strict=True)),
            engine.decision_seq,
            engine.event_seq,
            run.failed_in_a_row,
            run_folder.lengths(folder),
            outcome,
        )
        reached("after_lines")
        index = record["round"] - 1
        attempt = engine.attempt if index >= 0 else 0
        name = f"{index + 1:06d}-{attempt}.safetensors"
        made = run_state.save(run, folder.state_folder / name, saved)
        state = run.federation.state
        row = Window(
            index, attempt, state.version, record["outcome"], json.dumps(record), name, made.digest,
            engine.decision_seq, engine.now,
        )  # fmt: skip
        previous, flying, forget, moved = self._previous, self._flying, self._forget, self._moved

        def commit(connection: Connection) -> Forgotten:
            return self.ledger.commit(
                connection,
                row,
                folded=engine.folded,
                cancelled=engine.cancelled,
                previous=previous,
                in_flight=flying,
                forget_before=forget,
                progress={"bytes_down": runs.c.bytes_down + moved[0], "bytes_up": runs.c.bytes_up + moved[1]},
            )

        reached("after_state")
        gone = self.ledger.database.writer.run(commit)
        reached("after_commit")
        run.rows.pin()
        engine.folded, engine.cancelled = [], []
        self._moved = (0, 0)
        self._archived = fresh[-1].seq if fresh else self._archived
        self._forget = min(engine.decision_seq, engine.event_seq)
        self._clear_away(gone, previous)
        self._previous = row
        pairs = zip(ids.tolist(), versions.tolist(), strict=True)
        self._flying = frozenset(engine.tasks[pair].task_id for pair in pairs if pair in engine.tasks)
        reached("after_clearing")

    def _clear_away(self, gone: Forgotten, previous: Window | None) -> None:
        """Files that a return to the checkpoint before would not need."""
        awaited = set(self.run_parts.federation.in_flight[1].tolist())
        self.leftovers.clear(Forgotten(gone.tasks, [*gone.objects, *self.planner.keep(awaited)]))
        if previous is None:
            return
        needed = previous.window
        if not self.run_parts.synchronous:
            # An answer may wait for many versions until it is its turn.
            needed = self.ledger.oldest_segment(needed)
        for segment in self.segments.present():
            if segment.run_id == self.ledger.run_id and segment.window < needed:
                self.segments.remove(segment)
        self._states.append(previous.state_name)
        while len(self._states) > KEEP - 1:
            (self.folder.state_folder / self._states.popleft()).unlink(missing_ok=True)

    def _close(self, state: str, detail: str) -> None:
        """The last words: state of the run, and where it is over, its folder complete."""
        try:
            if state in FINISHED:
                self._finish(state, detail)
        except FedsimError as error:
            state, detail = "paused", f"storage: {error.what}"
        except Exception:
            log.exception("the run folder could not be completed", extra=self._about())
        if hasattr(self, "engine"):
            self.engine.close()
        self._end(state, detail)

    def _end(self, state: str, detail: str) -> None:
        self.ended_as = state
        self.out_of_space = state == "paused" and detail.startswith(NO_SPACE)
        gone = self._say(state, detail)
        if gone is not None:
            if state in FINISHED:
                reached("after_end")
            made = self.planner.keep(set())
            self.leftovers.run_over(self.ledger.run_id, state, Forgotten(gone.tasks, [*gone.objects, *made]))
        self.on_end(self)

    def _finish(self, state: str, detail: str) -> None:
        reached("before_finish")
        if not self.run_parts.synchronous and hasattr(self, "_records"):
            # Versions since the last checkpoint are in the ledger's journal alone.
            run_folder.append_journal(self.folder, self.ledger.entries(self._archived, self._archived))
        run_folder.complete(self.folder, self.run_parts, self.progress, state, detail)

    def _say(self, state: str, detail: str) -> Forgotten | None:
        """Tell whoever watches; a ledger that cannot be written keeps its last word.

        Returns:
            What the ledger stopped naming; None where it could not be written.
        """

        def say(connection: Connection) -> Forgotten:
            ends = state == "running" and self.ending is not None
            self.ledger.set_state(connection, *(STOPPING if ends else (state, detail)))
            return self.ledger.drop_bytes(connection) if state in FOR_GOOD else Forgotten()

        gone = None
        try:
            gone = self.ledger.database.writer.run(say)
        except FedsimError as error:
            log.error("the run is %s (%s): %s", state, printable(detail), error.what, extra=self._about())
        self.on_change()
        return gone

    def _about(self) -> dict[str, object]:
        """This run and its last round, for the fields of a line in the log."""
        last = self.last_record
        return fields(run=self.ledger.run_id, round=None if last is None else last["round"])

    def _concerns(self, record: logging.LogRecord) -> bool:
        """Whether a line belongs into this run's ``log.txt``."""
        return record.thread == self.ident or getattr(record, "run", None) == self.ledger.run_id
