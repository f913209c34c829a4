"""The one thread that writes the database, many operations in one commit.

A commit waits for the disk, so what was asked while one commit was running goes into the next one
together. Each operation has a savepoint of its own: one that fails undoes only itself. Many small requests
of one kind, one after another, can share statements and a savepoint (`Kind`). What was asked for first is
also committed and announced first.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import groupby
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Engine, RootTransaction

from fedsim.errors import FedsimError
from fedsim.server.ledger_errors import LedgerProblem, StorageFull, closed, trouble
from fedsim.server.writer_jobs import Job, Kept, Kind, Operation

T = TypeVar("T")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
log = logging.getLogger(__name__)

GROUP = 64
"""Operations in one transaction, at most."""
PATIENCE_SECONDS = 30.0
_FIRST_DELAY, _LONGEST_DELAY = 0.05, 2.0


class Syncable(Protocol):
    """A file that a row refers to; it has to be on the disk before the row is."""

    def sync(self) -> None:
        """Force what was written onto the disk, or raise `LedgerProblem`."""


class Writer:
    """Carries out operations in the order in which they were submitted, in a thread of its own.

    Args:
        engine: its ``begin`` event starts a transaction that may write.
        where: the database, for messages; without a password.
        patience_seconds: how long to try again where no transaction can be begun, before what waits is
            refused as `LedgerUnavailable`.
    """

    def __init__(self, engine: Engine, where: str, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._engine = engine
        self._where = where
        self._patience_seconds = patience_seconds
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._closing = threading.Event()
        self._connection: Connection | None = None
        self.on_commit: Callable[[float], None] = lambda seconds: None  # told how long each commit took
        self._syncables: dict[int, Syncable] = {}
        self._thread = threading.Thread(target=self._work, name="ledger-writer", daemon=True)
        self._thread.start()

    def submit(
        self, operation: Callable[[Connection], T], after: Callable[[T], None] | None = None
    ) -> Future[T]:
        """Ask for one operation; it runs in the writer's thread.

        Args:
            operation: executes statements on the connection and returns a value. It neither commits nor
                rolls back. What it raises undoes it alone and is the future's exception.
            after: called with that value in the writer's thread, in order, right after the commit and
                before the future is done. What it raises is logged and becomes the future's exception,
                although the operation is committed.

        Returns:
            The value, once it is durable. `LedgerProblem` where the database was the reason: nothing of
            it is kept, unless ``unknown`` is set.

        Raises:
            LedgerClosed: the writer was closed.
        """
        return self._put(Job(Operation(operation, after), None))

    def submit_item(self, kind: Kind[ItemT, Any, ResultT], item: ItemT) -> Future[ResultT]:
        """Ask for one request of a kind; those of the same `kind` object that wait are carried out together.

        Returns:
            Its result, as of `submit`.

        Raises:
            LedgerClosed: the writer was closed.
        """
        return self._put(Job(kind, item))

    def _put(self, job: Job) -> Future[Any]:
        with self._door:
            if self._closing.is_set():
                raise closed()
            self._jobs.put(job)
        return job.future

    def run(self, operation: Callable[[Connection], T]) -> T:
        """Submit an operation and wait for it; never in an event loop nor in an operation."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the writer's thread would wait for itself: use submit")
        if _in_event_loop():
            raise RuntimeError("Writer.run would stop the event loop: await submit instead")
        return self.submit(operation).result()

    def before_commit(self, syncable: Syncable) -> None:
        """Called by an operation: `syncable` is synced once before its group is committed.

        Where syncing fails the whole group fails, and no row refers to what is not on the disk.
        """
        self._syncables[id(syncable)] = syncable

    def close(self) -> None:
        """Carry out what was submitted before, then end; waits for the thread."""
        with self._door:
            if not self._closing.is_set():
                self._closing.set()
                self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            group = [self._jobs.get()]
            with suppress(queue.Empty):
                while len(group) < GROUP and group[-1] is not None:
                    group.append(self._jobs.get_nowait())
            ended = group[-1] is None
            # A future that was cancelled while waiting has nobody left to tell.
            jobs = [job for job in group if job is not None and job.future.set_running_or_notify_cancel()]
            try:
                if jobs:
                    self._carry_out(jobs)
            except BaseException as error:
                # Every way out leaves no waiting future behind; the next group begins afresh.
                self._drop_connection()
                found = error if isinstance(error, FedsimError) else trouble(error, self._where)
                if found is None:
                    log.error("the ledger's writer failed", exc_info=error)
                _fail(jobs, found or error)
            finally:
                self._syncables.clear()
        self._drop_connection()

    def _carry_out(self, jobs: list[Job]) -> None:
        connection, transaction = self._begin()
        kept: list[Kept] = []
        for _, alike in groupby(jobs, lambda job: id(job.kind)):
            kept += self._attempted(list(alike), connection, transaction)
        self._sync()
        try:
            began = time.perf_counter()
            transaction.commit()
            self.on_commit(time.perf_counter() - began)
        except BaseException as error:
            found = trouble(error, self._where)
            if found is not None and not isinstance(found, StorageFull):
                found.unknown = True
                raise found from error
            raise
        announced: list[tuple[Job, Any]] = []
        for kind, carried_out, results in kept:
            try:
                announced += list(zip(carried_out, kind.announce(results), strict=True))
            except BaseException as error:
                log.error("what follows a commit failed", exc_info=error)
                _fail(carried_out, error)
        for job, result in announced:
            job.future.set_result(result)

    def _attempted(self, jobs: list[Job], connection: Connection, transaction: RootTransaction) -> list[Kept]:
        """Carry out jobs of one kind, together if that is possible; those that fail are told so."""
        found = self._attempt(jobs, connection, transaction)
        if found is not None:
            return [found]
        if len(jobs) == 1:
            return []
        each = (self._attempt([job], connection, transaction) for job in jobs)
        return [one for one in each if one is not None]

    def _attempt(self, jobs: list[Job], connection: Connection, transaction: RootTransaction) -> Kept | None:
        """Carry out jobs of one kind in a savepoint; what concerns the database itself is raised."""
        connection.exec_driver_sql("SAVEPOINT operation")
        try:
            found = jobs[0].kind.carry_out(connection, [job.item for job in jobs])
            if connection.get_transaction() is not transaction or not transaction.is_active:
                raise _Broken("an operation ended the transaction that it shares with others")
        except BaseException as error:
            if isinstance(error, _Broken):
                raise
            # What the operation raises as a problem of its own files concerns nobody else.
            concerns_all = None if isinstance(error, LedgerProblem) else trouble(error, self._where)
            if concerns_all is not None:
                raise concerns_all from error
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT operation")
            connection.exec_driver_sql("RELEASE SAVEPOINT operation")
            if len(jobs) == 1:
                _fail(jobs, error)
            return None
        connection.exec_driver_sql("RELEASE SAVEPOINT operation")
        return Kept(jobs[0].kind, jobs, found)

    def _sync(self) -> None:
        for syncable in self._syncables.values():
            syncable.sync()

    def _begin(self) -> tuple[Connection, RootTransaction]:
        """A transaction; where none can be had, try again with growing pauses for a while.

        Nothing of the group has run yet, so trying again repeats nothing.
        """
        delay, waited = _FIRST_DELAY, 0.0
        while True:
            try:
                if self._connection is None:
                    self._connection = self._engine.connect()
                return self._connection, self._connection.begin()
            except Exception as error:
                self._drop_connection()
                found = trouble(error, self._where)
                if found is None or isinstance(found, StorageFull):
                    raise
                if waited >= self._patience_seconds or self._closing.is_set():
                    raise found from error
                log.warning("the database does not answer, trying again in %.2f s: %s", delay, found.why)
                self._closing.wait(delay)
                waited += delay
                delay = min(2 * delay, _LONGEST_DELAY)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Closing rolls back; a connection that is gone cannot, and need not.
            with suppress(Exception):
                connection.close()


class _Broken(RuntimeError):
    """The group's transaction is no longer what the writer began."""


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _fail(jobs: list[Job], error: BaseException) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)
