"""What no run needs any more: uploads of tasks that are over, and objects and segments that no row names.

First a transaction stops naming things, then they are removed. What a crash leaves between the two is found
at the next start, and by a look around every hour; so trouble in here never stops a run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Connection, delete, func, select

from fedsim.errors import FedsimError
from fedsim.server.database import Database
from fedsim.server.objects import Objects
from fedsim.server.run_ledger import FINISHED, FOR_GOOD, Forgotten, RunLedger
from fedsim.server.segments import Segments
from fedsim.server.tables import journal, runs, submissions, tasks, uploads, windows
from fedsim.server.uploads import Uploads

log = logging.getLogger(__name__)

KEEP_SECONDS = 86_400.0
"""So long an upload may stand still, and a client may ask again what became of its last answer."""
_AT_ONCE = 500  # values in one statement
_NAMES = (
    (tasks.c.message_digest, tasks.c.message_digest.is_not(None)),
    (tasks.c.lent_digest, tasks.c.lent_digest.is_not(None)),
    (submissions.c.digest, submissions.c.place == "object"),
    (uploads.c.digest, uploads.c.complete),
)
"""Columns that name objects, each with the rows of which that is true."""
_OVER = runs.c.state.in_(FOR_GOOD)


class Leftovers:
    """Removes them; every method may be called from any thread but the loop's.

    Args:
        database, objects, segments, uploads: of the coordinator.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        objects: Objects,
        segments: Segments,
        uploads: Uploads,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._objects, self._segments, self._uploads = objects, segments, uploads
        self._wall = wall

    def clear(self, forgotten: Forgotten) -> None:
        """Uploads of forgotten tasks, and objects that their rows named and no other row does."""
        with _warned():
            finished = self._uploads.forget_tasks(forgotten.tasks)
            self._remove({*forgotten.objects, *finished})

    def run_over(self, run_id: str, state: str, forgotten: Forgotten) -> None:
        """The same for a run that has ended.

        A run that was stopped or failed can go on: its accepted answers stay. What is still being uploaded
        is none; whoever sends it begins again.

        Args:
            forgotten: what its last transaction stopped naming.
        """
        with _warned():
            if state in FOR_GOOD:
                self._segments.forget_run(run_id)
            elif state in FINISHED:
                names = RunLedger(self._database, run_id).task_names()
                forgotten = Forgotten([*forgotten.tasks, *names], forgotten.objects)
        self.clear(forgotten)

    def sweep(self) -> None:
        """At start, before any run goes on: what the process before this one did not come to remove."""
        for run_id in self._ended_with_bytes():
            self._database.writer.run(RunLedger(self._database, run_id).drop_bytes)
        self._drop_verdicts(KEEP_SECONDS)
        self._uploads.forget_tasks(self._orphans())
        with self._database.read() as connection:
            goes_on = set(connection.execute(select(runs.c.run_id).where(~_OVER)).scalars())
        for run_id in {segment.run_id for segment in self._segments.present()} - goes_on:
            self._segments.forget_run(run_id)
        self._objects.sweep(self._all_named())

    def collect(self, older_than: float = KEEP_SECONDS) -> None:
        """Every now and then: uploads that nobody goes on with, verdicts that nobody asks for any more.

        Args:
            older_than: seconds since anything happened to them.
        """
        finished = self._uploads.collect_garbage(older_than)
        self._remove(finished | self._uploads.forget_tasks(self._orphans()))
        self._drop_verdicts(older_than)

    def _remove(self, digests: Iterable[bytes]) -> None:
        self._objects.remove(digests, unless=self._named)

    def _named(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of `digests` that some row names."""
        found: set[bytes] = set()
        with self._database.read() as connection:
            for start in range(0, len(digests), _AT_ONCE):
                part = digests[start : start + _AT_ONCE]
                for column, more in _NAMES:
                    found |= set(connection.execute(select(column).where(column.in_(part), more)).scalars())
        return found

    def _all_named(self) -> set[bytes]:
        found: set[bytes] = set()
        with self._database.read() as connection:
            for column, more in _NAMES:
                found |= set(connection.execute(select(column).where(column.is_not(None), more)).scalars())
        return found

    def _orphans(self) -> list[bytes]:
        """Tasks with an upload whose rows are gone, or whose runs have ended."""
        known = (
            select(tasks.c.task_id)
            .join(runs, runs.c.run_id == tasks.c.run_id)
            .where(runs.c.state.not_in(FINISHED))
        )
        with self._database.read() as connection:
            found = select(uploads.c.task_id).where(uploads.c.task_id.not_in(known)).distinct()
            return list(connection.execute(found).scalars())

    def _ended_with_bytes(self) -> Collection[str]:
        """Runs that ended for good and whose journal is still there."""
        with self._database.read() as connection:
            found = select(journal.c.run_id).join(runs, runs.c.run_id == journal.c.run_id).where(_OVER)
            return set(connection.execute(found.distinct()).scalars())

    def _drop_verdicts(self, older_than: float) -> None:
        """Tasks of runs that ended for good so long ago, with the verdicts on them."""
        with self._database.read() as connection:
            last = (
                select(windows.c.run_id)
                .join(runs, runs.c.run_id == windows.c.run_id)
                .where(_OVER, windows.c.run_id.in_(select(tasks.c.run_id)))
                .group_by(windows.c.run_id)
                .having(func.max(windows.c.committed_at) <= self._wall() - older_than)
            )
            gone = list(connection.execute(last).scalars())

        def operation(connection: Connection) -> None:
            for table in (submissions, tasks):
                connection.execute(delete(table).where(table.c.run_id.in_(gone)))

        if gone:
            self._database.writer.run(operation)


@contextmanager
def _warned() -> Iterator[None]:
    try:
        yield
    except (FedsimError, OSError) as error:
        log.warning("something that is not needed any more stays until the next start: %s", error)
