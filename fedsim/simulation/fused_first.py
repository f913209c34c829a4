"""The first layer, whose inputs are known before the steps are taken.

`Eager` moves its weights at every step. `Lazy` leaves them for a window of steps: with W the weights
at its beginning, the outputs of step t are

    x_t W_tᵀ = β^t x_t Wᵀ - η S_t x_t bᵀ + Σ_{s<t} β^{t-1-s} (x_t x_sᵀ) d_s,    S_t = Σ_{s<t} β^s

with d_s minus η times the derivatives of the outputs of step s, and b the constant term of the
direction. So a window takes one product with W for the outputs, one small table of x_t x_sᵀ, and one
product for the update: large weights are read and written once in a window and not three times in a step.
The bias is the weight of an input that is always 1.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fedsim.simulation import onednn
from fedsim.simulation.fused_data import StepData
from fedsim.simulation.fused_stacks import Moving, MovingLayer, Scratch

# Steps whose inputs' products are taken all at once: fewer calls for some products that nobody needs.
_WHOLE = 3


class First(Protocol):
    """The first layer over the runs of steps that it is given."""

    layer: MovingLayer

    def open(self, data: StepData) -> None:
        """Before the steps of a run."""
        ...

    def forward(self, step: int) -> Tensor:
        """[k, B, out] of step `step` of the run."""
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

    def update(self, step: int, g: Tensor) -> None:
        self.layer.update(self.steps[step], g)

    def close(self) -> None:
        self.steps = []


class Lazy:
    """Once in a window.

    Args:
        layer: whose weights move; where they are shared at the start, the clients all lie in the first
            window never see weights of their own: what is reported is written at once.
        leaps: only the change is wanted.
        scratch: for what a window needs.
    """

    def __init__(self, layer: MovingLayer, scratch: Scratch, *, leaps: bool) -> None:
        self.layer, self.scratch, self.leaps = layer, scratch, leaps
        self.parameters: list[Moving] = [layer.weight, *([layer.bias] if layer.bias else [])]
        self.decay, self.rate = layer.weight.motion.decay, layer.weight.motion.rate
        values = layer.weight.values
        self.onednn = values.dtype == torch.float32 and values.device.type == "cpu" and onednn.pays()
        self.data: StepData | None = None

    def open(self, data: StepData) -> None:
        self.data = data
        width = self.layer.layer.outputs
        clients, rows = len(data.lengths), sum(b for _, b in data.shapes)
        self.ends = [0]
        for _, b in data.shapes:
            self.ends.append(self.ends[-1] + b)
        self.rows = torch.split(data.inputs, list(data.lengths))
        self.outputs = self.scratch.take("window z", clients, rows, width)
        self.moves = self.scratch.take("window d", clients, rows, width)
        self.table = self.scratch.take("window g", clients, rows, rows)
        shared, weights = self.layer.weight.shared, self.layer.weight.values
        added = self.layer.weight.added
        self.drift = None if added is None else self.scratch.take("window u", clients, rows, width)
        bias = self.layer.bias
        self.taken = [sum(client < k for k, _ in data.shapes) for client in range(clients)]
        for client, (x, n, taken) in enumerate(zip(self.rows, data.lengths, self.taken, strict=True)):
            w = weights[client] if shared is None else shared
            table, padded = self.table[client], self.ends[taken]
            own = None if bias is None else _own(bias, client)
            self._product(self.outputs[client], x, w, own, padded)
            if added is not None and self.drift is not None:
                extra = None if bias is None or bias.added is None else bias.added[client]
                self._product(self.drift[client], x, added[client], extra, padded)
            if self.onednn:
                table[:n, :n].copy_(onednn.linear(x, x, None))
            else:
                self._fill(table, x, 0, taken, n)
            if n < padded:
                table[n:padded].zero_()
        if bias is not None:
            self.table.add_(1.0)

    def forward(self, step: int) -> Tensor:
        assert self.data is not None
        clients, width = self.data.shapes[step]
        start, end = self.ends[step], self.ends[step + 1]
        base = self.outputs[:clients, start:end]
        out = self.scratch.take("window step", clients, width, base.shape[2])
        if step == 0:
            return out.copy_(base)
        table, moves = self.table[:clients, start:end, :start], self.moves[:clients, :start]
        kept = self._power(step)
        if isinstance(kept, float) and self.drift is None:
            return torch.baddbmm(base, table, moves, beta=kept, out=out)
        torch.mul(base, _spread(kept, clients), out=out)
        if self.drift is not None:
            drift = self.drift[:clients, start:end]
            lengths = self._length(step)
            if isinstance(lengths, float):
                out.add_(drift, alpha=-self.rate * lengths)
            else:
                out.sub_(drift * _spread(self.rate * lengths, clients))
        return out.baddbmm_(table, moves)

    def update(self, step: int, g: Tensor) -> None:
        clients, start = len(g), self.ends[step]
        if isinstance(self.decay, Tensor):
            self.moves[:clients, :start].mul_(self.decay[:clients].view(-1, 1, 1))
        elif self.decay != 1.0:
            self.moves[:clients, :start].mul_(self.decay)
        self.moves[:clients, start : self.ends[step + 1]].copy_(g)

    def close(self) -> None:
        assert self.data is not None
        remaining = self.data.remaining
        for client, (x, n, taken) in enumerate(zip(self.rows, self.data.lengths, self.taken, strict=True)):
            moves = self.moves[client, :n]
            kept = _of(self._power(taken), client)
            for parameter in self.parameters:
                values = parameter.values[client]
                leap = self.leaps and parameter.fresh and not remaining[client]
                beta = kept - 1.0 if leap else kept
                base = parameter.start if parameter.fresh else values
                assert base is not None
                if values.ndim == 1:
                    total = moves.sum(0)
                    torch.add(total, base, alpha=beta, out=values) if beta else values.copy_(total)
                elif self.onednn:
                    total = onednn.linear(moves.t(), x.t(), None)
                    torch.add(total, base, alpha=beta, out=values) if beta else values.copy_(total)
                elif beta:
                    torch.addmm(base, moves.t(), x, beta=beta, out=values)
                else:
                    torch.mm(moves.t(), x, out=values)
                if parameter.added is not None:
                    length = _of(self._length(taken), client)
                    values.add_(parameter.added[client], alpha=-self.rate * length)
        for parameter in self.parameters:
            if parameter.fresh and self.leaps:
                parameter.leaps_from = sum(remaining)
            parameter.fresh = False
        self.data = None
        self.rows = ()

    def _product(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, padded: int) -> None:
        """x Wᵀ + bias, and zero in the rows that pad it."""
        rows = x.shape[0]
        part = out[:rows]
        if self.onednn:
            part.copy_(onednn.linear(x, weight, bias))
        elif bias is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(bias, x, weight.t(), out=part)
        if rows < padded:
            out[rows:padded].zero_()

    def _fill(self, table: Tensor, x: Tensor, first: int, last: int, rows: int) -> None:
        """x_t x_sᵀ for the steps s < t of [first, last), by halves: what lies above is not needed."""
        start, end = self.ends[first], min(self.ends[last], rows)
        if last - first <= _WHOLE:
            later, earlier = self.ends[first + 1], self.ends[last - 1]
            if later < end:
                torch.mm(x[later:end], x[start:earlier].t(), out=table[later:end, start:earlier])
            return
        middle = (first + last) // 2
        cut = self.ends[middle]
        if cut < end:
            torch.mm(x[cut:end], x[start:cut].t(), out=table[cut:end, start:cut])
            self._fill(table, x, middle, last, rows)
        self._fill(table, x, first, middle, rows)

    def _power(self, steps: int) -> float | Tensor:
        """β^steps."""
        return self.decay**steps

    def _length(self, steps: int) -> float | Tensor:
        """S, the sum of β^s over s < steps."""
        if isinstance(self.decay, float) and self.decay == 1.0:
            return float(steps)
        total: float | Tensor = torch.zeros_like(self.decay) if isinstance(self.decay, Tensor) else 0.0
        for step in range(steps):
            total = total + self._power(step)
        return total


def _own(parameter: Moving, client: int) -> Tensor:
    shared = parameter.shared
    return parameter.values[client] if shared is None else shared


def _spread(value: float | Tensor, clients: int) -> float | Tensor:
    return value[:clients].view(-1, 1, 1) if isinstance(value, Tensor) else value


def _of(value: float | Tensor, client: int) -> float:
    return float(value[client]) if isinstance(value, Tensor) else value
