"""Whether a run is one for the fused engine, and if not, why."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.local import LocalAlgorithm, LocalSpec, affine
from fedsim.simulation.fused_layers import Layers, differs, layers_of
from fedsim.simulation.fused_losses import LOSSES
from fedsim.training.work import Workplace
from fedsim.types import Aux, Batch, GradFn
from fedsim.uphill import UphillGradient
from fedsim.vector import Vector


def why_not_fused(place: Workplace, spec: LocalSpec, algorithm: LocalAlgorithm, *, plain: bool) -> str | None:
    """Why the fused engine cannot run this, in words; None where it can.

    Args:
        plain: `place.grad_fn` is the gradient of the model's loss and nothing that replaces it.
    """
    if not plain:
        return "the gradient function is replaced"
    reason = unfit(spec, algorithm, place.grad_fn)
    if reason is not None:
        return reason
    layers = layers_for(place)
    return layers if isinstance(layers, str) else None


def unfit(spec: LocalSpec, algorithm: LocalAlgorithm, grad_fn: GradFn) -> str | None:
    """Why these local steps are not SGD plus additive terms, in words."""
    if spec.optimizer != "sgd":
        return f"the local optimiser is {spec.optimizer}, not plain SGD"
    if spec.momentum:
        return "the local optimiser has momentum"
    if spec.clip_norm is not None:
        return "directions are clipped, which takes their norm before the step"
    if algorithm.terms is None:
        return "the strategy's local steps are not a gradient plus additive terms"
    if len(algorithm.phases) != 1:
        return f"local training has {len(algorithm.phases)} phases"
    phase = algorithm.phases[0]
    if phase.spec is not None or phase.trains is not None or phase.data != "batches":
        return "local training has a phase with rules of its own"
    if not _from_terms(algorithm, grad_fn):
        return "the direction of the local steps is not the one that its additive terms describe"
    return None


def layers_for(place: Workplace) -> Layers | str:
    """The layers of the run's model, or why the fused engine cannot train it on these data."""
    if place.spec.dtype not in (torch.float32, torch.float64):
        return f"the parameters are {str(place.spec.dtype).removeprefix('torch.')}"
    if place.spec.personal:
        return "some parameters stay on the clients"
    if place.floating is not None or place.integers is not None:
        return "the model has buffers"
    clients = place.clients
    task = clients.data.dataset.task
    if task not in LOSSES:
        return f"the loss of {task} data is taken over sequences"
    layers = layers_of(place.module, place.spec)
    if isinstance(layers, str):
        return layers
    inputs = _examples(place)
    if inputs.flatten(1).shape[1] != layers.dense[0].inputs or not inputs.is_floating_point():
        return "the first layer does not take an example as one row of numbers"
    if len(inputs) == 0:
        return "there are no examples"
    return differs(place.module, layers, inputs) or layers


def _examples(place: Workplace) -> Tensor:
    """[n <= 3] inputs as the model sees them."""
    clients = place.clients
    inputs = clients.data.dataset.transforms.evaluate(clients.inputs[:3])
    return inputs.to(clients.dtype) if inputs.is_floating_point() else inputs


def _from_terms(algorithm: LocalAlgorithm, grad_fn: GradFn) -> bool:
    """Whether the direction is `affine`'s, around this gradient function, uphill or not, and these terms."""
    direction = algorithm.phases[0].direction
    if getattr(direction, "__code__", None) is not _AFFINE.__code__:
        return False
    cells = dict(zip(direction.__code__.co_freevars, direction.__closure__ or (), strict=True))
    gradient = cells["grad_fn"].cell_contents
    if gradient is not algorithm.gradient or cells["terms"].cell_contents is not algorithm.terms:
        return False
    return gradient is grad_fn or (isinstance(gradient, UphillGradient) and gradient.inner is grad_fn)


def _no_gradient(x: Vector, batch: Batch) -> tuple[Vector, Aux]:
    raise NotImplementedError


_AFFINE = affine(_no_gradient).phases[0].direction
