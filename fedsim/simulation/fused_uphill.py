"""Steps of the fused engine along gradients that are taken uphill (`fedsim.uphill`).

Nothing of the model's size is formed for the perturbed point x + e. With h a layer's inputs and d the
derivatives of its outputs, both of B rows, a gradient is dᵀh and e = uᵀh with u = ρ d1 / (‖g1‖ + 1e-7);
a bias is the weight of an input that is always 1. So, at the perturbed point with inputs h',

    outputs                 h' Wᵀ + (h' hᵀ) u
    derivatives of h'       d2 W + (d2 uᵀ) h
    ‖g1‖²                   Σ over layers of ⟨(h hᵀ) d1, d1⟩

and the first layer, where h' = h, takes its product with W once for both points. That norm is rounded
relative to the gradients of single examples, which matters only where they cancel in their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.simulation.fused_data import StepData
from fedsim.simulation.fused_first import First
from fedsim.simulation.fused_losses import BlockLoss
from fedsim.simulation.fused_passes import Ascent, Pass, back, forward
from fedsim.simulation.fused_stacks import MovingLayer, Scratch, gram
from fedsim.uphill import FLOOR, UphillGradient


class Climb:
    """Local steps of two passes each.

    Args:
        uphill: the gradient.
        rate: η.
        layers: of the clients; the first one only moves by way of a `First`.
        scratch: for the second pass, another one than the layers'.
    """

    def __init__(
        self, uphill: UphillGradient, rate: float, layers: list[MovingLayer], scratch: Scratch
    ) -> None:
        self.radius, self.share = uphill.rho, uphill.alpha
        self.layers, self.scratch = layers, scratch
        self.again = [MovingLayer(one.layer, one.weight, one.bias, scratch) for one in layers]
        # Derivatives carry -η, and so does their norm. With a rate of 0 nothing is divided by 0.
        self.floor = max(rate * FLOOR, torch.finfo(scratch.dtype).tiny)

    def steps(self, data: StepData, first: First, loss: BlockLoss, second: BlockLoss) -> None:
        """All steps of a run.

        Args:
            first: the first layer, opened with `data`.
            loss: at x, which is the one to report; second: at x + e.
        """
        row = 0
        for step, (clients, width) in enumerate(data.shapes):
            start = first.forward(step)
            kept = self.scratch.take("start", *start.shape).copy_(start)  # activations write over it
            one = forward(self.layers, start, None)
            d1 = self._derivatives(one, loss.passed_back(one.outputs, row))
            ascent, lift = self._ascent(one, d1, first.products(step))
            two = forward(self.again, kept.add_(lift), ascent)
            self._descend(step, first, one, d1, two, ascent, second.passed_back(two.outputs, row))
            row += clients * width

    def _derivatives(self, done: Pass, g: Tensor) -> list[Tensor]:
        """Of each layer's outputs at x, from those of the model's."""
        found: list[Tensor] = []
        for number in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[number]
            back(layer, done.tapes[number], g)
            found.append(g)
            if number:
                g = layer.backward(g)
        return found[::-1]

    def _ascent(self, one: Pass, d1: list[Tensor], products: Tensor) -> tuple[Ascent, Tensor]:
        """Also by how much the first layer's outputs differ at x + e."""
        first = torch.bmm(products, d1[0])
        squares = (first * d1[0]).sum((1, 2))
        for layer, h, d in zip(self.layers[1:], one.inputs, d1[1:], strict=True):
            squares += (gram(layer, h, h).bmm(d) * d).sum((1, 2))
        norm = squares.clamp_min_(0.0).sqrt_()
        scale = (-self.radius / norm.add_(self.floor)).view(-1, 1, 1)
        return Ascent(one.inputs, [d * scale for d in d1]), first.mul_(scale)

    def _descend(
        self, step: int, first: First, one: Pass, d1: list[Tensor], two: Pass, ascent: Ascent, g: Tensor
    ) -> None:
        """Back at x + e, and every layer moves as it is passed."""
        for number in range(len(self.layers) - 1, -1, -1):
            layer = self.again[number]
            back(layer, two.tapes[number], g)
            if number == 0:
                first.update(step, g if self.share == 1.0 else torch.lerp(d1[0], g, self.share))
                return
            u, h = ascent.rows[number], ascent.inputs[number - 1]
            before = layer.backward(g).baddbmm_(g.bmm(u.transpose(1, 2)), h)
            inputs = two.inputs[number - 1]
            if self.share != 1.0:
                g = torch.cat([d1[number] * (1.0 - self.share), g * self.share], 1)
                inputs = torch.cat([h, inputs], 1)
            self.layers[number].update(inputs, g)
            g = before
