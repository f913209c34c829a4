"""From the answers of a window to what `apply` receives: streamed sums, sums by pieces, or all rows.

Sums are held in float64 and added in the order in which the engine plans its blocks, never in the
order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.strategy import Strategy
from fedsim.types import Floats, Ids, UpdateBlock, WindowInfo


@dataclass(slots=True)
class Sums:
    """Named float64 sums; memory of one vector a name, however many clients answer."""

    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            total = self.totals.get(name)
            if total is None:
                self.totals[name] = value.double().clone()
            else:
                total.add_(value)

    def result(self) -> dict[str, Tensor]:
        return self.totals


@dataclass(slots=True)
class Pieces:
    """Sums of answers that lie in files: made for some entries of the model at a time, when they are applied.

    Two float64 vectors and what `apply` makes of them are several times a large model. A strategy that is
    `columnwise` gives the same bits if it sees the model piece by piece, and then nothing but the new state
    is as long as the model. Answers in memory are added to `sums` at once, as they would only fill it.

    Args:
        strategy: a columnwise one; width: entries of a piece; most: files that are open at a time.
    """

    strategy: Strategy
    width: int = 1 << 16
    most: int = 1024
    sums: Sums = field(default_factory=Sums)
    kept: list[tuple[Any, UpdateBlock, Floats]] = field(default_factory=list)

    def takes(self, block: UpdateBlock) -> bool:
        """Whether to keep this block for later."""
        if block.release is None or len(block) != 1:
            return False
        return all(rows.shape[1] > self.width for rows in block.vectors.values())

    def keep(self, state: Any, block: UpdateBlock, weights: Floats) -> None:
        """Fold this block under `state` when the sums are made, after what was added or kept before."""
        _release([block])
        self.kept.append((state, block, weights))
        if len(self.kept) >= self.most:
            self.fold_kept()

    def add(self, sums: Mapping[str, Tensor]) -> None:
        self.fold_kept()
        self.sums.add(sums)

    def fold_kept(self) -> None:
        """Make the sums of all that was kept, whole."""
        kept, self.kept = self.kept, []
        for state, block, weights in kept:
            self.sums.add(_sums_of(self.strategy, state, block, weights))
            _release([block])

    def result(self) -> dict[str, Tensor]:
        self.fold_kept()
        return self.sums.result()

    def apply(self, state: Any, info: WindowInfo) -> tuple[Any, Mapping[str, float]]:
        """The strategy's `apply` on the sums."""
        if not self.kept:
            return self.strategy.apply(state, self.sums.result(), info)
        size = len(self.strategy.model(state))
        leaves, structure = pytree.tree_flatten(state)
        new: list[Any] = []
        metrics: Mapping[str, float] = {}
        for start in range(0, size, self.width):
            cut = partial(_cut, size=size, part=slice(start, start + self.width))
            reduced = self._sums(cut)
            old = [cut(leaf) for leaf in leaves]
            after, metrics = self.strategy.apply(pytree.tree_unflatten(old, structure), reduced, info)
            found, same = pytree.tree_flatten(after)
            assert same == structure, "a columnwise strategy keeps the structure of its state"
            if not start:
                new = [_whole(*three) for three in zip(leaves, old, found, strict=True)]
            for whole, leaf, piece in zip(new, leaves, found, strict=True):
                if whole is not leaf and isinstance(whole, Tensor) and len(whole) == size:
                    whole[start : start + self.width] = piece
            _release([block for _, block, _ in self.kept])
        return pytree.tree_unflatten(new, structure), metrics

    def _sums(self, cut: Callable[[Any], Any]) -> dict[str, Tensor]:
        """Of some entries."""
        sums = Sums()
        if self.sums.totals:
            sums.add({name: cut(total) for name, total in self.sums.totals.items()})
        for state, block, weights in self.kept:
            vectors = {name: cut(rows[0]).unsqueeze(0) for name, rows in block.vectors.items()}
            part = replace(block, vectors=vectors)
            sums.add(_sums_of(self.strategy, pytree.tree_map(cut, state), part, weights))
        return sums.result()


@dataclass(slots=True)
class Rows:
    """All answers of a window as [n, D] matrices, in client-id order, read by column blocks.

    A client that answered twice has its rows in the order of the versions that it started from, which is
    that of its answers, whatever the order in which an engine computed them.

    The blocks stay where the engine put them; a rule that reads `columns` never makes an n × D copy.
    """

    blocks: list[UpdateBlock] = field(default_factory=list)
    weights_of: list[Floats] = field(default_factory=list)

    def add(self, block: UpdateBlock, weights: Floats) -> None:
        self.blocks.append(block)
        self.weights_of.append(weights)

    def result(self) -> Rows:
        return self

    def __len__(self) -> int:
        return sum(len(b) for b in self.blocks)

    @property
    def _order(self) -> Ids:
        ids = np.concatenate([b.ids for b in self.blocks])
        versions = np.concatenate([b.base_version for b in self.blocks])
        return np.lexsort((versions, ids)).astype(np.int64)

    @property
    def ids(self) -> Ids:
        """[n] ascending."""
        return np.concatenate([b.ids for b in self.blocks])[self._order]

    @property
    def weights(self) -> Floats:
        """[n] what `weigh` gave, in the same order."""
        return np.concatenate(self.weights_of)[self._order]

    def columns(self, name: str = "delta", *, width: int = 2048) -> Iterator[Tensor]:
        """[n, <= width] blocks of the named matrix, left to right."""
        order = torch.from_numpy(self._order)
        size = self.blocks[0].vectors[name].shape[1]
        for start in range(0, size, width):
            parts = [b.vectors[name][:, start : start + width] for b in self.blocks]
            yield torch.cat(parts)[order.to(parts[0].device)]

    def matrix(self, name: str = "delta") -> Tensor:
        """[n, D], copied; for rules that need it whole and for tests."""
        return torch.cat(list(self.columns(name)), dim=1)


def _sums_of(strategy: Strategy, state: Any, block: UpdateBlock, weights: Floats) -> Mapping[str, Tensor]:
    assert not isinstance(strategy.fold, str)
    sums, rows = strategy.fold(state, block, weights, None)
    assert not rows, "a columnwise strategy makes no rows"
    return sums


def _cut(leaf: Any, *, size: int, part: slice) -> Any:
    """These entries of what is as long as the model; anything else as it is."""
    return leaf[part] if isinstance(leaf, Tensor) and leaf.shape == (size,) else leaf


def _whole(leaf: Any, old: Any, found: Any) -> Any:
    """Room for all pieces of a new leaf, or what the leaf is where `apply` makes nothing new of it."""
    if old is leaf:  # it was not cut
        return found
    assert isinstance(leaf, Tensor)
    assert isinstance(found, Tensor)
    unchanged = found.data_ptr() == old.data_ptr() and found.dtype == old.dtype
    return leaf if unchanged else torch.empty(len(leaf), dtype=found.dtype)


def _release(blocks: Iterable[UpdateBlock]) -> None:
    for block in blocks:
        if block.release is not None:
            block.release()
