"""The first layer, whose inputs are known before the steps are taken: when its weights move."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fedsim.simulation.fused_data import StepData
from fedsim.simulation.fused_stacks import MovingLayer, gram


class First(Protocol):
    """The first layer over the runs of steps that it is given."""

    layer: MovingLayer

    def open(self, data: StepData) -> None:
        """Before the steps of a run."""
        ...

    def forward(self, step: int) -> Tensor:
        """[k, B, out] of step `step` of the run."""
        ...

    def products(self, step: int) -> Tensor:
        """[k, B, B] of a step's inputs with each other, each with a further 1 if the layer has a bias."""
        ...

    def update(self, step: int, g: Tensor) -> None:
        """Take note of `g` [k, B, out], minus η times the derivatives of the outputs."""
        ...

    def close(self) -> None:
        """After the steps of a run."""
        ...


class Eager:
    """As any other layer."""

    def __init__(self, layer: MovingLayer) -> None:
        self.layer = layer
        self.steps: list[Tensor] = []

    def open(self, data: StepData) -> None:
        sizes = [clients * width for clients, width in data.shapes]
        parts = torch.split(data.inputs, sizes)
        self.steps = [part.view(*shape, -1) for part, shape in zip(parts, data.shapes, strict=True)]

    def forward(self, step: int) -> Tensor:
        return self.layer.forward(self.steps[step])

    def products(self, step: int) -> Tensor:
        return gram(self.layer, self.steps[step], self.steps[step])

    def update(self, step: int, g: Tensor) -> None:
        self.layer.update(self.steps[step], g)

    def close(self) -> None:
        self.steps = []
