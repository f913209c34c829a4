"""Which node is which client of a run, and who is there: indices are stable once given.

A node that carries the label ``index`` gets that one; the others get the free ones in the order of their
names as they come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection, insert, select

from fedsim.server.database import Database
from fedsim.server.node_rows import REVOKED
from fedsim.server.tables import nodes, run_members
from fedsim.types import Bools, Ids


class Candidate(NamedTuple):
    """A node that may take part in a run."""

    node_id: str
    name: str
    labels: dict[str, str]


class Members:
    """The clients of one run; thread-safe.

    Args:
        database: where the indices are kept.
        run_id: whose.
        population: N, how many indices there are.
        candidates: node ids -> those of them that may take part in this run.
    """

    def __init__(
        self,
        database: Database,
        run_id: str,
        population: int,
        candidates: Callable[[frozenset[str]], list[Candidate]],
    ) -> None:
        self.database, self.run_id, self.population = database, run_id, population
        self._candidates = candidates
        self._changed = threading.Condition()
        self._online: frozenset[str] = frozenset()
        with database.read() as connection:
            rows = connection.execute(
                select(run_members.c.client, run_members.c.node_id, run_members.c.excluded).where(
                    run_members.c.run_id == run_id
                )
            ).all()
            revoked = connection.execute(select(nodes.c.node_id).where(nodes.c.state == REVOKED)).scalars()
            self._gone = set(revoked)
        self._node_of: dict[int, str] = {client: node for client, node, _ in rows}
        self._client_of: dict[str, int] = {node: client for client, node, _ in rows}
        self._excluded: set[int] = {client for client, _, why in rows if why}

    def node_of(self, client: int) -> str | None:
        return self._node_of.get(client)

    def client_of(self, node_id: str) -> int | None:
        return self._client_of.get(node_id)

    def set_online(self, node_ids: frozenset[str]) -> None:
        """These nodes are there, all others are not."""
        with self._changed:
            self._online = node_ids
            self._changed.notify_all()

    def exclude(self, client: int) -> None:
        """This client is not asked any more; the ledger has the reason."""
        with self._changed:
            self._excluded.add(client)

    def revoke(self, node_id: str) -> None:
        """This node takes no part any more, whatever run it was in."""
        with self._changed:
            self._gone.add(node_id)

    def is_revoked(self, node_id: str) -> bool:
        """Whether this node takes no part any more."""
        return node_id in self._gone

    def there(self, ids: Ids) -> Bools:
        """[b] whether each of these clients can be asked now."""
        return np.array([self._is_there(client) for client in ids.tolist()], bool)

    def _is_there(self, client: int) -> bool:
        node = self._node_of.get(client)
        return node in self._online and client not in self._excluded and node not in self._gone

    @property
    def possible(self) -> int:
        """Clients that could be asked if everybody were there: neither excluded nor revoked."""
        members = list(self._node_of.items())
        return self.population - sum(c in self._excluded or node in self._gone for c, node in members)

    def count(self) -> int:
        """Clients that can be asked now."""
        return sum(self._is_there(client) for client in list(self._node_of))

    def enlist(self) -> int:
        """Give indices to nodes that are there and have none; how many clients can be asked now."""
        newcomers = [c for c in self._candidates(self._online) if c.node_id not in self._client_of]
        given = self._given(newcomers)
        if given:

            def write(connection: Connection) -> None:
                rows = [{"run_id": self.run_id, "client": i, "node_id": n} for i, n in given.items()]
                connection.execute(insert(run_members), rows)

            self.database.writer.run(write)
            self._node_of |= given
            self._client_of |= {node: client for client, node in given.items()}
        return self.count()

    def _given(self, newcomers: Iterable[Candidate]) -> dict[int, str]:
        given: dict[int, str] = {}
        rest: list[Candidate] = []
        for candidate in sorted(newcomers, key=lambda c: c.name):
            wish = candidate.labels.get("index", "")
            index = int(wish) if wish.isascii() and wish.isdigit() and len(wish) < 10 else -1
            if 0 <= index < self.population and index not in self._node_of and index not in given:
                given[index] = candidate.node_id
            else:
                rest.append(candidate)
        free = (i for i in range(self.population) if i not in self._node_of and i not in given)
        for candidate, index in zip(rest, free, strict=False):
            given[index] = candidate.node_id
        return given

    def wait(self, seconds: float) -> None:
        """Until somebody comes or goes, at most so long."""
        with self._changed:
            self._changed.wait(seconds)
