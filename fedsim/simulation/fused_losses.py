"""Losses of the fused engine: what a step passes back, and the sum of the losses at the end."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class BlockLoss(Protocol):
    """The loss of a run of steps, whose rows [R] lie one behind the other."""

    def passed_back(self, outputs: Tensor, start: int) -> Tensor:
        """-η times the derivatives of the mean loss by the outputs [k, B, K] of the rows from `start`."""
        ...

    def losses(self) -> Tensor:
        """[R] of all rows that were passed back."""
        ...


class CrossEntropy:
    """Softmax and classes.

    Args:
        targets: [R] classes.
        weights: [R], -η over the number of real rows of the batch; 0 for padding.
        outputs: K.
    """

    def __init__(self, targets: Tensor, weights: Tensor, outputs: int) -> None:
        self.targets = targets.reshape(-1, 1)
        rows = len(self.targets)
        # In full: a product that repeats one number along each short row is several times slower.
        self.weights = weights.unsqueeze(1).expand(rows, outputs).contiguous()
        self.wanted = weights.new_zeros((rows, outputs)).scatter_(1, self.targets, -weights.unsqueeze(1))
        self.log_shares = weights.new_empty((rows, outputs))
        self.shares = weights.new_empty((rows, outputs))

    def passed_back(self, outputs: Tensor, start: int) -> Tensor:
        k, rows, classes = outputs.shape
        part = slice(start, start + k * rows)
        logs, shares = self.log_shares[part], self.shares[part]
        # By hand: torch's own takes three times as long for many short rows.
        flat = outputs.view(k * rows, classes)
        torch.sub(flat, flat.amax(1, keepdim=True), out=logs)
        torch.exp(logs, out=shares)
        total = shares.sum(1, keepdim=True)
        logs.sub_(total.log())
        shares.div_(total)
        torch.addcmul(self.wanted[part], shares, self.weights[part], out=shares)
        return shares.view(k, rows, classes)

    def losses(self) -> Tensor:
        return -self.log_shares.gather(1, self.targets).squeeze(1)


class SquaredError:
    """Half the squared distance.

    Args:
        targets: [R, ...] of as many numbers as outputs; weights, outputs: as in `CrossEntropy`.
    """

    def __init__(self, targets: Tensor, weights: Tensor, outputs: int) -> None:
        self.targets = targets.reshape(len(targets), -1).to(weights.dtype)
        self.weights = weights.unsqueeze(1)
        self.errors = weights.new_empty((len(targets), outputs))

    def passed_back(self, outputs: Tensor, start: int) -> Tensor:
        k, rows, width = outputs.shape
        part = slice(start, start + k * rows)
        errors = self.errors[part]
        torch.sub(outputs.view(k * rows, width), self.targets[part], out=errors)
        return (errors * self.weights[part]).view(k, rows, width)

    def losses(self) -> Tensor:
        return 0.5 * self.errors.square().sum(1)


LOSSES: dict[str, type[CrossEntropy] | type[SquaredError]] = {
    "classification": CrossEntropy,
    "binary": CrossEntropy,
    "regression": SquaredError,
}
