"""The table of all runs: found by what operators call them, described, and moved from state to state."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select, update

from fedsim.errors import FedsimError
from fedsim.pb import federation_pb2 as pb
from fedsim.server.database import Database
from fedsim.server.run_ledger import STOPPING, RunLedger
from fedsim.server.run_thread import RunThread
from fedsim.server.tables import events, runs

Row = Any  # of the table `runs`


class NoSuchRun(FedsimError):
    """No run, or more than one, goes by this name."""

    exit_code = 2
    default_code = "FS-SRV-051"


class RunTable:
    """What the database says of runs; every method may be called from any thread but the loop's.

    Args:
        database: of the coordinator.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def all(self) -> Sequence[Row]:
        """Every run, oldest first."""
        with self.database.read() as connection:
            return connection.execute(select(runs).order_by(runs.c.created)).all()

    def by_key(self, run_key: str) -> Row | None:
        """The run that was submitted under a key."""
        with self.database.read() as connection:
            return connection.execute(select(runs).where(runs.c.run_key == run_key)).first()

    def find(self, run: str) -> Row:
        """One run by its identifier, the beginning of it, its name or its folder.

        Raises:
            NoSuchRun: none, or several.
        """
        rows = self.all()
        exact = [r for r in rows if run in (r.run_id, r.name, r.folder)]
        found = exact[-1:] or [r for r in rows if run and r.run_id.startswith(run)]
        if len(found) != 1:
            known = ", ".join(f"{r.run_id} ({r.name})" for r in rows[-5:]) or "none"
            raise NoSuchRun(
                f"no run is called {run!r}" if not found else f"{run!r} fits more than one run",
                code="FS-SRV-051",
                why=f"the last runs: {known}",
                hint="fedsim watch --connect … lists all",
            )
        return found[0]

    def state_of(self, run_id: str) -> str:
        """Where a run stands."""
        with self.database.read() as connection:
            return str(connection.execute(select(runs.c.state).where(runs.c.run_id == run_id)).scalar())

    def set_state(self, run_id: str, state: str, detail: str) -> None:
        """Move a run to a state; watchers find it among the events."""
        ledger = RunLedger(self.database, run_id)
        self.database.writer.run(lambda connection: ledger.set_state(connection, state, detail))

    def set_stopping(self, run_id: str) -> str:
        """A run that goes on will end after its open round; one that has ended meanwhile stays as it is.

        Returns:
            The state that it was in.
        """
        ledger = RunLedger(self.database, run_id)

        def operation(connection: Connection) -> str:
            state = str(connection.execute(select(runs.c.state).where(runs.c.run_id == run_id)).scalar())
            if state == "running":
                ledger.set_state(connection, *STOPPING)
            return state

        return self.database.writer.run(operation)

    def count_recovery(self, run_id: str) -> None:
        """The run is taken up once more."""
        again = update(runs).where(runs.c.run_id == run_id).values(recoveries=runs.c.recoveries + 1)
        self.database.writer.run(lambda connection: connection.execute(again).rowcount)

    def events(self, run_id: str, after: int) -> Sequence[pb.Event]:
        """What happened in a run after a revision, oldest first; 1,000 at most."""
        with self.database.read() as connection:
            rows = connection.execute(
                select(events)
                .where(events.c.revision > after, events.c.run_id == run_id)
                .order_by(events.c.revision)
                .limit(1000)
            ).all()
        return [
            pb.Event(revision=r.revision, run_id=r.run_id, type=r.type, data=r.data, time=r.time)
            for r in rows
        ]


def described(row: Row, thread: RunThread | None) -> pb.Run:
    """A run as operators see it; `thread` is there while it runs."""
    config = tomllib.loads(row.config)
    record = "" if thread is None or thread.last_record is None else json.dumps(thread.last_record)
    return pb.Run(
        run_id=row.run_id,
        name=row.name,
        state=row.state,
        detail=row.detail,
        rounds_done=max(0, row.rounds_done),
        rounds=config["run"]["rounds"],
        clients=0 if thread is None else thread.run_parts.population,
        online=0 if thread is None else thread.members.count(),
        record=record,
        folder=row.folder,
        bytes_down=row.bytes_down,
        bytes_up=row.bytes_up,
        client_seconds=row.client_seconds,
    )
