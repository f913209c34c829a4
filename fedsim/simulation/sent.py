"""Tasks that simulated devices have in hand: found by client and version, many at a time.

A task of a thousand clients is one object with arrays, whose rows are flying, announced or over. What a
synchronous round asks for is then a comparison of arrays, with no object for any client. Asynchronous
runs have many tasks of one client each; a task is found through the version that it started from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.ids import distinct
from fedsim.local import LocalSpec
from fedsim.types import Bools, Floats, Ids, Task

TaskKey = tuple[int, int]  # client, version that it started from

FLYING, ANNOUNCED, OVER = 0, 1, 2


@dataclass(slots=True, eq=False)
class Sent:
    """A task as its devices take it.

    Args:
        task: for b clients.
        steps, seconds, lost: [b] local steps, seconds from dispatch to arrival, who never answers.
        status: [b] of FLYING, ANNOUNCED (arrived, perhaps never asked for), OVER.
    """

    task: Task
    steps: Ids
    seconds: Floats
    lost: Bools
    status: npt.NDArray[np.int8] = field(init=False)
    _sorter: Ids | None = field(init=False, default=None)  # None where the ids ascend

    def __post_init__(self) -> None:
        ids = self.task.ids
        self.status = np.zeros(len(ids), np.int8)
        if len(ids) > 1 and (ids[1:] <= ids[:-1]).any():
            self._sorter = np.argsort(ids, kind="stable").astype(np.int64)

    def rows_of(self, ids: Ids) -> Ids:
        """[k] row of each client, -1 where the task is not for it."""
        own = self.task.ids
        if len(ids) == len(own) and (ids == own).all():
            return np.arange(len(own), dtype=np.int64)
        at = np.minimum(np.searchsorted(own, ids, sorter=self._sorter), len(own) - 1)
        rows = at if self._sorter is None else self._sorter[at]
        return np.where(own[rows] == ids, rows, -1).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Some rows of some tasks, in an order of their own.

    Args:
        sents: the tasks, each once.
        which, rows: [n] the task of each client in `sents`, and its row there.
    """

    sents: Sequence[Sent]
    which: Ids
    rows: Ids

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, order: Ids | Bools) -> Chosen:
        """The clients of a mask or at indices, with no task that none of them has."""
        which, rows = self.which[order], self.rows[order]
        if len(self.sents) == 1 or not len(rows):
            return Chosen(self.sents[: len(rows)], which, rows)
        kept, again = np.unique(which, return_inverse=True)
        return Chosen([self.sents[s] for s in kept.tolist()], again.astype(np.int64), rows)

    @property
    def ids(self) -> Ids:
        return self._each([sent.task.ids for sent in self.sents], np.int64)

    @property
    def steps(self) -> Ids:
        """[n] local steps."""
        return self._each([sent.steps for sent in self.sents], np.int64)

    @property
    def seconds(self) -> Floats:
        """[n] from dispatch to arrival."""
        return self._each([sent.seconds for sent in self.sents], np.float64)

    @property
    def versions(self) -> Ids:
        """[n] that the clients started from."""
        return np.array([sent.task.version for sent in self.sents], np.int64)[self.which]

    @property
    def rounds(self) -> Ids:
        """[n] keys of the random streams."""
        return np.array([sent.task.round_index for sent in self.sents], np.int64)[self.which]

    @property
    def keys(self) -> list[TaskKey]:
        return list(zip(self.ids.tolist(), self.versions.tolist(), strict=True))

    @property
    def alike(self) -> list[Chosen]:
        """Grouped by their local training: only clients under the same can share a block."""
        groups: dict[LocalSpec, list[int]] = {}
        for number, sent in enumerate(self.sents):
            groups.setdefault(sent.task.spec, []).append(number)
        if len(groups) < 2:
            return [self] if len(self) else []
        found = [self.take(np.isin(self.which, numbers)) for numbers in groups.values()]
        order = [np.flatnonzero(np.isin(self.which, numbers))[0] for numbers in groups.values()]
        return [found[position] for position in np.argsort(order, kind="stable")]

    def _each(self, columns: list[npt.NDArray[Any]], kind: type[np.generic]) -> npt.NDArray[Any]:
        """[n] out of one column of every task."""
        if len(columns) == 1:
            return np.asarray(columns[0][self.rows], kind)
        found = np.empty(len(self.rows), kind)
        for number, column in enumerate(columns):
            mine = self.which == number
            found[mine] = column[self.rows[mine]]
        return found


def joined(first: Chosen, second: Chosen) -> Chosen:
    """The clients of both, one after the other."""
    if not len(second):
        return first
    number = {id(sent): position for position, sent in enumerate(first.sents)}
    sents = list(first.sents)
    for sent in second.sents:
        if number.setdefault(id(sent), len(sents)) == len(sents):
            sents.append(sent)
    again = np.array([number[id(sent)] for sent in second.sents], np.int64)
    return Chosen(
        sents, np.concatenate([first.which, again[second.which]]), np.concatenate([first.rows, second.rows])
    )


class Ledger:
    """All tasks that are not over, in the order of dispatch."""

    def __init__(self) -> None:
        self._of_version: dict[int, list[Sent]] = {}
        self._announced: set[Sent] = set()  # that have an announced row, or had one

    def __iter__(self) -> Iterator[TaskKey]:
        for sent in self.sents:
            for client in sent.task.ids[sent.status != OVER].tolist():
                yield client, sent.task.version

    def __len__(self) -> int:
        return sum(int((sent.status != OVER).sum()) for sent in self.sents)

    @property
    def sents(self) -> list[Sent]:
        """Every task of which some row is not over."""
        return [sent for sents in self._of_version.values() for sent in sents]

    def add(self, sent: Sent) -> None:
        self._of_version.setdefault(sent.task.version, []).append(sent)

    def clear(self) -> None:
        self._of_version.clear()
        self._announced.clear()

    def find(self, ids: Ids, base_version: Ids) -> Chosen:
        """Those of these tasks that are not over, in the order asked for."""
        versions = base_version[:1] if (base_version == base_version[:1]).all() else distinct(base_version)
        sents: list[Sent] = []
        which, found = np.full(len(ids), -1, np.int64), np.full(len(ids), -1, np.int64)
        for version in versions.tolist():
            at = slice(None) if len(versions) == 1 else np.flatnonzero(base_version == version)
            for sent in self._of_version.get(version, ()):
                rows = sent.rows_of(ids[at])
                mine = (rows >= 0) & (sent.status[rows] != OVER)
                if not mine.any():
                    continue
                # Where a client was given the same version twice, only the later task is not over.
                which[at] = np.where(mine, len(sents), which[at])
                found[at] = np.where(mine, rows, found[at])
                sents.append(sent)
        there = which >= 0
        return Chosen(sents, which, found) if there.all() else Chosen(sents, which[there], found[there])

    def is_announced(self, key: TaskKey) -> bool:
        """Whether this task has arrived and is not over."""
        chosen = self.find(*(np.array([part], np.int64) for part in key))
        return len(chosen) > 0 and bool(chosen.sents[0].status[chosen.rows[0]] == ANNOUNCED)

    def announce(self, ids: Ids, base_version: Ids) -> None:
        """These have arrived."""
        chosen = self.find(ids, base_version)
        for number, sent in enumerate(chosen.sents):
            sent.status[chosen.rows[chosen.which == number]] = ANNOUNCED
            self._announced.add(sent)

    def end(self, ids: Ids, base_version: Ids) -> None:
        """These are over."""
        chosen = self.find(ids, base_version)
        for number, sent in enumerate(chosen.sents):
            sent.status[chosen.rows[chosen.which == number]] = OVER
            self._drop(sent)

    def end_announced(self) -> list[TaskKey]:
        """Whatever has arrived is over; returns what nobody had asked for."""
        left: list[TaskKey] = []
        for sent in self._announced:
            waiting = sent.status == ANNOUNCED
            if waiting.any():
                left.extend((client, sent.task.version) for client in sent.task.ids[waiting].tolist())
                sent.status[waiting] = OVER
            self._drop(sent)
        self._announced.clear()
        return left

    def _drop(self, sent: Sent) -> None:
        """Forget a task of which every row is over."""
        sents = self._of_version.get(sent.task.version, [])
        if (sent.status == OVER).all() and sent in sents:
            sents.remove(sent)
            if not sents:
                del self._of_version[sent.task.version]
