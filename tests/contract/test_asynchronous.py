"""Every strategy that may run asynchronously, under every asynchronous scheduler, in both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.checkpoint import load_tree, save_tree
from fedsim.engine import Arrived, Failed
from fedsim.local import LocalSpec
from fedsim.membership import NEVER, Membership, everybody
from fedsim.registry import load
from fedsim.schedulers import Scheduler, buffer, immediate, window
from fedsim.simulation.devices import DeviceModel, instant
from fedsim.simulation.in_flight import load_flight, save_flight
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.feddyn import feddyn
from fedsim.strategy import Strategy
from fedsim.transform import Observed
from fedsim.types import Ids, UpdateBlock
from tests.contract.registered import STRATEGIES
from tests.federations import SIZES, Small, build, random_data

N = len(SIZES)
SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "immediate": lambda: immediate(cohort=4),
    "buffer": lambda: buffer(cohort=4, population=N, size=2),
    "window": lambda: window(cohort=N, period_seconds=0.5),
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)
# Every strategy under every one of them runs with the slow tests.
buffered_first = pytest.mark.parametrize(
    "scheduler",
    ["buffer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("immediate", "window"))],
)


def devices(*, lost: int | None = None) -> DeviceModel:
    """Client i takes 0.3 + 0.2 i seconds; one may never answer."""
    return instant()._replace(
        seconds=lambda ids, steps, r: 0.3 + 0.2 * ids,
        lost=lambda ids, r: ids == (-1 if lost is None else lost),
    )


def asynchronous(name: str) -> Strategy:
    """The strategy with its defaults; skips where it cannot run asynchronously."""
    strategy = load("strategies", name)()
    assert isinstance(strategy, Strategy)
    if "async" not in strategy.traits.modes:
        pytest.skip(f"{name!r} runs in synchronous rounds only")
    return strategy


def federate(strategy: Strategy, scheduler: str, engine: str = "loop", **parameters: Any) -> Small:
    settings = {"devices": devices(), **parameters}
    return build(strategy, engine=engine, scheduler=SCHEDULERS[scheduler](), **settings)


def run(small: Small, windows: int) -> Tensor:
    for _ in range(windows):
        outcome = small.federation.run_window()
        assert outcome.error is None, outcome.error
    return small.federation.model.clone()


@buffered_first
@pytest.mark.parametrize("name", STRATEGIES)
def test_loop_and_stacked_agree_though_blocks_mix_versions(name: str, scheduler: str) -> None:
    one = run(federate(asynchronous(name), scheduler, "loop"), 7)
    other = run(federate(asynchronous(name), scheduler, "stacked"), 7)
    start = federate(fedavg(), scheduler).federation.model
    assert torch.linalg.vector_norm(one - other) <= 1e-10 * torch.linalg.vector_norm(one - start)
    assert not torch.equal(one, start)


@pytest.mark.parametrize("engine", [pytest.param("loop", marks=pytest.mark.slow), "stacked"])
@buffered_first
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_continues_bit_for_bit_with_its_tasks_in_flight(name: str, scheduler: str, engine: str) -> None:
    whole = federate(asynchronous(name), scheduler, engine)
    run(whole, 8)
    killed = federate(asynchronous(name), scheduler, engine)
    run(killed, 3)
    state, flight = save_tree(killed.federation.state), save_flight(killed.engine)
    index, layout = killed.federation.rows.index(), dict(killed.federation.rows.layout)

    resumed = federate(asynchronous(name), scheduler, engine)
    fed = resumed.federation
    fed.rows.restore(index, layout)
    if layout:  # rows live in memory here, not in the folder that a run has
        held = np.flatnonzero(killed.federation.rows.has(np.arange(N))).astype(np.int64)
        fed.rows.stage(held, killed.federation.rows.read(held))
        versions = fed.rows.version_of.copy()
        fed.rows.commit(held)
        fed.rows.version_of[:] = versions
    resumed.store.version_of[:] = killed.store.version_of
    fed.restore(load_tree(fed.state, *state), *load_flight(resumed.engine, *flight))
    run(resumed, 5)
    for one, other in zip(save_tree(fed.state), save_tree(whole.federation.state), strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            assert isinstance(other, dict)
            assert all(torch.equal(one[name], other[name]) for name in other)


@every_scheduler
def test_buffers_are_those_of_the_version_that_a_client_started_from(scheduler: str) -> None:
    data = random_data("batch_norm", sizes=[8] * N)  # full batches: both engines normalise the same rows
    spec = LocalSpec(batch_size=4, lr=0.1)
    small = {
        engine: federate(fedavg(), scheduler, engine, model="batch_norm", data=data, spec=spec)
        for engine in ("loop", "stacked")
    }
    for each in small.values():
        run(each, 6)
    mine, its = (each.federation.state.buffers for each in small.values())
    torch.testing.assert_close(mine.floating, its.floating, rtol=1e-10, atol=1e-12)
    assert torch.equal(mine.integers, its.integers)


@every_scheduler
def test_observers_see_the_message_that_each_update_answers(scheduler: str) -> None:
    sent: dict[int, Tensor] = {}
    seen: list[Observed] = []
    small = federate(fedavg(weighting="uniform"), scheduler, "stacked", observers=[seen.append])
    for _ in range(6):
        sent[small.federation.state.version] = small.federation.model.clone()
        run(small, 1)
    assert {o.version for o in seen} >= {0, 1}
    for observed in seen:
        assert torch.equal(observed.message.vectors["x"], sent[observed.version])
        assert (observed.block.base_version == observed.version).all()


class Damaged:
    """An engine whose client 1 sends what is not finite."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def collect(self, ids: Ids, base_version: Ids, weigh: Any = None) -> Iterator[UpdateBlock | Failed]:
        for answer in self.inner.collect(ids, base_version):
            if isinstance(answer, UpdateBlock):
                answer.vectors["delta"][torch.from_numpy(answer.ids == 1)] = float("nan")
            yield answer


@pytest.mark.parametrize("scheduler", ["immediate", "buffer"])
def test_a_client_that_sends_what_is_not_finite_never_stops_the_run(scheduler: str) -> None:
    small = federate(fedavg(weighting="uniform"), scheduler)
    small.federation.engine = Damaged(small.engine)  # type: ignore[assignment]
    refused = 0
    for _ in range(12):
        outcome = small.federation.run_window()
        assert outcome.error is None
        refused += outcome.record["refused"]
    assert refused > 0
    assert small.federation.model.isfinite().all()


@every_scheduler
def test_a_device_that_never_answers_holds_nobody_up(scheduler: str) -> None:
    small = federate(fedavg(weighting="uniform"), scheduler, devices=devices(lost=0))
    folded: set[int] = set()
    for _ in range(10):
        outcome = small.federation.run_window()
        columns = outcome.clients.columns
        folded |= {
            c
            for c, v in zip(columns.get("client", []), columns.get("verdict", []), strict=True)
            if v == "accepted"
        }
    assert 0 not in folded
    assert folded >= {1, 2, 3}


def test_the_answer_of_a_client_that_has_left_does_not_count() -> None:
    small = federate(fedavg(weighting="uniform"), "window")
    left = everybody(population=N)._replace(
        left=lambda ids: np.where(ids == 4, 2, NEVER), size=lambda window: N - (window >= 2)
    )
    small.federation.membership = Membership(*left)
    # Client 4 takes 1.1 s: it would answer in the third window, and has left when that begins.
    folded = [small.federation.run_window().clients.columns for _ in range(4)]
    verdicts = [
        v for c in folded for i, v in zip(c.get("client", []), c.get("verdict", []), strict=True) if i == 4
    ]
    assert "accepted" not in verdicts


def test_a_client_with_a_state_waits_for_the_commit_of_its_answer() -> None:
    strategy = feddyn()
    small = federate(strategy, "buffer")
    for _ in range(8):
        table_before = set(small.engine.sent)
        assert len({client for client, _ in table_before}) == len(table_before)
        run(small, 1)


def test_every_answer_is_computed_once_and_at_most_those_in_flight_are_computed_ahead() -> None:
    small = federate(fedavg(weighting="uniform"), "immediate", "stacked", block=3)
    trained: list[int] = []
    train = small.engine.trainer.train

    def recording(work: Any, *rest: Any) -> Any:
        trained.extend(work.ids.tolist())
        return train(work, *rest)

    small.engine.trainer.train = recording  # type: ignore[method-assign]
    run(small, 10)
    assert len(trained) == 10 + len(small.engine.ready)
    assert len(small.engine.ready) <= len(small.engine.sent) <= 4


def test_answers_of_one_moment_are_events_of_their_own() -> None:
    small = federate(fedavg(weighting="uniform"), "immediate", devices=instant())
    received = [small.federation.run_window().record["received"] for _ in range(6)]
    assert received == [1] * 6
    assert small.federation.engine.now == 0.0
    assert all(not isinstance(e, Arrived) or len(e.ids) == 1 for *_, e in small.engine.clock._queue)
