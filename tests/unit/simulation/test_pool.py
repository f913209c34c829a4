"""Worker processes compute what this process would have computed, bit for bit, however many there are."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim import row_segments
from fedsim.buffers import no_buffers
from fedsim.config import to_dict
from fedsim.errors import ConfigError
from fedsim.local import LocalSpec
from fedsim.opaque_client import LocalData, LocalTask, Result, opaque
from fedsim.schedulers import buffer, immediate
from fedsim.simulation.devices import instant
from fedsim.simulation.flat import FlatTrainer
from fedsim.simulation.fused import FusedTrainer
from fedsim.simulation.opaque import OpaqueTrainer
from fedsim.simulation.pool import Pool, device_of
from fedsim.simulation.pool_process import Recipe, why_no_fork
from fedsim.simulation.run import Simulation
from fedsim.simulation.stacked import StackedTrainer
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.feddyn import feddyn
from fedsim.strategies.fedspeed import fedspeed
from fedsim.strategies.median import median
from fedsim.strategies.scaffold import scaffold
from fedsim.training.loop import LoopTrainer
from fedsim.training.work import Trainer, Workplace
from fedsim.transform import Observed, UpdateTransform
from fedsim.types import Task, UpdateBlock
from tests.federations import SIZES, Small, build, random_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

Hire = Callable[..., Pool]


@pytest.fixture
def hire() -> Iterator[Hire]:
    """Pools that end with the test."""
    pools: list[Pool] = []

    def hired(workers: int, **parameters: Any) -> Pool:
        pools.append(Pool(workers, **parameters))
        return pools[-1]

    yield hired
    for pool in pools:
        pool.close()


class Seen(NamedTuple):
    """All that a run shows."""

    models: list[Tensor]
    records: list[dict[str, Any]]
    clients: list[dict[str, list[Any]]]
    states: dict[str, Tensor]
    buffers: Tensor


def seen(small: Small, pool: Pool | None = None, *, windows: int = 3) -> Seen:
    """Run some windows, with these workers or in this process."""
    if pool is not None:
        small.engine.crew = pool
    models, records, clients = [], [], []
    for _ in range(windows):
        outcome = small.federation.run_window()
        assert outcome.error is None
        models.append(small.federation.model.clone())
        records.append(outcome.record)
        clients.append(outcome.clients.columns)
    ids = np.flatnonzero(small.store.has(np.arange(len(SIZES))))
    states = small.store.read(ids.astype(np.int64)) if len(ids) else {}
    return Seen(models, records, clients, states, small.federation.state.buffers.floating)


def assert_same(one: Seen, other: Seen) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.models, other.models, strict=True))
    assert one.records == other.records
    assert repr(one.clients) == repr(other.clients)  # of numbers that may be nan
    assert one.states.keys() == other.states.keys()
    assert all(torch.equal(rows, other.states[name]) for name, rows in one.states.items())
    assert torch.equal(one.buffers, other.buffers)


TRAINERS: dict[str, Callable[[Workplace], Trainer]] = {
    "loop": LoopTrainer,
    "flat": FlatTrainer,
    "stacked": lambda place: StackedTrainer(place, 2),
    "fused": lambda place: FusedTrainer(place, 2),
}
PLAIN = LocalSpec(epochs=2, batch_size=4, lr=0.1)


@pytest.mark.parametrize(
    ("trainer", "workers"), [*((name, 2) for name in TRAINERS), ("stacked", 1), ("loop", 3)]
)
def test_numbers_do_not_depend_on_the_number_of_workers(hire: Hire, trainer: str, workers: int) -> None:
    def small() -> Small:
        return build(scaffold(), trainer=TRAINERS[trainer], spec=PLAIN)

    pool = hire(workers)
    assert_same(seen(small()), seen(small(), pool))
    assert len(pool.pids) == workers


@pytest.mark.parametrize("large", [8, 1 << 20], ids=["by calls", "mapped"])
@pytest.mark.parametrize(("trainer", "workers"), [("loop", 2), ("fused", 2), ("stacked", 3)])
def test_workers_read_and_write_states_in_the_files_of_the_store(
    hire: Hire, trainer: str, workers: int, large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_segments, "SEGMENT_BYTES", 1 << 11)
    monkeypatch.setattr(row_segments, "_LARGE_ROW", large)

    def small(folder: Path | None = None) -> Small:
        return build(scaffold(), trainer=TRAINERS[trainer], spec=PLAIN, folder=folder)

    filed = small(tmp_path)
    sent: list[int] = []
    stage = filed.store.stage

    def staged(ids: Any, rows: Any) -> None:
        sent.append(len(rows))
        stage(ids, rows)

    filed.store.stage = staged  # type: ignore[method-assign]
    assert_same(seen(small()), seen(filed, hire(workers)))
    assert sent[0] > 0  # before the first rows nobody knows what they look like
    assert not any(sent[len(sent) // 3 :])  # of three windows


class Memories(NamedTuple):
    """State of a transform."""

    error: Tensor


def signs_with_memory() -> UpdateTransform:
    def encode(state: Memories, vectors: Any, keys: Any) -> Any:
        wanted = vectors["delta"] + state.error
        message = {"signs": wanted.sign().to(torch.int8), "step": torch.full((len(wanted),), 0.02)}
        return message, Memories(wanted - 0.02 * wanted.sign())

    def decode(message: Any) -> Any:
        return {"delta": message["signs"].double() * message["step"].unsqueeze(1)}

    return UpdateTransform(lambda v: Memories(torch.zeros_like(v["delta"])), encode, decode)


def trained_by_hand(model: nn.Module, data: LocalData, task: LocalTask) -> Result:
    """One step of the client's own."""
    model.zero_grad()
    if task.client == 3:
        raise ValueError("no power")
    loss = nn.functional.cross_entropy(model(data.inputs), data.targets)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= task.lr * parameter.grad
    return Result(model, metrics={"loss": float(loss.detach())}, examples=len(data) + 1)


FEDERATIONS: dict[str, Callable[[], Small]] = {
    "a statistic of all rows": lambda: build(median(), engine="stacked", block=2),
    "a state of the client": lambda: build(feddyn(), engine="stacked", block=2),
    "several phases": lambda: build(fedspeed(), engine="stacked", block=2),
    "a transform with state": lambda: build(
        fedavg(), engine="stacked", block=2, transform=signs_with_memory()
    ),
    "buffers": lambda: build(fedavg(), model="batch_norm", data=random_data(sizes=(12, 6, 8, 7, 4))),
    "a function of the user's": lambda: build(
        fedavg(), trainer=lambda place: OpaqueTrainer(place, opaque(trained_by_hand))
    ),
    "personal layers": lambda: build(fedavg(), engine="stacked", block=2, personal=("2.",)),
}


@pytest.mark.parametrize("what", FEDERATIONS)
def test_all_that_passes_between_processes_comes_back_as_it_was(hire: Hire, what: str) -> None:
    assert_same(seen(FEDERATIONS[what]()), seen(FEDERATIONS[what](), hire(2)))


@pytest.mark.parametrize("scheduler", ["immediate", "buffer"])
@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_an_asynchronous_run_with_blocks_computed_ahead_is_the_same(
    hire: Hire, scheduler: str, engine: str
) -> None:
    devices = instant()._replace(seconds=lambda ids, steps, r: 0.3 + 0.2 * ids)

    def small() -> Small:
        kind = immediate(cohort=4) if scheduler == "immediate" else buffer(cohort=4, population=5, size=2)
        return build(fedavg(), engine=engine, block=3, scheduler=kind, devices=devices)

    pool = hire(2)
    assert_same(seen(small(), windows=8), seen(small(), pool, windows=8))
    assert len(pool.pids) == (2 if engine == "loop" else 1)  # of a stack, one block is enough


def test_a_client_whose_training_raises_is_a_failure_of_the_round_only(hire: Hire) -> None:
    small = FEDERATIONS["a function of the user's"]()
    small.engine.crew = hire(2)
    outcome = small.federation.run_window()
    assert outcome.record["lost"] == 1
    assert outcome.record["received"] == 4
    assert outcome.reasons == ((3, "ValueError: no power"),)


def test_another_error_is_raised_here_with_the_traceback_of_the_worker(hire: Hire) -> None:
    def broken(inner: Any) -> Any:
        def grad_fn(x: Any, batch: Any) -> Any:
            raise LookupError("no such thing")

        return grad_fn

    small = build(fedavg(), grad=broken)
    pool = small.engine.crew = hire(2)
    with pytest.raises(LookupError, match="no such thing") as caught:
        small.federation.run_window()
    assert "in grad_fn" in str(caught.value.__cause__)
    assert pool.pids == []


def test_an_error_of_fedsim_keeps_its_code(hire: Hire) -> None:
    def refused(inner: Any) -> Any:
        def grad_fn(x: Any, batch: Any) -> Any:
            raise ConfigError("not like this", code="FS-CFG-004", hint="like that")

        return grad_fn

    small = build(fedavg(), grad=refused)
    small.engine.crew = hire(1)
    with pytest.raises(ConfigError) as caught:
        small.federation.run_window()
    assert (caught.value.code, caught.value.hint) == ("FS-CFG-004", "like that")


def test_what_workers_log_is_logged_here(hire: Hire, caplog: pytest.LogCaptureFixture) -> None:
    def talkative(inner: Any) -> Any:
        import logging

        def grad_fn(x: Any, batch: Any) -> Any:
            logging.getLogger("mine").warning("lr=%s", float(batch.lr))
            return inner(x, batch)

        return grad_fn

    small = build(fedavg(), grad=talkative, spec=LocalSpec(steps=1, batch_size=4, lr=0.5))
    pool = small.engine.crew = hire(1)
    small.federation.run_window()
    assert [r.message for r in caplog.records if r.name == "mine"] == [f"worker={pool.pids[0]} lr=0.5"] * 5


def large(clients: int) -> Small:
    """Answers of 64 KiB and more, so that a slot for each would be seen."""

    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 900), nn.ReLU(), nn.Linear(900, 3))

    spec = LocalSpec(steps=1, batch_size=2, lr=0.1)
    return build(fedavg(), model=wide, spec=spec, data=random_data(sizes=(2,) * clients))


def test_memory_does_not_grow_with_the_cohort(hire: Hire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.simulation.pool.AHEAD_BYTES", 1 << 18)
    held = []
    for clients in (8, 40):
        small, pool = large(clients), hire(2)
        small.engine.crew = pool
        for _ in range(2):
            small.federation.run_window()
        held.append(pool.arena.bytes)
    assert held[0] == held[1]
    assert held[0] <= 6 * (1 << 18)


def test_whoever_keeps_a_block_keeps_its_numbers(hire: Hire) -> None:
    def kept_by_an_observer(pool: Pool | None) -> list[UpdateBlock]:
        blocks: list[UpdateBlock] = []

        def keep(observed: Observed) -> None:
            blocks.append(observed.block)

        small = build(fedavg(), engine="stacked", block=2, observers=[keep])
        if pool is not None:
            small.engine.crew = pool
        for _ in range(4):
            small.federation.run_window()
        return blocks

    pool = hire(2)
    alone, together = kept_by_an_observer(None), kept_by_an_observer(pool)
    assert len(alone) == len(together) == 12
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.vectors["delta"], other.vectors["delta"])
        assert one.metrics["loss"].tolist() == other.metrics["loss"].tolist()


def test_a_round_that_is_given_up_half_way_leaves_nothing_behind(hire: Hire) -> None:
    def given_up(small: Small) -> Seen:
        task = small.federation
        real, calls = small.federation.strategy.fold, []
        assert not isinstance(real, str)

        def fold(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise InterruptedError
            return real(*arguments)

        task.strategy = task.strategy._replace(fold=fold)
        with pytest.raises(InterruptedError):
            task.run_window()
        small.engine.cancel()
        return seen(small, windows=2)

    with_workers = build(scaffold())
    with_workers.engine.crew = hire(2)
    assert_same(given_up(build(scaffold())), given_up(with_workers))


def test_two_collections_can_be_under_way_and_one_be_left_behind(hire: Hire) -> None:
    small = build(fedavg(), data=random_data(sizes=(4,) * 12))
    small.engine.crew = hire(2)
    state = small.federation.state.strategy
    message = small.federation.strategy.broadcast(state)

    def collected(version: int) -> Iterator[Any]:
        ids = np.arange(12, dtype=np.int64)
        small.engine.submit(Task(ids, version, 0, 0, message, lambda some: (), no_buffers(), PLAIN))
        return small.engine.collect(ids, np.full(12, version, np.int64))

    left, kept = collected(0), collected(1)
    first, second = next(left), next(kept)
    assert [first.base_version.tolist(), second.base_version.tolist()] == [[0], [1]]
    del left
    whole = [second, *kept]
    assert [int(block.ids[0]) for block in whole] == list(range(12))
    assert torch.equal(first.vectors["delta"], whole[0].vectors["delta"])
    again = list(collected(2))
    assert all(torch.equal(a.vectors["delta"], b.vectors["delta"]) for a, b in zip(whole, again, strict=True))


def test_a_closed_pool_has_no_process_and_starts_again_when_it_is_asked(hire: Hire) -> None:
    small = build(fedavg())
    pool = small.engine.crew = hire(2)
    small.federation.run_window()
    first = pool.pids
    small.engine.close()
    assert pool.pids == []
    assert not any(alive(pid) for pid in first)
    small.federation.run_window()
    assert len(pool.pids) == 2


def alive(pid: int) -> bool:
    """Whether there is such a process, also as one that has ended and nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_pool_that_is_forgotten_ends_its_workers() -> None:
    small = build(fedavg())
    small.engine.crew = Pool(2)
    small.federation.run_window()
    pids, forgotten = small.engine.crew.pids, weakref.ref(small.engine.crew)
    assert all(alive(pid) for pid in pids)
    del small
    gc.collect()
    assert forgotten() is None
    assert not any(alive(pid) for pid in pids)


def test_a_run_of_python_objects_has_no_workers_that_are_programs_of_their_own(
    hire: Hire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.pool_process.why_no_fork", lambda device: "there is a GPU")
    small = build(fedavg())
    small.engine.crew = hire(2, recipe=Recipe({}, ["model", "transform"]))
    with pytest.raises(ConfigError, match="there is a GPU") as caught:
        small.federation.run_window()
    assert caught.value.code == "FS-CFG-140"
    assert "model, transform" in (caught.value.why or "")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_a_worker_that_is_a_program_of_its_own_builds_the_same_run(
    hire: Hire, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    def simulation() -> Simulation:
        return Simulation(
            strategy="scaffold",
            engine=engine,
            sample=4,
            rounds=3,
            sections={"data": {"partition": {"clients": 6}}, "client": {"steps": 3}, "engine": {"block": 2}},
        )

    alone, together = simulation(), simulation()
    pool = together.engine.crew = hire(2, recipe=Recipe(to_dict(together.config), together.python_objects))
    monkeypatch.setattr("fedsim.simulation.pool_process.why_no_fork", lambda device: "a test")
    for one, other in zip(alone, together, strict=True):
        assert {**one, "time": None} == {**other, "time": None}
    assert torch.equal(alone.federation.model, together.federation.model)
    assert len(pool.pids) == 2


def test_what_a_fork_would_break_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(os.environ, "GRPC_ENABLE_FORK_SUPPORT", "0")
    assert why_no_fork(None) is None
    assert why_no_fork("cpu") is None
    assert "cuda:1" in (why_no_fork("cuda:1") or "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "GPU" in (why_no_fork("cpu") or "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "grpc", torch)
    monkeypatch.delitem(os.environ, "GRPC_ENABLE_FORK_SUPPORT")
    assert "gRPC" in (why_no_fork(None) or "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in (why_no_fork(None) or "")


def test_workers_take_the_devices_in_turn() -> None:
    assert [device_of(k, ["cuda:0", "cuda:1"]) for k in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert device_of(3, ["cuda:0"]) == "cuda:0"
    assert device_of(3, []) is None


SCRIPT = """
import fedsim, torch
from torch import nn
from fedsim.simulation.pool import Pool

def net():
    return nn.Linear(600, 10)

sim = fedsim.Simulation(
    model=net, data="synthetic", rounds=2, sample=4,
    sections={
        "data": {"clients": 4, "examples": 60, "features": 600, "partition": {"clients": 4, "kind": "iid"}},
        "engine": {"block": 2},
    },
)
sim.engine.crew = Pool(2)
for record in sim:
    print(record["round"], record["received"])
print(len(sim.engine.crew.pids))
"""


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    lines = ended.stdout.splitlines()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert lines[-1] == "2"
    assert [line.split()[0] for line in lines[:-1]] == ["0", "1", "2"]
