"""Losses of a model as functions of (x, batch): what hides the model from an algorithm.

Everything that needs a gradient takes a `GradFn`; DP-SGD is another one of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fedsim.types import Aux, Batch, GradFn
from fedsim.vector import Vector

PerExample = Callable[[Tensor, Tensor], Tensor]  # (outputs [B, ...], targets) -> losses [B]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """[B] from logits [B, K] and classes [B]; for sequences [B, T, K] the mean over T."""
    if outputs.ndim == 3:
        losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.reshape(targets.shape).mean(dim=1)
    return F.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """[B], half the squared error summed over outputs."""
    difference = outputs.reshape(targets.shape) - targets
    return 0.5 * difference.square().flatten(1).sum(1) if difference.ndim > 1 else 0.5 * difference**2


LOSSES: Mapping[str, PerExample] = {
    "classification": cross_entropy,
    "binary": cross_entropy,
    "next-token": cross_entropy,
    "regression": squared_error,
}


def masked_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real rows; 0 where there is none."""
    return (losses * mask).sum() / torch.clamp(mask.sum(), min=1)


class ModelGradient:
    """The gradient of a model's mini-batch loss, marked so that an engine may compute it in its own way.

    What a user puts in its place (DP-SGD) is another function, and every engine calls that as it is.

    Args:
        module, per_example: the model and its loss.
        function: one way to compute the gradient.
    """

    __slots__ = ("function", "module", "per_example")

    def __init__(self, module: nn.Module, per_example: PerExample, function: GradFn) -> None:
        self.module = module
        self.per_example = per_example
        self.function = function

    def __call__(self, x: Vector, batch: Batch) -> tuple[Vector, Aux]:
        return self.function(x, batch)


def batch_loss(
    module: nn.Module, per_example: PerExample
) -> Callable[[Mapping[str, Tensor], Batch], tuple[Tensor, dict[str, Tensor]]]:
    """(parameters by name, batch) -> mean loss 0-d, buffers after the forward pass."""

    def loss(parameters: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # Normalisation layers write into the buffers they are given: give them copies.
        buffers = {name: b.clone() for name, b in batch.buffers.items()}
        outputs: Any = functional_call(module, {**parameters, **buffers}, (batch.inputs,))
        return masked_mean(per_example(outputs, batch.targets), batch.mask), buffers

    return loss


def eager_grad(module: nn.Module, per_example: PerExample) -> GradFn:
    """The gradient of the mini-batch loss by plain autograd: for one client at a time.

    The same loss as `model_grad`, faster where torch has kernels that `torch.func` must take apart (an
    LSTM of 2 × 256 units: 4.4 times). It cannot be vmapped or differentiated again.
    """
    loss_of = batch_loss(module, per_example)

    def grad_fn(x: Vector, batch: Batch) -> tuple[Vector, Aux]:
        with torch.enable_grad():
            leaves = {name: t.detach().requires_grad_() for name, t in x.tensors.items()}
            loss, buffers = loss_of(leaves, batch)
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return Vector(dict(zip(leaves, gradients, strict=True))), Aux(loss.detach(), {}, buffers)

    return ModelGradient(module, per_example, grad_fn)


def model_grad(module: nn.Module, per_example: PerExample) -> GradFn:
    """The gradient of the mini-batch loss of `module` (in training mode), pure: for `torch.func`."""
    differentiate = grad_and_value(batch_loss(module, per_example), has_aux=True)

    def grad_fn(x: Vector, batch: Batch) -> tuple[Vector, Aux]:
        gradients, (loss, buffers) = differentiate(x.tensors, batch)
        return Vector(gradients), Aux(loss, {}, buffers)

    return ModelGradient(module, per_example, grad_fn)
