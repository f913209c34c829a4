"""Forward and back through the layers of C clients, and steps of plain SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fedsim.simulation.fused_data import StepData
from fedsim.simulation.fused_first import First
from fedsim.simulation.fused_losses import BlockLoss
from fedsim.simulation.fused_stacks import MovingLayer, gram


class Pass(NamedTuple):
    """What a pass forward leaves behind.

    Args:
        inputs: [k, B, in] of the layers after the first.
        tapes: what each layer's activations need on the way back.
        outputs: [k, B, K] of the model.
    """

    inputs: list[Tensor]
    tapes: list[list[Tensor]]
    outputs: Tensor


class Ascent(NamedTuple):
    """Another point than where the layers' weights are: x + e, with each layer's e of low rank.

    Args:
        inputs: [k, B, in] at x of the layers after the first.
        rows: u [k, B, out] of each layer, so that its weights differ by uᵀ · inputs.
    """

    inputs: list[Tensor]
    rows: list[Tensor]


def descend(data: StepData, first: First, layers: Sequence[MovingLayer], loss: BlockLoss) -> None:
    """All steps of a run; every layer moves as it is passed on the way back.

    Args:
        first: the first layer, opened with `data`.
    """
    row = 0
    for step, (clients, width) in enumerate(data.shapes):
        done = forward(layers, first.forward(step))
        g = loss.passed_back(done.outputs, row)
        for number in range(len(layers) - 1, 0, -1):
            layer = layers[number]
            back(layer, done.tapes[number], g)
            before = layer.backward(g)
            layer.update(done.inputs[number - 1], g)
            g = before
        back(layers[0], done.tapes[0], g)
        first.update(step, g)
        row += clients * width


def forward(layers: Sequence[MovingLayer], x: Tensor, ascent: Ascent | None = None) -> Pass:
    """From the first layer's outputs, which are written over."""
    inputs: list[Tensor] = []
    tapes: list[list[Tensor]] = []
    for number, layer in enumerate(layers):
        if number:
            inputs.append(x)
            x = layer.forward(x)
            if ascent is not None:
                x.baddbmm_(gram(layer, inputs[-1], ascent.inputs[number - 1]), ascent.rows[number])
        tape: list[Tensor] = []
        for place, activation in enumerate(layer.layer.activations):
            out = x
            if place or not activation.from_output:
                out = layer.scratch.take(f"a{place} {layer.layer.weight}", *x.shape)
            activation.forward(x, out)
            tape.append(out if activation.from_output else x)
            x = out
        tapes.append(tape)
    return Pass(inputs, tapes, x)


def back(layer: MovingLayer, tape: list[Tensor], g: Tensor) -> None:
    """Derivatives before a layer's activations, in the place of those after."""
    for activation, t in zip(reversed(layer.layer.activations), reversed(tape), strict=True):
        activation.backward(g, t, g)
