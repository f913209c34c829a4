"""Buffers across clients: weighted means of statistics, counters of the heaviest client."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.buffers import BufferFold, Buffers, no_buffers
from fedsim.local import LocalSpec
from fedsim.strategies.fedavg import fedavg
from fedsim.types import UpdateBlock
from tests.federations import SPEC, build, random_data


def block(ids: list[int], floating: torch.Tensor | None, integers: torch.Tensor | None) -> UpdateBlock:
    count = len(ids)
    ones = np.ones(count, np.int64)
    return UpdateBlock(
        np.array(ids),
        ones,
        ones,
        ones,
        np.ones(count),
        np.ones(count),
        {},
        buffers=floating,
        int_buffers=integers,
    )


def test_statistics_are_averaged_by_weight_over_all_blocks() -> None:
    fold = BufferFold(Buffers(torch.zeros(2), torch.zeros(0, dtype=torch.int64)))
    fold.add(block([0, 1], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None), np.array([1.0, 3.0]))
    fold.add(block([2], torch.tensor([[5.0, 6.0]]), None), np.array([4.0]))
    result = fold.result()
    torch.testing.assert_close(result.floating, torch.tensor([(1 + 9 + 20) / 8, (2 + 12 + 24) / 8]))
    assert result.floating.dtype == torch.float32


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_counters_are_those_of_the_heaviest_client_ties_to_the_lower_id(order: list[int]) -> None:
    blocks = [
        (block([7, 4], None, torch.tensor([[7], [4]])), np.array([2.0, 2.0])),
        (block([1, 9], None, torch.tensor([[1], [9]])), np.array([1.0, 2.0])),
    ]
    fold = BufferFold(Buffers(torch.empty(0), torch.zeros(1, dtype=torch.int64)))
    for position in order:
        fold.add(*blocks[position])
    assert fold.result().integers.tolist() == [4]


def test_without_answers_they_stay() -> None:
    start = Buffers(torch.tensor([1.5]), torch.tensor([3]))
    assert all(torch.equal(a, b) for a, b in zip(BufferFold(start).result(), start, strict=True))
    assert no_buffers().bytes == 0
    assert start.bytes == 4 + 8


def test_batch_normalisation_statistics_are_the_weighted_mean_of_the_clients() -> None:
    sizes = (8, 4, 12)
    spec = LocalSpec(epochs=1, batch_size=4, lr=0.1)
    blocks: list[UpdateBlock] = []
    small = build(
        fedavg(),
        model="batch_norm",
        data=random_data(sizes=sizes),
        spec=spec,
        observers=[lambda seen: blocks.append(seen.block)],
    )
    small.federation.run_window()
    sent = {int(b.ids[0]): b for b in blocks}
    assert sorted(sent) == [0, 1, 2]
    mean = sum(n * sent[i].buffers[0] for i, n in enumerate(sizes)) / sum(sizes)  # type: ignore[index]
    state = small.federation.state.buffers
    torch.testing.assert_close(state.floating, mean, rtol=0, atol=1e-12)
    # Batches that the heaviest client, of twelve examples, has seen.
    assert state.integers.tolist() == [3]
    assert [int(sent[i].int_buffers[0]) for i in range(3)] == [2, 1, 3]  # type: ignore[index]


def test_the_model_itself_never_holds_a_clients_statistics() -> None:
    small = build(fedavg(), model="batch_norm", data=random_data(sizes=(4, 8)))
    before = {n: b.clone() for n, b in small.place.module.named_buffers()}
    small.federation.run_window()
    assert all(torch.equal(b, before[n]) for n, b in small.place.module.named_buffers())


def test_with_full_batches_the_stacked_engine_agrees_on_model_and_statistics() -> None:
    results = []
    for engine in ("loop", "stacked"):
        small = build(
            fedavg(),
            engine=engine,
            model="batch_norm",
            data=random_data(sizes=(8, 4, 12, 4)),
            spec=replace(SPEC, epochs=2),
        )
        for _ in range(2):
            small.federation.run_window()
        results.append(small.federation)
    one, other = results
    torch.testing.assert_close(one.model, other.model, rtol=0, atol=1e-10)
    torch.testing.assert_close(one.state.buffers.floating, other.state.buffers.floating, rtol=0, atol=1e-10)
    assert torch.equal(one.state.buffers.integers, other.state.buffers.integers)


def test_statistics_enter_the_next_round() -> None:
    small = build(fedavg(), model="batch_norm", data=random_data(sizes=(4, 8)))
    small.federation.run_window()
    first = small.federation.state.buffers
    small.federation.run_window()
    # Two batches of the heavier client in each of two passes of each of two rounds.
    assert first.integers.tolist() == [4]
    assert small.federation.state.buffers.integers.tolist() == [8]
