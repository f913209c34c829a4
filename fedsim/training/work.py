"""What a trainer is: the drivers of virtual clients behind one contract, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from fedsim.buffers import Buffers
from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.training.clients import ClientData
from fedsim.types import Floats, GradFn, Ids, Message, Summed
from fedsim.vector import Vector


@dataclass(frozen=True, slots=True, eq=False)
class Workplace:
    """What every virtual client of a run shares.

    Args:
        module: the model, for its buffers' names; never holds a client's values.
        spec, floating, integers: layouts of parameters and buffers.
        grad_fn: the gradient of the mini-batch loss, or what replaces it.
        clients: their data.
        seed: of the run.
    """

    module: nn.Module
    spec: ParamSpec
    floating: ParamSpec | None
    integers: ParamSpec | None
    grad_fn: GradFn
    clients: ClientData
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a block of C clients is to do.

    Args:
        ids, steps: [C] clients and their local steps.
        rounds: [C] keys of their random streams.
        spec: local training, the same for all.
        message: flat broadcast, [D]; one for each client, [C, D] and scalars [C], where `mixed`.
        lent: named tensors with a leading C, or ().
        buffers: of the model, [Db]; [C, Db] where `mixed`.
        mixed: the clients start from different versions.
        weights: [C], where their weighted sum is all that is wanted of the updates; a trainer may make rows
            all the same.
        norms: whether somebody asks how long each update is, where `weights` are there.
    """

    ids: Ids
    steps: Ids
    rounds: Ids
    spec: LocalSpec
    message: Message
    lent: Any
    buffers: Buffers
    mixed: bool = False
    weights: Floats | None = None
    norms: bool = True


class Trained(NamedTuple):
    """What a block of C clients comes back with, before transforms.

    Args:
        vectors: {name: [C, D]}, without "delta" where it is summed; scalars: {name: [C]}.
        states: pytree of what each client keeps, leaves with a leading C.
        normaliser: [C]; metrics: {name: [C]}, ``loss`` among them.
        buffers, int_buffers: [C, Db], [C, Di] or None.
        steps: [C] local steps taken.
        examples: [C] where the clients say themselves, else None.
        summed: the updates by the weights of the work.
    """

    vectors: Mapping[str, Tensor]
    scalars: Mapping[str, Tensor]
    states: Any
    normaliser: Floats
    metrics: Mapping[str, Floats]
    buffers: Tensor | None
    int_buffers: Tensor | None
    steps: Ids
    examples: Ids | None = None
    summed: Summed | None = None


class ClientFailed(Exception):
    """One client's own training raised: an event of the round, not an error of the run."""

    def __init__(self, client: int, reason: str) -> None:
        super().__init__(f"client {client}: {reason}")
        self.client = client
        self.reason = reason


class Trainer(Protocol):
    """Runs a local algorithm for blocks of clients."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int:
        """Most clients of a block."""
        ...

    def plan(self, steps: Ids) -> list[Ids]:
        """Positions 0 … b-1 cut into blocks; deterministic, and the order of folding."""
        ...

    def train(self, work: Work, algorithm: LocalAlgorithm, states: Any) -> Trained:
        """Train a block; `states` as in `Trained`."""
        ...


def client_message(message: Message, spec: ParamSpec) -> Message:
    """The broadcast as the client sees it: Vectors, views of the flat tensors."""
    return Message({n: spec.unflatten(v) for n, v in message.vectors.items()}, message.scalars)


def client_lent(lent: Any, spec: ParamSpec) -> Any:
    """Lent rows as the client sees them: [b, D] becomes Vectors of stacks, [b] stays."""
    if isinstance(lent, tuple):
        return lent
    return {
        name: spec.unflatten(rows) if rows.ndim == 2 and rows.shape[1] == spec.size else rows
        for name, rows in lent.items()
    }


def buffer_dict(place: Workplace, buffers: Buffers) -> dict[str, Tensor]:
    """A model's buffers by name, in the shapes and dtypes of the module (with a leading C if stacked)."""
    out: dict[str, Tensor] = {}
    for spec, flat in ((place.floating, buffers.floating), (place.integers, buffers.integers)):
        if spec is not None:
            out.update(spec.unflatten(flat).tensors)
    return out


def flatten_buffers(spec: ParamSpec | None, buffers: Mapping[str, Tensor], *, stacked: bool) -> Tensor | None:
    """[C, Db] (or [1, Db] of one client) of the named buffers in `spec`."""
    if spec is None:
        return None
    named = Vector({name: buffers[name].to(spec.dtype) for name in spec.names})
    flat = spec.flatten(named, stacked=stacked)
    return flat if stacked else flat.unsqueeze(0)


def by_size(steps: Ids, block: int) -> list[Ids]:
    """Clients sorted by local steps, most first (ties in cohort order), cut into blocks."""
    order = np.argsort(-steps, kind="stable").astype(np.int64)
    return [order[start : start + block] for start in range(0, len(order), block)]


def by_work(steps: Ids, block: int) -> list[Ids]:
    """As many blocks as `by_size` cuts, but each with about as many steps as the others.

    Clients with many steps then share a block with few others, and whoever computes a block is as long at
    it as at any other. None holds more than 2 · `block` clients.
    """
    order = np.argsort(-steps, kind="stable").astype(np.int64)
    count = -(-len(order) // block)
    work = np.cumsum(steps[order] + 1.0)  # a client without a step takes time too
    parts: list[Ids] = []
    start = 0
    for left in range(count, 0, -1):
        wanted = (work[-1] - (work[start - 1] if start else 0.0)) / left
        end = int(np.searchsorted(work, wanted + (work[start - 1] if start else 0.0))) + 1
        # Enough for those who come to fill the others, and no more than these can hold.
        least = max(start + 1, len(order) - (left - 1) * 2 * block)
        most = min(start + 2 * block, len(order) - (left - 1))
        end = min(max(end, least), most)
        parts.append(order[start:end])
        start = end
    return parts
