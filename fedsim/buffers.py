"""A model's buffers across clients: the rule that no strategy needs to repeat.

Floating buffers (normalisation statistics) are averaged with the aggregation weights of the updates
but never enter norms, momenta, duals or control variates; integer buffers are those of the
participant with the largest weight, ties to the lower id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.strategy import weighted_sum
from fedsim.types import Floats, UpdateBlock


class Buffers(NamedTuple):
    """Flat [Db] floating and [Di] integer buffers; empty where the model has none."""

    floating: Tensor
    integers: Tensor

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self)


def no_buffers() -> Buffers:
    return Buffers(torch.empty(0), torch.empty(0, dtype=torch.int64))


@dataclass(slots=True)
class BufferFold:
    """Folds the buffers of a window, block by block."""

    start: Buffers
    total: Tensor | None = None
    weight: float = 0.0
    integers: Tensor | None = None
    heaviest: tuple[float, int] = (0.0, 0)  # (weight, -id)

    def add(self, block: UpdateBlock, weights: Floats) -> None:
        if block.buffers is not None:
            part = weighted_sum(weights, block.buffers)
            self.total = part if self.total is None else self.total + part
            self.weight += float(weights.sum())
        if block.int_buffers is not None:
            order = np.lexsort((block.ids, -weights))
            best = (float(weights[order[0]]), -int(block.ids[order[0]]))
            if self.integers is None or best > self.heaviest:
                self.integers, self.heaviest = block.int_buffers[int(order[0])].clone(), best

    def result(self) -> Buffers:
        """The buffers of the next version; unchanged where nobody sent any."""
        floating, integers = self.start
        if self.total is not None and self.weight > 0:
            floating = (self.total / self.weight).to(floating.dtype)
        return Buffers(floating, integers if self.integers is None else self.integers)
