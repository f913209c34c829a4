"""The gradient of a model that lives on a flat buffer: plain autograd, the module run as it is.

`BoundGradient` has the signature of every gradient function, so that algorithms are written once. Asked at
the model's own values it runs the module directly; asked elsewhere (a perturbed point, an older iterate) it
copies the point into a second model of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.grads import PerExample, cross_entropy
from fedsim.simulation.flat_module import FlatModule
from fedsim.simulation.flat_precision import Precision
from fedsim.types import Aux, Batch
from fedsim.vector import Vector


class BoundGradient:
    """The gradient of a mini-batch's mean loss, for one client at a time.

    Args:
        make: a model on a buffer of its own.
        per_example: its loss.
        precision: what the forward and backward pass compute in.

    Attributes:
        live: the model that a driver moves.
    """

    def __init__(self, make: Callable[[], FlatModule], per_example: PerExample, precision: Precision) -> None:
        self.live = make()
        self.per_example = per_example
        self._make = make
        self._precision = precision
        self._elsewhere: FlatModule | None = None

    def __call__(self, x: Vector, batch: Batch) -> tuple[Vector, Aux]:
        """Pure, as every gradient function: the model's buffers are those of the batch, and returned."""
        place = self.live if self.live.holds(x) else self._at(x)
        if place.has_buffers:
            place.load_buffers(batch.buffers)
        gradients, loss = self.at(place, batch.inputs, batch.targets)
        buffers = place.saved_buffers() if place.has_buffers else {}
        return Vector(dict(zip(place.spec.names, gradients, strict=True))), Aux(loss, {}, buffers)

    def at(self, place: FlatModule, inputs: Tensor, targets: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients with respect to the model's parameters, and the loss 0-d.

        The model's buffers move, as those of any module in training mode. The gradients may share memory
        with each other: they must not be written to.
        """
        with torch.enable_grad():
            with self._precision.forward():
                outputs = place.module(inputs)
            loss = self._mean_loss(outputs, targets)
            gradients = torch.autograd.grad(loss, place.leaves, materialize_grads=True)
        return gradients, loss.detach()

    def _mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch, in the fewest operations: every row is real."""
        outputs = self._precision.result(outputs)
        if self.per_example is cross_entropy and outputs.ndim == 2:
            return torch.nn.functional.cross_entropy(outputs, targets)
        return self.per_example(outputs, targets).sum() / len(targets)

    def _at(self, x: Vector) -> FlatModule:
        """The second model, at `x`."""
        if self._elsewhere is None:
            self._elsewhere = self._make()
        self._elsewhere.load(x)
        return self._elsewhere
