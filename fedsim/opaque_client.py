"""A client that is a user's own training function over its whole data set.

The loop and remote drivers run it; only strategies that need no direction of their own accept it.

    @fedsim.opaque
    def train(model, data, task):
        optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
        for inputs, targets in data.loader(batch_size=32, seed=task.seed):
            ...
        return fedsim.Result(model, examples=len(data), metrics={"loss": 0.1})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.local import LocalSpec


@dataclass(frozen=True, slots=True)
class Result:
    """What a user's training function returns.

    Args:
        model: the trained module.
        examples: weight of this update; the number of the client's examples where None.
        metrics: numbers to record, ``loss`` among them where there is one.
    """

    model: nn.Module
    examples: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LocalData:
    """One client's data as the training function sees them; also a map-style data set.

    Args:
        inputs: [n, ...] after the evaluation transform (normalised, not augmented).
        targets: [n, ...].
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, item: Any) -> tuple[Tensor, Tensor]:
        return self.inputs[item], self.targets[item]

    def loader(self, *, batch_size: int = 32, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one pass; shuffled where a seed is given. The last may be short."""
        order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(self), batch_size):
            rows = torch.from_numpy(order[start : start + batch_size])
            yield self.inputs[rows], self.targets[rows]


@dataclass(frozen=True, slots=True)
class LocalTask:
    """What the server asks of one client.

    Args:
        client, round: who and when, the round from 0.
        seed: of this client's draws in this round.
        spec: the ``[client]`` table, with this round's rate.
    """

    client: int
    round: int
    seed: int
    spec: LocalSpec

    @property
    def lr(self) -> float:
        return self.spec.lr

    def get(self, name: str, default: Any = None) -> Any:
        """A field of `spec` by name."""
        return getattr(self.spec, name, default)


TrainFunction = Callable[[nn.Module, LocalData, LocalTask], Result]


class OpaqueClient(NamedTuple):
    """A client half that is not a local algorithm."""

    train: TrainFunction


def opaque(train: TrainFunction) -> OpaqueClient:
    """Mark a function (model, data, task) -> Result as a client."""
    return OpaqueClient(train)
