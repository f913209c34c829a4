"""The workloads' models in plain PyTorch, for peers that train with it; parameters come from the plan."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def model_of(about: dict[str, Any], parameters: dict[str, np.ndarray]) -> nn.Module:
    """The model that a plan describes, with these parameters in the order of the plan.

    Args:
        about: ``name``, ``parameters``, ``input_shape``, ``classes``.
    """
    shape, classes, extra = about["input_shape"], about["classes"], about["parameters"]
    if about["name"] == "mlp":
        model = _mlp(prod(shape), extra["hidden"], classes)
    elif about["name"] == "cnn":
        model = _convolutional(shape[0], 32, 64, 2, [64 * (shape[1] // 4) ** 2, 512, classes])
    elif about["name"] == "lenet5":
        model = _convolutional(shape[0], 64, 64, 0, [64 * 5 * 5, 384, 192, classes])
    elif about["name"] == "resnet18":
        model = ResNet18(extra["width"], extra["groups"], classes)
    else:
        raise SystemExit(f"no model {about['name']!r} for this peer")
    own = model.state_dict()
    if [tuple(t.shape) for t in own.values()] != [a.shape for a in parameters.values()]:
        raise SystemExit(f"the peer's {about['name']} has other layers than the plan's")
    model.load_state_dict({n: torch.from_numpy(a) for n, a in zip(own, parameters.values(), strict=True)})
    return model


def _dense(sizes: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


def _mlp(inputs: int, hidden: list[int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *_dense([inputs, *hidden, classes]))


def _convolutional(channels: int, first: int, second: int, padding: int, dense: list[int]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), *_dense(dense),
    )  # fmt: skip


class Block(nn.Module):
    """Two 3x3 convolutions with group normalisation, added to a shortcut."""

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(groups, after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """The ResNet-18 for small images of W3."""

    def __init__(self, width: int, groups: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.blocks = nn.Sequential(
            *(
                Block(before if not second else after, after, 1 if second or not stage else 2, groups)
                for stage, (before, after) in enumerate(pairs)
                for second in (False, True)
            )
        )
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(F.relu(self.norm(self.conv(x))))
        logits: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return logits
