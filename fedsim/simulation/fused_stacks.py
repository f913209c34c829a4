"""Parameters of C clients that the backward pass itself moves: no gradient is ever kept.

A step is x <- β x - η g - η b with β = 1 - η (a + weight decay): plain SGD along an affine direction.
All clients of a block start from the same values as a rule, so the first products are taken with
those, and the first step writes the stack instead of copying to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.simulation.fused_layers import Dense
from fedsim.simulation.fused_products import outputs
from fedsim.simulation.fused_sums import BlockSum, pays, squared_norms


class Motion(NamedTuple):
    """What each step does beside the gradient.

    Args:
        decay: β, one for all or [C].
        rate: η.
        added: b by name, [C, *shape] or None.
    """

    decay: float | Tensor
    rate: float
    added: dict[str, Tensor] | None

    @property
    def common(self) -> bool:
        """The same for all clients."""
        if isinstance(self.decay, Tensor):
            return False
        return all(len(b) == 1 or b.stride(0) == 0 for b in (self.added or {}).values())


class Scratch:
    """Memory of a block that the next step uses again, by name."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, valid until the name is asked for again."""
        size = 1
        for length in shape:
            size *= length
        held = self.held.get(name)
        if held is None or held.numel() < size:
            held = self.held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(shape)


class Moving:
    """One parameter of C clients.

    Args:
        name: of the parameter.
        values: [C, *shape], where the clients' values go; holds them already if `start` is None.
        start: [*shape] from which all start, None where each has its own.
        motion: what each step does.
        leap: the clients take one step and only what it changes is wanted: `values` then holds
            x - start.
    """

    def __init__(
        self, name: str, values: Tensor, start: Tensor | None, motion: Motion, *, leap: bool
    ) -> None:
        self.name = name
        self.values = values
        self.start = start
        self.fresh = start is not None
        self.motion = motion
        self.added = None if motion.added is None else motion.added.get(name)
        self.leap = leap
        self.leaps_from = 0 if leap else len(values)  # these clients and all after them hold x - start

    @property
    def shared(self) -> Tensor | None:
        """The values of all clients while they are the same."""
        return self.start if self.fresh else None

    def product(self, transposed: Tensor, inputs: Tensor) -> None:
        """Weights [k, out, in] after a step against `transposed` · `inputs`.

        Args:
            transposed: [k, out, B], minus η times the derivatives of the layer's outputs.
            inputs: [k, B, in].
        """
        k = len(inputs)
        values, decay = self.values[:k], self.motion.decay
        if self.fresh and isinstance(decay, float):
            assert self.start is not None
            kept = decay - 1.0 if self.leap else decay
            if kept == 0.0:
                torch.bmm(transposed, inputs, out=values)
            else:
                base = self.start.expand_as(values)
                torch.baddbmm(base, transposed, inputs, beta=kept, out=values)
        else:
            beta = self._decayed(values)
            values.baddbmm_(transposed, inputs, beta=beta)
        self._add(k)

    def sum(self, rows: Tensor) -> None:
        """Biases [k, out] after a step against the sum over B of `rows` [k, B, out]."""
        k = len(rows)
        values = self.values[:k]
        beta = self._decayed(values)
        if beta == 0.0:
            torch.sum(rows, 1, out=values)
        else:
            if beta != 1.0:
                values.mul_(beta)
            values.add_(rows.sum(1))
        self._add(k)

    def settle(self, clients: int) -> None:
        """Values of the clients from number `clients` on, which took no step."""
        if self.start is not None:
            rest = self.values[clients:]
            rest.zero_() if self.leaps_from <= clients else rest.copy_(self.start)

    def _decayed(self, values: Tensor) -> float:
        """The factor that the caller has to apply, after what had to be done before."""
        decay = self.motion.decay
        less = 1.0 if self.fresh and self.leap else 0.0
        fill = self.start if self.fresh else None
        if not isinstance(decay, Tensor):
            if fill is not None and decay != less:
                values.copy_(fill)
            return decay - less
        if fill is not None:
            values.copy_(fill)
        values.mul_(decay[: len(values)].view(-1, *[1] * (values.ndim - 1)) - less)
        return 1.0

    def _add(self, k: int) -> None:
        if self.added is not None:
            self.values[:k].add_(self.added[:k], alpha=-self.motion.rate)
        self.fresh = False


class MovingLayer:
    """A linear layer of C clients.

    Args:
        layer: its names and widths.
        weight: [C, out, in]; bias: [C, out] or None.
        scratch: for what a step needs.
        sums: takes the changes of clients that take one step only, None where they are kept.
    """

    def __init__(
        self,
        layer: Dense,
        weight: Moving,
        bias: Moving | None,
        scratch: Scratch,
        sums: BlockSum | None = None,
    ) -> None:
        self.layer, self.weight, self.bias, self.scratch = layer, weight, bias, scratch
        self.sums = sums
        self.summed = False

    def forward(self, inputs: Tensor) -> Tensor:
        """[k, B, out] of [k, B, in]."""
        k, rows, _ = inputs.shape
        out = self.scratch.take(f"z {self.layer.weight}", k, rows, self.layer.outputs)
        shared = self.weight.shared
        if shared is not None:
            flat, whole = inputs.reshape(k * rows, -1), out.view(k * rows, -1)
            bias = None if self.bias is None else self.bias.shared
            assert self.bias is None or bias is not None
            outputs(flat, shared, bias, whole)
            return out
        weight = self.weight.values[:k].transpose(1, 2)
        if self.bias is None:
            return torch.bmm(inputs, weight, out=out)
        return torch.baddbmm(self.bias.values[:k].unsqueeze(1), inputs, weight, out=out)

    def backward(self, g: Tensor) -> Tensor:
        """[k, B, in], the derivatives of the inputs of those of the outputs; before the update."""
        k, rows, _ = g.shape
        out = self.scratch.take(f"g {self.layer.weight}", k, rows, self.layer.inputs)
        shared = self.weight.shared
        if shared is None:
            return torch.bmm(g, self.weight.values[:k], out=out)
        torch.mm(g.view(k * rows, -1), shared, out=out.view(k * rows, -1))
        return out

    def update(self, inputs: Tensor, g: Tensor) -> None:
        """Move against the derivatives; `g` [k, B, out] carries -η."""
        k, rows, _ = g.shape
        motion = self.weight.motion
        if self.sums is not None and motion == (1.0, motion.rate, None) and pays(self.layer, rows):
            owners = torch.arange(k, device=g.device).repeat_interleave(rows)
            self.sums.add_product(self.layer, g.flatten(0, 1), inputs.flatten(0, 1), owners)
            if self.sums.norms:
                self.sums.squares[:k].add_(squared_norms(g, inputs, bias=self.bias is not None))
            self.summed = True
            return
        self.weight.product(g.transpose(1, 2), inputs)
        if self.bias is not None:
            self.bias.sum(g)

    def add_changes(self, sums: BlockSum, clients: int) -> None:
        """Of the first `clients` clients, which took steps, unless each step's went there at once."""
        for parameter in (self.weight, self.bias):
            if self.summed or parameter is None or not clients:
                continue
            assert parameter.start is not None
            changes = parameter.values[:clients].clone()
            changes[: parameter.leaps_from].sub_(parameter.start)
            sums.add_changes(parameter.name, changes, slice(clients))


def gram(layer: MovingLayer, one: Tensor, other: Tensor) -> Tensor:
    """[k, B, B] products of the rows of a layer's inputs, with the 1 that a bias is the weight of."""
    found = one.bmm(other.transpose(1, 2))
    return found if layer.bias is None else found.add_(1.0)
