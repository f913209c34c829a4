"""A federation behind a scripted engine: given events at given times, given answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedsim.buffers import no_buffers
from fedsim.engine import Arrived, Drained, Event, Failed, Timer, Weigh
from fedsim.federation import Federation, RunState
from fedsim.flat import ParamSpec
from fedsim.local import LocalSpec
from fedsim.rows import RowStore
from fedsim.schedulers import sync
from fedsim.strategies.fedavg import fedavg
from fedsim.types import Ids, Population, Task, UpdateBlock

N = 6


def answer(ids: list[int], *, version: int = 0, delta: float | None = None, loss: bool = True) -> UpdateBlock:
    count = len(ids)
    rows = torch.tensor([[float(i + 1) if delta is None else delta] * 2 for i in ids], dtype=torch.float64)
    return UpdateBlock(
        np.array(ids, np.int64),
        np.full(count, version, np.int64),
        np.full(count, 10, np.int64),
        np.ones(count, np.int64),
        np.ones(count),
        np.zeros(count),
        {"delta": rows},
        metrics={"loss": np.ones(count)} if loss else {},
    )


class Scripted:
    """An engine that emits given events at given times.

    Args:
        damaged: clients that send NaN.
        broken: clients whose training raises.
    """

    def __init__(
        self,
        events: list[tuple[float, Event]],
        *,
        damaged: tuple[int, ...] = (),
        broken: tuple[int, ...] = (),
    ) -> None:
        self.script = sorted(events, key=lambda pair: pair[0])
        self.damaged, self.broken = damaged, broken
        self.now = 0.0
        self.tasks: list[Task] = []
        self.committed: list[list[int]] = []
        self.cancelled = 0
        self.collected: list[int] = []
        self.unannounced: list[Event] = []  # what `settle` tells

    def submit(self, task: Task) -> None:
        self.tasks.append(task)

    def set_timer(self, name: str, at: float) -> None:
        self.script = sorted([*self.script, (at, Timer(name))], key=lambda pair: pair[0])

    def next_event(self) -> Event:
        if not self.script:
            return Drained()
        self.now, event = self.script.pop(0)
        return event

    def settle(self) -> list[Event]:
        acknowledged, self.unannounced = self.unannounced, []
        return acknowledged

    def collect(
        self, ids: Ids, base_version: Ids, weigh: Weigh | None = None
    ) -> Iterator[UpdateBlock | Failed]:
        for client in ids.tolist():
            self.collected.append(client)
            if client in self.broken:
                yield Failed(np.array([client]), "training raised")
            else:
                yield answer([client], delta=float("nan") if client in self.damaged else None)

    def commit(self, ids: Ids, base_version: Ids) -> None:
        self.committed.append(ids.tolist())

    def cancel(self) -> None:
        self.cancelled += 1

    def close(self) -> None:
        self.cancel()


def federation(
    engine: Scripted, *, cohort: int = N, asked: int | None = None, **parameters: Any
) -> Federation:
    strategy = fedavg(weighting="uniform")
    spec = ParamSpec(("w",), ((2,),), torch.float64)
    state = strategy.init(torch.zeros(2, dtype=torch.float64), spec, Population(N))
    return Federation(
        strategy,
        engine,
        sync(cohort=cohort, **parameters),
        sample=lambda window, draw, count, busy: np.arange(min(count, N) if asked is None else asked),
        spec=LocalSpec(),
        state=RunState(0, 0, 0.0, 0, state, no_buffers(), ()),
        rows=RowStore(N),
        population=N,
    )


def arrive(*ids: int, version: int = 0) -> Arrived:
    return Arrived(np.array(ids, np.int64), np.full(len(ids), version, np.int64))


def mean_of(*ids: int) -> torch.Tensor:
    return torch.full((2,), float(np.mean([i + 1 for i in ids])), dtype=torch.float64)
