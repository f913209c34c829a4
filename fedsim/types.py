"""The messages between strategy, engine and clients.

They are typed also where there is no wire. A block holds b >= 1 clients: a remote client sends b = 1,
a stacked engine b = 64 or more; an object per client would cost more than the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.vector import Vector

if TYPE_CHECKING:
    from fedsim.buffers import Buffers
    from fedsim.local import LocalSpec

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Message(NamedTuple):
    """What the server sends to every client of one version.

    On the server `vectors` are flat [D]; the driver hands the client Vectors. ``msg.x`` is short for
    ``msg.vectors["x"]``.

    Args:
        vectors: named, model-sized.
        scalars: named 0-d float64 tensors.
    """

    vectors: Mapping[str, Any]  # Any: Tensor [D] on the server, Vector on the client
    scalars: Mapping[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        for group in (self.vectors, self.scalars):
            if name in group:
                return group[name]
        raise AttributeError(f"the message holds no {name!r}")


class Batch(NamedTuple):
    """One mini-batch of one client, as the driver hands it to `direction`.

    Args:
        inputs: [B, ...] after the data's training transform.
        targets: [B] or [B, T].
        mask: [B] 1 for a real row, 0 for padding.
        lr: 0-d, the local rate of this round.
        index: 0-d int64, number of this local step, from 0.
        total: 0-d int64, local steps of this client.
        epoch_start: 0-d bool, first batch of a local epoch.
        active: 0-d bool, False where the driver masks this step out.
        weight: 0-d, share of the client's examples in this batch; a `full` phase sums to 1 with it.
        buffers: the model's current buffers by name.
        noise: Vector of standard normal draws if the gradient function declares that it needs one.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    lr: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks a batch for
    total: Tensor
    epoch_start: Tensor
    active: Tensor
    weight: Tensor
    buffers: Mapping[str, Tensor] = {}
    noise: Vector | tuple[()] = ()


class Aux(NamedTuple):
    """What a gradient evaluation yields beside the gradient.

    Args:
        loss: 0-d, mean over the real rows.
        metrics: named 0-d means over the real rows.
        buffers: the model's buffers after this evaluation.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]


GradFn = Callable[[Vector, Batch], tuple[Vector, Aux]]


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """All registered clients, as the server knows them when a run begins.

    Args:
        size: N.
        examples: [N] int64, examples of each, or None where the server does not know.
        rates: [N] float64 in [0, 1], long-run share of the windows in which each takes part; durations:
            [N] float64 > 0, seconds of a task of each. Both are there only for strategies that ask for
            them (``Traits.needs``).
    """

    size: int
    examples: Ids | None = None
    rates: Floats | None = None
    durations: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """b clients that start from one version under the same instructions.

    Args:
        ids: [b] client ids in cohort order.
        version: of the model they start from.
        round_index, attempt: keys of the random streams.
        message: flat broadcast.
        lend: ids -> named tensors with a leading b, or (); asked for block by block.
        buffers: the model's buffers of this version.
        spec: local training, rates already those of this round.
        steps: [b] local steps where the strategy or a device limits them, else None.
    """

    ids: Ids
    version: int
    round_index: int
    attempt: int
    message: Message
    lend: Callable[[Ids], Any]  # Any: a mapping of tensors, or ()
    buffers: Buffers
    spec: LocalSpec
    steps: Ids | None = None


class Summed(NamedTuple):
    """A block's updates, added up by the engine: all that `fold_deltas` asks of them.

    Args:
        weights: [b] float64, by which.
        delta: [D] float64, Σ weights · updates.
        norms: [b] float64, L2 of each update, None where nobody asks; all updates are finite.
    """

    weights: Floats
    delta: Tensor
    norms: Floats | None


@dataclass(frozen=True, slots=True, eq=False)
class UpdateBlock:
    """The answers of b clients.

    Args:
        ids, base_version, examples, local_steps: [b] int64.
        normaliser: [b] float64, sum of effective local step lengths; NaN where there is none.
        train_seconds: [b] float64.
        vectors: {name: [b, D]}; every name that the strategy's `finish` reports.
        scalars: {name: [b] float64}.
        metrics: {name: [b] float64}, not used by aggregation.
        buffers, int_buffers: [b, Db] floating and [b, Di] integer buffers, None without any.
        state_version: [b] int64, how many updates of that client were accepted before this one.
        release: where the vectors are mapped from a file: gives the memory back that reading them took;
            they can be read again. None where they are in memory.
        summed: instead of "delta" in `vectors`, where the engine was told that their sum is enough.
    """

    ids: Ids
    base_version: Ids
    examples: Ids
    local_steps: Ids
    normaliser: Floats
    train_seconds: Floats
    vectors: Mapping[str, Tensor]
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Floats] = field(default_factory=dict)
    buffers: Tensor | None = None
    int_buffers: Tensor | None = None
    state_version: Ids | None = None
    release: Callable[[], None] | None = None
    summed: Summed | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: npt.NDArray[Any]) -> UpdateBlock:
        """The block restricted to `rows` (a mask or indices)."""
        assert self.summed is None, "a sum cannot be taken apart"
        index = torch.from_numpy(np.flatnonzero(rows) if rows.dtype == np.bool_ else rows)

        def pick(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        return UpdateBlock(
            self.ids[rows],
            self.base_version[rows],
            self.examples[rows],
            self.local_steps[rows],
            self.normaliser[rows],
            self.train_seconds[rows],
            {k: pick(v) for k, v in self.vectors.items()},
            {k: pick(v) for k, v in self.scalars.items()},
            {k: v[rows] for k, v in self.metrics.items()},
            None if self.buffers is None else pick(self.buffers),
            None if self.int_buffers is None else pick(self.int_buffers),
            None if self.state_version is None else self.state_version[rows],
        )


class Meta(NamedTuple):
    """What `weigh` may see of b updates: never the tensors.

    Args:
        ids, base_version, examples, local_steps: [b] int64.
        server_version: now.
        staleness: [b] int64, server_version - base_version.
        normaliser: [b], sum of effective local step lengths; train_seconds: [b], dispatch to arrival.
        state_version: [b] int64, how many updates of that client were accepted before this one.
        scalars: {name: [b] float64} of the client's report.
        window: index of the open window.
        joined: [b] int64, window in which each client was first registered.
        opened_at, now: seconds of the run's clock.
    """

    ids: Ids
    base_version: Ids
    server_version: int
    staleness: Ids
    examples: Ids
    local_steps: Ids
    normaliser: Floats
    train_seconds: Floats
    state_version: Ids
    scalars: Mapping[str, Floats]
    window: int
    joined: Ids
    opened_at: float = 0.0
    now: float = 0.0

    def take(self, rows: Bools) -> Meta:
        """The clients of a mask [b]."""
        picked: dict[str, Any] = {
            name: value[rows] for name, value in self._asdict().items() if isinstance(value, np.ndarray)
        }
        return self._replace(**picked, scalars={n: v[rows] for n, v in self.scalars.items()})


def joined_metas(parts: Sequence[Meta]) -> Meta | None:
    """One `Meta` of the blocks of a window, in order; None of none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    first = parts[0]._asdict()
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name, value in first.items()
        if isinstance(value, np.ndarray)
    }
    scalars = {n: np.concatenate([part.scalars[n] for part in parts]) for n in parts[0].scalars}
    return parts[0]._replace(**joined, scalars=scalars)


class WindowInfo(NamedTuple):
    """The window that `apply` closes.

    Args:
        window, version: index of the window and version before `apply`.
        ids: [n] clients folded, in fold order.
        N: registered clients.
        joined: [n] window in which each of `ids` was first registered.
        opened_at, closed_at: seconds of the run's clock.
        refused, late, lost: numbers of clients.
        meta: of the clients folded, [n] in the order of `ids`; None where there is nobody.
    """

    window: int
    version: int
    ids: Ids
    N: int
    joined: Ids
    opened_at: float
    closed_at: float
    refused: int
    late: int
    lost: int
    meta: Meta | None = None
