"""RowStore against a dict: staging, commits, checkpoints, and crashes at any moment."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedsim import row_segments
from fedsim.errors import EnvironmentProblem
from fedsim.rows import RowStore

POPULATION = 6
CLIENTS = st.lists(st.integers(0, POPULATION - 1), min_size=1, max_size=4, unique=True)


def values_for(ids: list[int], stamp: int) -> dict[str, torch.Tensor]:
    """Rows whose content tells the client and the write."""
    return {
        "c": torch.tensor([[100.0 * i + stamp, -stamp] for i in ids]),
        "count": torch.tensor([stamp + i for i in ids], dtype=torch.int64),
    }


class Machine(RuleBasedStateMachine):
    """The store beside two dicts: what is committed, and what the last checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.store = RowStore(POPULATION, self.folder)
        self.stamp = 0
        self.staged: dict[int, int] = {}
        self.committed: dict[int, int] = {}
        self.versions = [0] * POPULATION
        self.saved: tuple[Any, Any, dict[int, int], list[int]] | None = None

    def teardown(self) -> None:
        self.temporary.cleanup()

    @rule(ids=CLIENTS)
    def stage(self, ids: list[int]) -> None:
        self.stamp += 1
        self.store.stage(np.array(ids), values_for(ids, self.stamp))
        self.staged |= dict.fromkeys(ids, self.stamp)

    @rule(ids=CLIENTS)
    def commit(self, ids: list[int]) -> None:
        self.store.commit(np.array(ids))
        for client in ids:
            self.versions[client] += 1
            if client in self.staged:
                self.committed[client] = self.staged[client]
        self.staged = {}

    @rule()
    def discard(self) -> None:
        self.store.discard()
        self.staged = {}

    @rule()
    def checkpoint(self) -> None:
        index = {name: values.copy() for name, values in self.store.index().items()}
        self.saved = (index, dict(self.store.layout), dict(self.committed), list(self.versions))
        self.store.pin()

    @precondition(lambda self: self.saved is not None)
    @rule()
    def crash(self) -> None:
        assert self.saved is not None
        index, layout, committed, versions = self.saved
        self.store = RowStore(POPULATION, self.folder)
        self.store.restore(index, layout)
        self.staged, self.committed, self.versions = {}, dict(committed), list(versions)

    @invariant()
    def holds_what_was_committed(self) -> None:
        everyone = np.arange(POPULATION)
        assert self.store.has(everyone).tolist() == [i in self.committed for i in range(POPULATION)]
        assert self.store.version_of.tolist() == self.versions
        self.check(self.store, self.committed)

    @invariant()
    def the_checkpoint_stays_readable(self) -> None:
        if self.saved is not None:
            index, layout, committed, _ = self.saved
            again = RowStore(POPULATION, self.folder)
            again.restore(index, layout)
            self.check(again, committed)

    def check(self, store: RowStore, expected: dict[int, int]) -> None:
        ids = sorted(expected)
        if not ids:
            return
        read = store.read(np.array(ids))
        for row, client in enumerate(ids):
            wanted = values_for([client], expected[client])
            assert all(torch.equal(read[name][row], value[0]) for name, value in wanted.items())


@pytest.fixture(autouse=True, params=["mapped", "by calls"])
def small_segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a segment, so that stores of six clients have several files; as small or as large rows."""
    monkeypatch.setattr(row_segments, "SEGMENT_BYTES", 16)
    if request.param == "by calls":
        monkeypatch.setattr(row_segments, "_LARGE_ROW", 8)


def test_any_sequence_of_operations_and_crashes_matches_a_dict() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )


def test_a_commit_between_taking_the_index_and_pinning_it_does_not_lose_the_index(tmp_path: Path) -> None:
    store = RowStore(POPULATION, tmp_path)
    store.stage(np.array([0]), values_for([0], 1))
    store.commit(np.array([0]))
    index, layout = {n: v.copy() for n, v in store.index().items()}, dict(store.layout)
    for stamp in (2, 3, 4):
        store.stage(np.array([0]), values_for([0], stamp))
        store.commit(np.array([0]))
        if stamp == 2:
            store.pin()  # the file with the index has reached the disk
    again = RowStore(POPULATION, tmp_path)
    again.restore(index, layout)
    assert torch.equal(again.read(np.array([0]))["c"], values_for([0], 1)["c"])


@settings(deadline=None, max_examples=30)
@given(CLIENTS, CLIENTS)
def test_in_memory_it_behaves_the_same(first: list[int], second: list[int]) -> None:
    store = RowStore(POPULATION)
    store.stage(np.array(first), values_for(first, 1))
    assert not store.has(np.arange(POPULATION)).any()
    store.commit(np.array(second))
    kept = [i for i in first if i in second]
    assert np.flatnonzero(store.has(np.arange(POPULATION))).tolist() == sorted(kept)
    if kept:
        assert torch.equal(store.read(np.array(kept))["c"], values_for(kept, 1)["c"])


def test_reading_a_client_without_a_row_names_it() -> None:
    with pytest.raises(KeyError, match="client 3"):
        RowStore(POPULATION).read(np.array([3]))


def test_what_was_read_is_a_copy() -> None:
    store = RowStore(POPULATION)
    store.stage(np.array([0]), values_for([0], 1))
    store.commit(np.array([0]))
    store.read(np.array([0]))["c"].zero_()
    assert torch.equal(store.read(np.array([0]))["c"], values_for([0], 1)["c"])


def test_nothing_to_keep_costs_no_row_and_still_counts_versions() -> None:
    store = RowStore(POPULATION)
    store.stage(np.array([0, 1]), {})
    store.commit(np.array([1]))
    assert not store.has(np.arange(POPULATION)).any()
    assert store.version_of.tolist() == [0, 1, 0, 0, 0, 0]


def test_rows_of_touched_clients_only_take_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(row_segments, "SEGMENT_BYTES", 1 << 12)
    store = RowStore(1_000_000, tmp_path)
    ids = np.array([999_999, 5])
    store.stage(ids, {"c": torch.ones(2, 100)})
    store.commit(ids)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 13


def test_slots_are_used_again_so_that_space_does_not_grow_with_rounds(tmp_path: Path) -> None:
    store = RowStore(POPULATION, tmp_path)
    sizes = []
    for stamp in range(12):
        ids = [0, 1, 2]
        store.stage(np.array(ids), values_for(ids, stamp))
        store.commit(np.array(ids))
        store.index()
        store.pin()
        sizes.append(len(list(tmp_path.iterdir())))
    assert len(set(sizes[3:])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "in a folder"])
def test_every_dtype_of_a_state_can_be_kept(dtype: torch.dtype, mapped: bool, tmp_path: Path) -> None:
    store = RowStore(POPULATION, tmp_path if mapped else None)
    given_rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).to(dtype)
    scalars = torch.tensor([1.0, 0.0]).to(dtype)
    store.stage(np.array([2, 4]), {"v": given_rows, "s": scalars})
    store.commit(np.array([2, 4]))
    read = store.read(np.array([4, 2]))
    assert read["v"].dtype == dtype
    assert torch.equal(read["v"], given_rows.flip(0))
    assert torch.equal(read["s"], scalars.flip(0))


def test_another_process_reads_and_stages_rows_where_they_lie(tmp_path: Path) -> None:
    store, both = RowStore(POPULATION, tmp_path), np.array([4, 1])
    assert store.at(both) is None  # nobody knows yet what rows look like
    store.stage(np.array([1]), values_for([1], 7))
    assert store.at(both) is None  # one of them has a row aside
    store.commit(np.array([1]))
    assert RowStore(POPULATION).at(both) is None
    assert store.at(np.array([2, 2])) is None

    at = store.at(both)
    assert at is not None
    found = at.read()
    assert all(torch.equal(found[name], rows) for name, rows in values_for([1], 7).items())
    at.write(values_for([4, 1], 8))
    assert all(torch.equal(store.read(np.array([1]))[n], r) for n, r in values_for([1], 7).items())
    assert not store.has(np.array([4])).any()
    store.commit(np.array([1]))
    assert all(torch.equal(store.read(np.array([1]))[n], r) for n, r in values_for([1], 8).items())
    assert not store.has(np.array([4])).any()

    nobody = store.at(np.array([0]))
    assert nobody is not None
    assert [len(rows) for rows in nobody.read().values()] == [0, 0]
    nobody.write(values_for([0], 9))
    store.discard()
    assert not store.has(np.array([0])).any()
    index, layout = store.index(), dict(store.layout)
    again = RowStore(POPULATION, tmp_path)
    again.restore(index, layout)
    assert all(torch.equal(again.read(np.array([1]))[n], r) for n, r in values_for([1], 8).items())


def test_rows_stay_where_they_are_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, ids = RowStore(POPULATION, Path("states")), np.array([0, 1, 2])
    store.stage(ids[:1], values_for([0], 1))
    store.commit(ids[:1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    at = store.at(ids)
    assert at is not None
    assert all(torch.equal(at.read()[n], r) for n, r in values_for([0], 1).items())
    at.write(values_for([0, 1, 2], 2))
    store.commit(ids)
    assert all(torch.equal(store.read(ids)[n], r) for n, r in values_for([0, 1, 2], 2).items())
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_is_gone_is_an_error_and_no_rows_of_zeros(tmp_path: Path) -> None:
    store, ids = RowStore(POPULATION, tmp_path / "before"), np.array([0])
    store.stage(ids, values_for([0], 1))
    store.commit(ids)
    at = store.at(ids)
    assert at is not None
    (tmp_path / "before").rename(tmp_path / "after")
    row_segments._opened.cache_clear()
    with pytest.raises(EnvironmentProblem) as caught:
        at.read()
    assert caught.value.code == "FS-ENV-024"
    with pytest.raises(EnvironmentProblem):
        at.write(values_for([0], 2))
    assert not (tmp_path / "before").exists()


class Few(io.FileIO):
    """Reads a few bytes at a time."""

    def readinto(self, into: Any) -> int | None:
        return super().readinto(memoryview(into)[:5])


def test_large_rows_survive_calls_that_move_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_segments, "_LARGE_ROW", 8)
    write = os.write
    store, ids = RowStore(POPULATION, tmp_path), np.array([3, 0, 5])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, content: write(handle, bytes(content[:3])))
        store.stage(ids, values_for([3, 0, 5], 4))
    store.commit(ids)
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: Few(path, mode))
    assert all(torch.equal(store.read(ids)[n], r) for n, r in values_for([3, 0, 5], 4).items())


def test_a_full_disk_and_a_file_that_is_gone_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_segments, "_LARGE_ROW", 8)
    store, ids = RowStore(POPULATION, tmp_path), np.array([0])
    store.stage(ids, values_for([0], 1))
    store.commit(ids)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(EnvironmentProblem, match="no space left") as caught:
            store.stage(np.array([1]), values_for([1], 1))
    assert caught.value.code == "FS-ENV-021"
    for file in tmp_path.iterdir():
        os.truncate(file, 3)
    with pytest.raises(EnvironmentProblem, match="cannot be read") as caught:
        store.read(ids)
    assert caught.value.code == "FS-ENV-024"


def test_held_vectors_are_those_committed_and_zero_for_everybody_else() -> None:
    store = RowStore(5)
    like = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(
        store.held(np.array([0, 3]), "dual", like=like), torch.zeros(2, 2, dtype=torch.float64)
    )
    duals, others = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 7)
    store.stage(np.array([1, 3]), {"dual": duals, "other": others})
    assert not store.held(np.array([3]), "dual", like=like).any()  # not yet committed
    store.commit(np.array([1, 3]))
    held = store.held(np.array([3, 0, 1]), "dual", like=like)
    assert held.dtype == torch.float64
    assert held.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]


@pytest.mark.parametrize("width", [4, 1 << 15], ids=["small rows together", "large rows one by one"])
def test_rows_of_any_size_come_back_from_many_segments(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_segments, "SEGMENT_BYTES", 1 << 18)
    monkeypatch.setattr(row_segments, "_LARGE_ROW", 1 << 16)
    store, rng = RowStore(40_000), np.random.default_rng(0)
    ids = rng.choice(40_000, 3 if width > 4 else 30_000, replace=False)
    values = torch.arange(len(ids) * width, dtype=torch.float32).reshape(len(ids), width)
    store.stage(ids, {"v": values})
    store.commit(ids)
    order = rng.permutation(len(ids))
    assert torch.equal(store.read(ids[order])["v"], values[torch.from_numpy(order)])


def test_of_a_client_that_answers_twice_in_a_window_the_last_row_stays() -> None:
    store = RowStore(POPULATION)
    rows = {"v": torch.tensor([[1.0], [2.0], [3.0]])}
    store.stage(np.array([5, 2, 5]), rows)
    store.commit(np.array([5, 2, 5]))
    assert store.read(np.array([2, 5]))["v"].tolist() == [[2.0], [3.0]]
    assert store.version_of.tolist() == [0, 0, 1, 0, 0, 2]
