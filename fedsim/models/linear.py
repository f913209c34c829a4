"""Logistic regression and the multi-layer perceptron: inputs of any shape, flattened."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

from fedsim.models.shapes import whole


def logistic(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Logistic regression (linear regression where `classes` is 1): one linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), classes))


def mlp(*, input_shape: tuple[int, ...], classes: int, hidden: Sequence[int] = (200,)) -> nn.Module:
    """Linear layers with ReLU between them.

    McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
    data", section 3: their "2NN" on MNIST is ``hidden = [200, 200]`` (199,210 parameters).

    Args:
        hidden: units of each hidden layer; [] leaves logistic regression.
    """
    sizes = [prod(input_shape), *(whole("mlp", "hidden", units) for units in hidden)]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))
