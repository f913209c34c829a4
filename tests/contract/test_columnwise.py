"""A strategy that says it is columnwise gives the same bits when it sees the model piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.engine import Failed
from fedsim.reduce import Pieces
from fedsim.strategy import Strategy
from fedsim.types import Ids, UpdateBlock
from tests.contract.registered import with_defaults
from tests.contract.test_strategies import assert_same_tree
from tests.federations import Small, build

ROUNDS = 3


def columnwise() -> dict[str, Strategy]:
    return {name: strategy for name, strategy in with_defaults().items() if strategy.traits.columnwise}


def one_by_one(small: Small, released: list[int], *, mapped: bool) -> None:
    """Answers as a coordinator has them: a block a client, and as if each were mapped from a file."""
    engine: Any = small.federation.engine
    collect = engine.collect

    def single(ids: Ids, base_version: Ids, weigh: Any = None) -> Iterator[UpdateBlock | Failed]:
        for block in collect(ids, base_version):
            for row in range(len(block)):
                one = block.take(np.array([row]))
                client = int(one.ids[0])
                yield replace(one, release=partial(released.append, client)) if mapped else one

    engine.collect = single


def trained(strategy: Strategy, released: list[int], *, mapped: bool) -> Small:
    small = build(strategy, cohort=3)
    one_by_one(small, released, mapped=mapped)
    for _ in range(ROUNDS):
        assert small.federation.run_window().error is None
    return small


@pytest.mark.parametrize("most", [2, 100])
@pytest.mark.parametrize("name", sorted(columnwise()))
def test_pieces_of_a_model_give_the_bits_of_the_whole(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = columnwise()[name]
    whole = trained(strategy, [], mapped=False)
    released: list[int] = []
    monkeypatch.setattr(Pieces, "__init__", partialmethod(Pieces.__init__, width=7, most=most))
    by_pieces = trained(strategy, released, mapped=True)
    assert_same_tree(by_pieces.federation.state, whole.federation.state)
    # Memory of a file is given back after its norm, and again after every piece.
    pieces = -(-whole.place.spec.size // 7)
    assert len(released) > ROUNDS * 3
    if most == 100:
        assert len(released) == ROUNDS * 3 * (1 + pieces)


def test_answers_in_memory_are_not_kept() -> None:
    released: list[int] = []
    small = build(columnwise()["fedavg"], cohort=3)
    one_by_one(small, released, mapped=True)
    assert small.federation.run_window().error is None  # smaller than a piece
    assert not released


def test_a_large_sum_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    plain = Pieces._sums

    def watched(self: Pieces, cut: Any) -> dict[str, Tensor]:
        nonlocal longest
        sums = plain(self, cut)
        longest = max(longest, *(total.numel() for total in sums.values()))
        return sums

    monkeypatch.setattr(Pieces, "__init__", partialmethod(Pieces.__init__, width=7))
    monkeypatch.setattr(Pieces, "_sums", watched)
    small = trained(columnwise()["fedavg"], [], mapped=True)
    assert longest == 7
    assert torch.isfinite(small.federation.model).all()
