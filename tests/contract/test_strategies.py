"""What every registered strategy promises, whatever its mathematics (the list is in docs/strategies.md).

Relabelling, empty windows, checkpoints, refused answers, dtypes and shapes, truthful traits. That
simulation equals deployment is tested with the server; convergence with each strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.checkpoint import load_tree, read_file, save_tree, write_file
from fedsim.data.federated import FederatedData
from fedsim.errors import AllRefused
from fedsim.rows import RowStore
from fedsim.transform import Observed
from fedsim.types import GradFn, UpdateBlock
from tests.contract.registered import STRATEGIES, placed, registered
from tests.federations import SIZES, SPEC, Small, build, nobody, random_data

# Equality of the two is tested in test_engines.py; these run in the slower one with the slow tests.
ENGINES = [pytest.param("loop", marks=pytest.mark.slow), "stacked"]


def run(small: Small, rounds: int) -> Tensor:
    for _ in range(rounds):
        assert small.federation.run_window().error is None
    return small.federation.model.clone()


def relabelled(data: FederatedData, order: list[int]) -> FederatedData:
    """Client j of the result is client order[j] of `data`."""
    index = np.concatenate([data.rows(client) for client in order])
    sizes = data.sizes[order]
    return replace(data, index=index, offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_relabelling_the_clients_changes_nothing(name: str, engine: str) -> None:
    # One batch of all data, so that the order in which a client sees its examples does not matter.
    spec = replace(SPEC, batch_size=0, epochs=3)
    data, order = random_data(), [3, 0, 4, 2, 1]
    models = [
        run(build(registered(name), engine=engine, spec=spec, data=d), 3)
        for d in (data, relabelled(data, order))
    ]
    assert (models[0] - models[1]).norm() <= 1e-11 * models[0].norm()


@pytest.mark.parametrize("rounds_before", [0, 1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_window_without_clients_leaves_the_model_and_a_state_that_can_be_saved(
    name: str, rounds_before: int
) -> None:
    small = build(registered(name), quorum=0)
    run(small, rounds_before)
    before = small.federation.model.clone()
    sample, small.federation.sample = small.federation.sample, lambda *_: np.empty(0, np.int64)
    outcome = small.federation.run_window()
    assert outcome.error is None
    assert outcome.record["outcome"] == "empty"
    assert outcome.record["received"] == 0
    assert torch.equal(small.federation.model, before)
    state = small.federation.state
    assert state.round_index == rounds_before + 1
    tensors, text = save_tree(state)
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    again = load_tree(state, tensors, text)
    assert_same_tree(again, state)
    small.federation.sample = sample
    assert run(small, 1).isfinite().all()
    assert not torch.equal(small.federation.model, before)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_availability_under_which_nobody_can_take_part_is_an_empty_window(name: str) -> None:
    small = build(registered(name), quorum=0, available=nobody)
    before = small.federation.model.clone()
    assert torch.equal(run(small, 2), before)


def assert_same_tree(one: Any, other: Any) -> None:
    leaves, structure = pytree.tree_flatten(one)
    others, same = pytree.tree_flatten(other)
    assert structure == same
    for a, b in zip(leaves, others, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, np.ndarray):
            assert np.array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("saved_after", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("state_at", [None, "server"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_killed_after_a_checkpoint_continues_bit_for_bit(
    name: str, state_at: str | None, saved_after: int, engine: str, tmp_path: Path
) -> None:
    def fresh(folder: Path) -> Small:
        # Three of five clients a round, so that some have a state and some have none.
        return build(placed(name, state_at), engine=engine, cohort=3, folder=folder)

    rounds = 3
    whole = fresh(tmp_path / "whole")
    run(whole, rounds)

    killed = fresh(tmp_path / "killed")
    run(killed, saved_after)
    tensors, text = save_tree(killed.federation.state)
    write_file(tmp_path / "state.safetensors", tensors, {"state": text})
    indices = []
    for store in (killed.store, killed.federation.rows):
        indices.append((store.index(), dict(store.layout)))
        store.pin()
    # What it goes on to do is lost, but has been written into the same folder.
    run(killed, 1)

    resumed = fresh(tmp_path / "killed")
    tensors, metadata = read_file(tmp_path / "state.safetensors")
    resumed.federation.state = load_tree(resumed.federation.state, tensors, metadata["state"])
    for store, (index, layout) in zip((resumed.store, resumed.federation.rows), indices, strict=True):
        store.restore(index, layout)
    run(resumed, rounds - saved_after)

    assert_same_tree(resumed.federation.state, whole.federation.state)
    assert_same_rows(resumed.store, whole.store)
    assert_same_rows(resumed.federation.rows, whole.federation.rows)


def assert_same_rows(one: RowStore, other: RowStore) -> None:
    everyone = np.arange(len(one.slot_of))
    assert np.array_equal(one.version_of, other.version_of)
    assert np.array_equal(one.has(everyone), other.has(everyone))
    known = everyone[one.has(everyone)]
    if len(known):
        rows, others = one.read(known), other.read(known)
        assert rows.keys() == others.keys()
        assert all(torch.equal(values, others[part]) for part, values in rows.items())


class Fault:
    """A gradient function that yields NaN while it is broken."""

    def __init__(self) -> None:
        self.broken = False

    def __call__(self, inner: GradFn) -> GradFn:
        def grad_fn(x: Any, batch: Any) -> Any:
            gradient, aux = inner(x, batch)
            return (gradient * float("nan"), aux) if self.broken else (gradient, aux)

        return grad_fn


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("state_at", [None, pytest.param("server", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_answers_refused_and_retried_leave_the_same_run_as_one_without_the_fault(
    name: str, state_at: str | None, engine: str
) -> None:
    fault = Fault()
    clean = build(placed(name, state_at), engine=engine)
    faulty = build(placed(name, state_at), engine=engine, grad=fault)
    for round_index in range(3):
        fault.broken = round_index > 0
        if fault.broken:
            before = faulty.federation.state
            outcome = faulty.federation.run_window()
            assert isinstance(outcome.error, AllRefused)
            assert outcome.record["outcome"] == "failed"
            assert outcome.record["refused"] == len(SIZES)
            state = faulty.federation.state
            assert_same_tree(state._replace(failures=0), before)
            assert_same_rows(faulty.store, clean.store)
            assert_same_rows(faulty.federation.rows, clean.federation.rows)
            fault.broken = False
        run(clean, 1)
        run(faulty, 1)
    assert_same_tree(faulty.federation.state, clean.federation.state)
    assert_same_rows(faulty.store, clean.store)
    assert_same_rows(faulty.federation.rows, clean.federation.rows)


class Corrupting:
    """An engine whose answers from one client arrive damaged while `client` is set."""

    def __init__(self, small: Small) -> None:
        self.inner = small.engine
        self.client: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def collect(self, ids: Any, base_version: Any, weigh: Any = None) -> Iterator[Any]:
        for answer in self.inner.collect(ids, base_version):
            if isinstance(answer, UpdateBlock) and self.client in answer.ids:
                row = int(np.flatnonzero(answer.ids == self.client)[0])
                vectors = {n: v.clone() for n, v in answer.vectors.items()}
                for values in vectors.values():
                    values[row, 0] = float("inf")
                answer = replace(answer, vectors=vectors)
            yield answer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_refused_answer_counts_as_if_that_client_had_not_been_asked(name: str, engine: str) -> None:
    refused = 2
    others = np.array([i for i in range(len(SIZES)) if i != refused])
    damaged = build(registered(name), engine=engine, block=2)
    absent = build(registered(name), engine=engine, block=2)
    run(damaged, 1)
    run(absent, 1)
    corrupting = Corrupting(damaged)
    damaged.federation.engine = corrupting
    corrupting.client = refused
    outcome = damaged.federation.run_window()
    assert outcome.record["refused"] == 1
    assert outcome.record["received"] == len(others)
    assert (refused, "the update is not finite") in outcome.reasons
    everyone, absent.federation.sample = absent.federation.sample, lambda *_: others
    run(absent, 1)
    one, other = damaged.federation.model, absent.federation.model
    assert (one - other).norm() <= 1e-11 * one.norm()
    # Its own state is the one from before, so the next round agrees too.
    corrupting.client = None
    absent.federation.sample = everyone
    one, other = run(damaged, 1), run(absent, 1)
    assert (one - other).norm() <= 1e-11 * one.norm()
    assert np.array_equal(damaged.store.version_of, absent.store.version_of)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_dtypes_and_shapes_are_kept(name: str, engine: str, dtype: torch.dtype) -> None:
    seen: list[Observed] = []
    small = build(registered(name), engine=engine, dtype=dtype, observers=[seen.append])
    size = small.place.spec.size

    def kinds() -> list[tuple[torch.dtype, torch.Size]]:
        return [(t.dtype, t.shape) for t in tensors_of(small.federation.state)]

    first = kinds()
    for _ in range(2):
        run(small, 1)
        assert kinds() == first
        assert small.federation.model.dtype == dtype
        assert small.federation.model.shape == (size,)
        assert small.federation.model.isfinite().all()
    for observed in seen:
        assert all(v.dtype == dtype and v.shape == (size,) for v in observed.message.vectors.values())
        assert all(s.dtype == torch.float64 and s.ndim == 0 for s in observed.message.scalars.values())
        rows = (len(observed.block), size)
        assert all(v.dtype == dtype and v.shape == rows for v in observed.block.vectors.values())
        assert all(s.dtype == torch.float64 for s in observed.block.scalars.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_applying_a_window_writes_into_nothing_that_was_there(name: str) -> None:
    small = build(registered(name))
    for _ in range(2):
        before = small.federation.state
        copy = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, before)
        run(small, 1)
        assert_same_tree(before, copy)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_tensor_of_the_state_keeps_a_graph(name: str) -> None:
    small = build(registered(name))
    run(small, 2)
    assert not any(t.requires_grad for t in tensors_of(small.federation.state))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_arrival_does_not_matter(name: str) -> None:
    from fedsim.simulation.devices import instant

    def slow(order: list[float]) -> Any:
        return instant()._replace(seconds=lambda ids, steps, window: np.array(order)[ids])

    models = [
        run(build(registered(name), devices=slow(order)), 2)
        for order in ([1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0])
    ]
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])
