"""The rows of uploads: who sends what, how far it is, and how often it went wrong.

Every change names the generation it belongs to, so that a stream that was overtaken changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from grpc import StatusCode
from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select, update

from fedsim.server.database import Database
from fedsim.server.ledger_errors import LedgerProblem, StorageFull
from fedsim.server.tables import uploads as table

_AT_ONCE = 500  # values in one statement
RETRY_SECONDS = 30.0
"""The delay told to whoever finds no room."""


class UploadRefused(Exception):
    """An upload, or a part of it, is not taken.

    Args:
        status: of the call.
        text: for the node's log; no path, no word of other nodes.
        offset: where the node has to go on, in bytes, where that is the answer.
        retry_seconds: when to try again, where that is the answer.
    """

    def __init__(
        self,
        status: StatusCode,
        text: str,
        *,
        offset: int | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.offset = offset
        self.retry_seconds = retry_seconds


def later(text: str) -> UploadRefused:
    """No room now."""
    return UploadRefused(StatusCode.RESOURCE_EXHAUSTED, text, retry_seconds=RETRY_SECONDS)


def from_ledger(error: LedgerProblem) -> UploadRefused:
    """A full disk or a database that does not answer, for a node: without the server's paths."""
    if isinstance(error, StorageFull):
        return later("the server's disk is full")
    return UploadRefused(
        StatusCode.UNAVAILABLE, "the server cannot store this now", retry_seconds=RETRY_SECONDS
    )


def overtaken() -> UploadRefused:
    """What an older stream hears."""
    return UploadRefused(StatusCode.FAILED_PRECONDITION, "a newer stream goes on with this upload")


class Row(NamedTuple):
    """One upload, as in the table."""

    node_id: str
    upload_id: bytes
    generation: int
    task_id: bytes
    digest: bytes
    size: int
    offset: int
    strikes: int
    complete: bool
    updated: float


_SELECT = select(*[table.c[name] for name in Row._fields])


class UploadRows:
    """Reads and writes the table ``uploads``.

    Args:
        database: of the coordinator.
        wall: seconds since 1970.
        max_strikes: as many make an upload worthless; no more is taken for that task.
    """

    def __init__(self, database: Database, wall: Callable[[], float], max_strikes: int) -> None:
        self._database = database
        self._wall = wall
        self._max_strikes = max_strikes

    def find(self, node_id: str, upload_id: bytes) -> Row | None:
        """The row of an upload."""
        found = self._read(and_(table.c.node_id == node_id, table.c.upload_id == upload_id))
        return found[0] if found else None

    def all(self) -> list[Row]:
        """Every row."""
        return self._read(None)

    def claim(self, asked: Row, room: Callable[[int, Row], None], drop: Callable[[Row], None]) -> Row:
        """The row of an upload that begins or goes on, for the generation that asks.

        Args:
            room: refuses where the bytes that are to come do not fit beside what is promised.
            drop: deletes the file of an upload that this one replaces: a node has one per task.

        Raises:
            UploadRefused: overtaken, another upload under the same id, too many strikes, no room.
        """

        def operation(connection: Connection) -> Row:
            rows = _rows(connection, and_(table.c.node_id == asked.node_id, table.c.task_id == asked.task_id))
            mine = [row for row in rows if row.upload_id == asked.upload_id]
            others = [row for row in rows if row.upload_id != asked.upload_id]
            found = mine[0] if mine else _one(connection, asked)
            if found is not None:
                _check_same(found, asked)
            # The strikes go on to the next upload of the task: a new id does not wash them off.
            strikes = max((row.strikes for row in rows), default=0)
            if strikes >= self._max_strikes or sum(row.complete for row in others) >= self._max_strikes:
                raise UploadRefused(StatusCode.PERMISSION_DENIED, "too many broken uploads of this task")
            row = asked._replace(strikes=strikes, updated=self._wall())
            if found is not None:
                row = row._replace(offset=found.offset, complete=found.complete)
            if not row.complete:
                replaced = [other for other in others if not other.complete]
                room(self._promised(connection, [row, *replaced]), row)
                for other in replaced:
                    drop(other)
                    connection.execute(delete(table).where(_is(other)))
            if found is None:
                connection.execute(insert(table).values(row._asdict()))
            else:
                values = {"generation": row.generation, "strikes": row.strikes, "updated": row.updated}
                connection.execute(update(table).where(_is(found)).values(values))
            return row

        return self._database.writer.run(operation)

    def _promised(self, connection: Connection, without: Sequence[Row]) -> int:
        """Bytes of the other unfinished uploads that are not here yet."""
        open_rows = and_(~table.c.complete, table.c.strikes < self._max_strikes, *[~_is(r) for r in without])
        to_come = func.sum(table.c.size - table.c.offset)
        return int(connection.execute(select(to_come).where(open_rows)).scalar() or 0)

    def advance(self, row: Row, offset: int, *, complete: bool = False) -> Row:
        """Record bytes that are safe on the disk.

        Raises:
            UploadRefused: a newer generation took the upload over, or it is gone.
        """
        return self._change(row, row._replace(offset=offset, complete=complete, updated=self._wall()))

    def restart(self, row: Row) -> Row:
        """Record that nothing of it is on the disk."""
        return self.advance(row, 0)

    def strike(self, row: Row) -> Row:
        """Count one more thing that was broken."""
        return self._change(row, row._replace(strikes=row.strikes + 1, updated=self._wall()))

    def _change(self, before: Row, after: Row) -> Row:
        def operation(connection: Connection) -> None:
            values = {name: getattr(after, name) for name in ("offset", "strikes", "complete", "updated")}
            mine = and_(_is(before), table.c.generation == before.generation)
            if connection.execute(update(table).where(mine).values(values)).rowcount != 1:
                raise overtaken()

        self._database.writer.run(operation)
        return after

    def forget_stale(
        self, before: float, live: frozenset[tuple[str, bytes]], drop: Callable[[Row], None]
    ) -> list[Row]:
        """Delete rows and files that did not move since `before`, except those of open streams."""

        def operation(connection: Connection) -> list[Row]:
            stale = [
                row for row in _rows(connection, table.c.updated < before)
                if (row.node_id, row.upload_id) not in live
            ]  # fmt: skip
            for row in stale:
                drop(row)
                connection.execute(delete(table).where(_is(row)))
            return stale

        return self._database.writer.run(operation)

    def forget_tasks(self, task_ids: Sequence[bytes], drop: Callable[[Row], None]) -> list[Row]:
        """Delete rows and files of tasks; returns the rows."""
        starts = range(0, len(task_ids), _AT_ONCE)
        parts = [table.c.task_id.in_(task_ids[start : start + _AT_ONCE]) for start in starts]

        def found(connection: Connection) -> list[Row]:
            return [row for part in parts for row in _rows(connection, part)]

        def operation(connection: Connection) -> list[Row]:
            gone = found(connection)
            for part in parts:
                connection.execute(delete(table).where(part))
            for row in gone:
                drop(row)
            return gone

        # Most tasks have no upload: the writer is not kept from its work for them.
        with self._database.read() as connection:
            some = bool(found(connection))
        return self._database.writer.run(operation) if some else []

    def _read(self, condition: ColumnElement[bool] | None) -> list[Row]:
        with self._database.read() as connection:
            return _rows(connection, condition)


def _check_same(found: Row, asked: Row) -> None:
    if found.generation > asked.generation:
        raise overtaken()
    if (found.task_id, found.digest, found.size) != (asked.task_id, asked.digest, asked.size):
        raise UploadRefused(
            StatusCode.INVALID_ARGUMENT, "this upload id belongs to another task, digest or size"
        )


def _is(row: Row) -> ColumnElement[bool]:
    return and_(table.c.node_id == row.node_id, table.c.upload_id == row.upload_id)


def _one(connection: Connection, asked: Row) -> Row | None:
    found = _rows(connection, _is(asked))
    return found[0] if found else None


def _rows(connection: Connection, condition: ColumnElement[bool] | None) -> list[Row]:
    query = _SELECT if condition is None else _SELECT.where(condition)
    return [Row(*values) for values in connection.execute(query.order_by(table.c.node_id, table.c.upload_id))]
