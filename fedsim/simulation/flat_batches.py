"""The batches of one client, cut from few large gathers, with nothing built that nobody reads.

The draws are those of `Schedule`: each pass shuffles anew, so the examples of consecutive steps lie one after
the other and need no padding. Several steps are gathered and transformed at once and handed out as views;
full `Batch`es are made only for algorithms that look at one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedsim.keys import Purpose, bits_of_one
from fedsim.local import LocalSpec, Phase
from fedsim.training.clients import ClientData
from fedsim.types import Batch, Ids

_WINDOW = 4 << 20
"""Bytes of inputs gathered at once: stays in the cache beside a small model."""


class Feed:
    """The batches of one client in one phase.

    Args:
        clients: whose data.
        client, round_index: the client and the key of its random streams.
        steps: its local steps under the task; a phase with its own table follows that instead, and a
            ``full`` phase takes one pass.
        phases, number: of the algorithm, and which of them this is.
        spec: of this phase.
        convert: applied to each gathered window of inputs, the layout that the model wants them in.
    """

    def __init__(
        self,
        clients: ClientData,
        client: int,
        round_index: int,
        steps: int,
        *,
        phases: Sequence[Phase],
        number: int,
        spec: LocalSpec,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        phase = phases[number]
        self.clients, self.ids, self.round_index = clients, np.array([client], np.int64), round_index
        self.convert = convert
        self.moving = phase.data == "batches"
        offsets = clients.data.offsets
        self.size = int(offsets[client + 1] - offsets[client])
        self.width = self.size if spec.batch_size == 0 else min(self.size, spec.batch_size)
        self.per_epoch = -(-self.size // self.width) if self.width else 0
        self.steps = self._count(steps, spec, own=phase.spec is not None)
        self.first_key = number << 56
        self.order = self._order(spec)
        self.lr = _rate(spec.lr, clients.dtype, clients.device)
        example = max(1, clients.inputs[0].numel()) * clients.dtype.itemsize
        self.window = max(1, _WINDOW // max(1, example * self.width))
        self.first = self.last = 0  # steps that are gathered
        self.inputs = self.targets = torch.empty(0)

    def __len__(self) -> int:
        return self.steps

    def bounds(self, step: int) -> tuple[int, int]:
        """Where a step's examples lie in the order of all passes."""
        epoch, at = divmod(step, self.per_epoch)
        start = at * self.width
        return epoch * self.size + start, epoch * self.size + min(start + self.width, self.size)

    def rows(self, step: int) -> int:
        """Examples of a step."""
        start, stop = self.bounds(step)
        return stop - start

    def examples(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, ...] of one step."""
        if not self.first <= step < self.last:
            self._gather(step)
        base = self.bounds(self.first)[0]
        start, stop = self.bounds(step)
        return self.inputs[start - base : stop - base], self.targets[start - base : stop - base]

    def batch(self, step: int) -> Batch:
        """The same as `Schedule.single`, constants shared between steps."""
        device, dtype = self.clients.device, self.clients.dtype
        inputs, targets = self.examples(step)
        yes, no = _flags(device)
        rows = len(targets)
        return Batch(
            inputs=inputs,
            targets=targets,
            mask=_ones(rows, dtype, device),
            lr=self.lr,
            index=torch.tensor(step, device=device),
            total=_number(self.steps, device),
            epoch_start=yes if step % self.per_epoch == 0 else no,
            active=yes,
            weight=_number(rows / self.size, device, dtype),
        )

    def _count(self, steps: int, spec: LocalSpec, *, own: bool) -> int:
        """Local steps of this phase."""
        if not self.size:
            return 0
        if not self.moving:
            return self.per_epoch
        if not own:
            return steps
        return spec.epochs * self.per_epoch if spec.steps is None else spec.steps

    def _order(self, spec: LocalSpec) -> Ids:
        """The client's own examples in the order in which the steps take them, pass after pass."""
        if not self.moving or not self.steps:
            return np.arange(self.size)
        seed, client = self.clients.seed, int(self.ids[0])
        passes = [
            np.argsort(
                bits_of_one(
                    seed,
                    Purpose.BATCH,
                    self.round_index,
                    client,
                    self.size,
                    start=self.first_key + (epoch << 32),
                ),
                kind="stable",
            )
            for epoch in range(-(-self.steps // self.per_epoch))
        ]
        return passes[0] if len(passes) == 1 else np.concatenate(passes)

    def _gather(self, first: int) -> None:
        """Gather the steps from `first` on, as many as fit in a window."""
        last = min(first + self.window, self.steps)
        start, stop = self.bounds(first)[0], self.bounds(last - 1)[1]
        keys = None
        if self.clients.random_transform and self.moving:
            keys = np.concatenate([self._keys(step) for step in range(first, last)])
        order = self.order[start:stop]
        if self.moving:
            inputs, targets = self.clients.gather_flat(self.ids, order, keys)
        else:
            inputs, targets = (
                part[0] for part in self.clients.gather(self.ids, order[None], None, train=False)
            )
        self.inputs = inputs if self.convert is None else self.convert(inputs)
        self.targets = targets
        self.first, self.last = first, last

    def _keys(self, step: int) -> Ids:
        """Keys of the random transform of a step's examples."""
        start = self.first_key + (step << 32)
        words = bits_of_one(
            self.clients.seed,
            Purpose.TRANSFORM,
            self.round_index,
            int(self.ids[0]),
            self.rows(step),
            start=start,
        )
        return words.view(np.int64)


@lru_cache(maxsize=256)
def _ones(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(rows, dtype=dtype, device=device)


@lru_cache(maxsize=8)
def _flags(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(True, device=device), torch.tensor(False, device=device)


@lru_cache(maxsize=256)
def _number(value: float, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


@lru_cache(maxsize=8)
def _rate(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)
