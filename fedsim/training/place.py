"""What clients of a run share, from its configuration: model, gradient, layout, data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedsim.buffers import Buffers
from fedsim.build import torch_device
from fedsim.config import Config
from fedsim.data.federated import FederatedData
from fedsim.flat import buffer_specs, flat_buffers, spec_of
from fedsim.grads import LOSSES, eager_grad, model_grad
from fedsim.training.clients import ClientData
from fedsim.training.work import Workplace
from fedsim.types import GradFn


def workplace(
    config: Config,
    data: FederatedData,
    module: nn.Module,
    *,
    wrap: Callable[[GradFn], GradFn] | None = None,
) -> Workplace:
    """The place where the clients of `data` train `module`.

    Args:
        wrap: what replaces the gradient function; DP-SGD goes here.
    """
    spec = spec_of(module, personal=tuple(config.model.personal))
    floating, integers = buffer_specs(module)
    gradient: GradFn = model_grad(module, LOSSES[data.dataset.task])
    if wrap is not None:
        gradient = wrap(gradient)
    seed = config.run.seed
    clients = ClientData(data, seed=seed, dtype=spec.dtype, device=torch_device(config))
    return Workplace(module, spec, floating, integers, gradient, clients, seed)


def eager(place: Workplace) -> Workplace:
    """The place with the gradient by ``backward``: faster where nothing is stacked."""
    return replace(place, grad_fn=eager_grad(place.module, LOSSES[place.clients.data.dataset.task]))


def start_buffers(place: Workplace) -> Buffers:
    """The buffers that the model begins with."""
    floating = flat_buffers(place.module, place.floating)
    integers = flat_buffers(place.module, place.integers)
    return Buffers(_or_empty(floating, torch.float32), _or_empty(integers, torch.int64))


def _or_empty(flat: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype) if flat is None else flat
