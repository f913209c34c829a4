"""The answers of one window: checked, weighed, shown to observers, and added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.buffers import BufferFold, Buffers
from fedsim.client_log import ClientLog
from fedsim.engine import Refused
from fedsim.reduce import Pieces, Rows, Sums
from fedsim.rows import RowStore
from fedsim.strategy import Strategy
from fedsim.transform import Observed, Observer, UpdateTransform
from fedsim.types import Bools, Floats, Ids, Message, Meta, UpdateBlock, joined_metas

NOT_FINITE = "the update is not finite"
NO_WEIGHT = "the update has no weight"


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """Where the server stands while a window's answers are folded.

    Args:
        window, version: of the open window and of the model.
        state: of the strategy; buffers: of the model.
        opened_at, now: seconds of the run's clock.
        messages: that the answers can be to, by version.
    """

    window: int
    version: int
    state: Any
    buffers: Buffers
    opened_at: float
    now: float
    messages: Mapping[int, Message]


@dataclass(slots=True)
class Folding:
    """What has been folded of the open window.

    Args:
        strategy: whose `weigh` and `fold` decide.
        rows: what the server holds for each client; new rows are staged there.
        transform: to decode, None for none.
        observers: called with what a curious server sees.
        joined: ids -> windows in which they were registered.
        weigh_bytes: one client's message -> bytes on the wire.
        asynchronous: answers may be stale, and the records say how much.
    """

    strategy: Strategy
    rows: RowStore
    transform: UpdateTransform | None
    observers: Sequence[Observer]
    joined: Callable[[Ids], Ids]
    weigh_bytes: Callable[[Any], int]
    asynchronous: bool
    reduced: Sums | Pieces | Rows
    buffers: BufferFold
    clients: ClientLog = field(default_factory=ClientLog)
    done: Ids = field(default_factory=lambda: np.empty(0, np.int64))  # rows of the window's table
    kept: list[Meta] = field(default_factory=list)
    bytes_up: int = 0
    loss: float = 0.0
    loss_weight: float = 0.0

    def add(self, block: UpdateBlock, at: Moment) -> list[Refused]:
        """Fold one block; returns who was refused, and why."""
        bytes_up = self._bytes_up(block, at)
        if self.transform is not None:
            block = replace(block, vectors=self.transform.decode(block.vectors))
        norms, finite = update_norms(block)
        meta = self._meta(block, at)
        weights, unwanted = self.strategy.weigh(at.state, meta)
        weightless = finite & (unwanted | ~np.isfinite(weights))
        keep = finite & ~weightless
        reasons = None
        if not keep.all():
            pairs = zip(keep, finite, strict=True)
            reasons = [None if k else NO_WEIGHT if f else NOT_FINITE for k, f in pairs]
        staleness = meta.staleness if self.asynchronous else None
        self.clients.add(block, reasons, norms, bytes_up, staleness=staleness)
        self.bytes_up += bytes_up * len(block)
        refused = [
            Refused(block.ids[mask], reason, block.base_version[mask])
            for mask, reason in ((~finite, NOT_FINITE), (weightless, NO_WEIGHT))
            if mask.any()
        ]
        if keep.any():
            if not keep.all():
                block, weights, meta = block.take(keep), weights[keep], meta.take(keep)
            self._show(block, at)
            self._fold(block, weights, at)
            self.kept.append(meta)
        return refused

    def weigh(self, block: UpdateBlock, at: Moment) -> Floats | None:
        """Weights of answers that are not there yet; None if somebody would be refused."""
        weights, unwanted = self.strategy.weigh(at.state, self._meta(block, at))
        return None if unwanted.any() or not np.isfinite(weights).all() else weights

    @property
    def sums_are_enough(self) -> bool:
        """Whether nobody looks at the updates themselves."""
        alone = self.transform is None and not self.observers and not self.asynchronous
        return self.strategy.traits.sums_only and alone

    @property
    def meta(self) -> Meta | None:
        """Of all clients folded, in fold order; None of nobody."""
        return joined_metas(self.kept)

    @property
    def measured(self) -> dict[str, float]:
        """For the record: the clients' mean training loss, and how stale their answers were."""
        record: dict[str, float] = {}
        if self.loss_weight > 0:
            record["train_loss"] = self.loss / self.loss_weight
        meta = self.meta if self.asynchronous else None
        if meta is not None:
            record |= {"staleness": float(meta.staleness.mean()), "staleness_max": int(meta.staleness.max())}
        return record

    def _bytes_up(self, block: UpdateBlock, at: Moment) -> int:
        """Of one client."""
        if block.summed is None:
            sent: Any = pytree.tree_map(lambda rows: rows[0], dict(block.vectors))
        else:
            sent = self.strategy.model(at.state)  # as long as the update
        return self.weigh_bytes(sent) + 8 * len(block.scalars) + at.buffers.bytes

    def _fold(self, block: UpdateBlock, weights: Floats, at: Moment) -> None:
        if isinstance(self.reduced, Rows):
            self.reduced.add(block, weights)
        elif isinstance(self.reduced, Pieces) and self.reduced.takes(block):
            self.reduced.keep(at.state, block, weights)
        else:
            assert not isinstance(self.strategy.fold, str)
            sums, new_rows = self.strategy.fold(at.state, block, weights, self.rows)
            self.reduced.add(sums)
            self.rows.stage(block.ids, new_rows)
        self.buffers.add(block, weights)
        if "loss" in block.metrics:
            seen = block.examples.astype(np.float64)
            for part in (block.metrics["loss"] * seen).tolist():  # one by one, however they share blocks
                self.loss += part
            self.loss_weight += float(seen.sum())

    def _show(self, block: UpdateBlock, at: Moment) -> None:
        """Every observer sees the updates beside the message that they answer."""
        if not self.observers:
            return
        versions = np.unique(block.base_version).tolist()
        for version in versions:
            part = block if len(versions) == 1 else block.take(block.base_version == version)
            for observer in self.observers:
                observer(Observed(at.window, version, at.messages[version], part))

    def _meta(self, block: UpdateBlock, at: Moment) -> Meta:
        versions = block.state_version
        return Meta(
            block.ids,
            block.base_version,
            at.version,
            at.version - block.base_version,
            block.examples,
            block.local_steps,
            block.normaliser,
            block.train_seconds,
            np.zeros(len(block), np.int64) if versions is None else versions,
            {name: values.double().cpu().numpy() for name, values in block.scalars.items()},
            at.window,
            self.joined(block.ids),
            at.opened_at,
            at.now,
        )


def update_norms(block: UpdateBlock) -> tuple[Floats | None, Bools]:
    """[b] L2 norm of all that a client reported as "delta" (or of the first vector), and finiteness.

    None where the updates were added up without their norms.
    """
    finite = np.ones(len(block), bool)
    norms: Floats | None = np.zeros(len(block)) if block.summed is None else block.summed.norms
    for position, rows in enumerate(block.vectors.values()):
        norm, entries = row_norms(rows)
        finite &= entries
        if position == 0:
            norms = norm
    for values in block.scalars.values():
        finite &= torch.isfinite(values).cpu().numpy()
    if block.buffers is not None:
        finite &= torch.isfinite(block.buffers).all(dim=1).cpu().numpy()
    return norms, finite


def row_norms(rows: Tensor) -> tuple[Floats, Bools]:
    """[b] L2 norms of rows [b, D], and which rows are finite."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    finite = torch.isfinite(norm)
    if not bool(finite.all()):
        # A norm may overflow where no entry does: look at the entries.
        finite = torch.isfinite(rows).all(dim=1)
        norm = torch.where(finite, torch.linalg.vector_norm(rows.double(), dim=1).to(norm.dtype), norm)
    return norm.double().cpu().numpy(), finite.cpu().numpy()
