"""A large first layer whose weights move once in a window of steps: `Lazy`.

With W the weights at the beginning of the window, the outputs of step t are

    x_t W_tᵀ = β^t x_t Wᵀ - η S_t x_t bᵀ + Σ_{s<t} β^{t-1-s} (x_t x_sᵀ) d_s,    S_t = Σ_{s<t} β^s

with d_s minus η times the derivatives of the outputs of step s, and b the constant term of the
direction. So a window takes one product with W for the outputs, one small table of x_t x_sᵀ, and one
product for the update: large weights are read and written once in a window and not three times in a step.
The bias is the weight of an input that is always 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.simulation import onednn
from fedsim.simulation.fused_data import StepData
from fedsim.simulation.fused_products import outputs, table
from fedsim.simulation.fused_stacks import Moving, MovingLayer, Scratch
from fedsim.simulation.fused_sums import BlockSum, inner

# Steps whose inputs' products are taken all at once: fewer calls for some products that nobody needs.
_WHOLE = 3


class Lazy:
    """Once in a window.

    Args:
        layer: whose weights move; where they are shared at the start, the clients all lie in the first
            window never see weights of their own: what is reported is written at once.
        leaps: only the change is wanted.
        scratch: for what a window needs.
        sums: takes the changes of clients that are through, None where they are reported.
        whole: products of the inputs of one step with each other are asked for too.
    """

    def __init__(
        self, layer: MovingLayer, scratch: Scratch, *, leaps: bool, sums: BlockSum | None, whole: bool
    ) -> None:
        self.layer, self.scratch, self.leaps, self.sums = layer, scratch, leaps, sums
        self.parameters: list[Moving] = [layer.weight, *([layer.bias] if layer.bias else [])]
        self.decay, self.rate = layer.weight.motion.decay, layer.weight.motion.rate
        values = layer.weight.values
        self.whole = whole or sums is not None  # norms need all of the table
        self.onednn = values.dtype == torch.float32 and values.device.type == "cpu" and onednn.pays()
        self.data: StepData | None = None

    def open(self, data: StepData) -> None:
        self.data = data
        width = self.layer.layer.outputs
        clients, rows = len(data.lengths), sum(b for _, b in data.shapes)
        self.ends = [0]
        for _, b in data.shapes:
            self.ends.append(self.ends[-1] + b)
        self.rows, self.taken = torch.split(data.inputs, list(data.lengths)), data.taken
        self.outputs = self.scratch.take("window z", clients, rows, width)
        self.moves = self.scratch.take("window d", clients, rows, width)
        self.table = self.scratch.take("window g", clients, rows, rows)
        shared, weights = self.layer.weight.shared, self.layer.weight.values
        bias, added = self.layer.bias, self.layer.weight.added
        self.drift = None if added is None else self.scratch.take("window u", clients, rows, width)
        if shared is not None:
            self._products(self.outputs, shared, None if bias is None else bias.start)
        common = self.sums is not None  # then all clients' terms are the same
        if common and added is not None and self.drift is not None:
            extra = None if bias is None or bias.added is None else bias.added[0]
            self._products(self.drift, added[0], extra)
        for client, (x, taken) in enumerate(zip(self.rows, self.taken, strict=True)):
            padded = self.ends[taken]
            if shared is None:
                own = None if bias is None else bias.values[client]
                self._product(self.outputs[client], x, weights[client], own, padded)
            if added is not None and self.drift is not None and not common:
                extra = None if bias is None or bias.added is None else bias.added[client]
                self._product(self.drift[client], x, added[client], extra, padded)
        self._fill_tables(data, 0.0 if bias is None else 1.0)

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

    def products(self, step: int) -> Tensor:
        assert self.data is not None
        clients, start, end = self.data.shapes[step][0], self.ends[step], self.ends[step + 1]
        return self.table[:clients, start:end, start:end]

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
        # Who goes on comes first.
        summed = sum(remaining) if self.sums is not None and self.layer.weight.fresh else len(remaining)
        for client, (x, n, taken) in enumerate(zip(self.rows, self.data.lengths, self.taken, strict=True)):
            if client >= summed:
                break
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
        if self.sums is not None:
            self._add_up(self.sums, self.data, summed)
        for parameter in self.parameters:
            if parameter.fresh and self.leaps and self.sums is None:
                parameter.leaps_from = sum(remaining)
            parameter.fresh = False
        self.data = None
        self.rows = ()

    def _add_up(self, sums: BlockSum, data: StepData, first: int) -> None:
        """The changes of those who are through: from client `first` on of products, before it of weights."""
        for parameter in self.parameters:
            for client in range(sum(data.remaining), first):
                assert parameter.start is not None
                change = (parameter.values[client] - parameter.start).unsqueeze(0)
                sums.add_changes(parameter.name, change, slice(client, client + 1))
        lengths = list(data.lengths[first:])
        if not lengths:
            return
        clients = range(first, len(data.lengths))
        owners = torch.from_numpy(np.repeat(np.asarray(clients), lengths)).to(data.inputs.device)
        moves = torch.cat([self.moves[c, :n] for c, n in zip(clients, lengths, strict=True)])
        sums.add_product(self.layer.layer, moves, data.inputs[-sum(lengths) :], owners)
        if sums.norms:
            squares = [
                inner(torch.mm(own, own.t()), self.table[client, :n, :n])
                for client, n, own in zip(clients, lengths, torch.split(moves, lengths), strict=True)
            ]
            sums.squares[first : first + len(squares)].add_(torch.stack(squares))
        if self.decay != 1.0 or self.drift is not None:
            self._add_common(sums, clients, torch.split(moves, lengths))

    def _add_common(self, sums: BlockSum, clients: range, moves: Sequence[Tensor]) -> None:
        """What moves clients beside their gradients: (β^t - 1) start - η S_t b.

        Its product with d_iᵀ x_i is one of d_i with what the start and b make of x_i, which is there.
        """
        starts = [p.start for p in self.parameters if p.start is not None]
        terms = [torch.zeros_like(p.start) if p.added is None else p.added[0]
                 for p in self.parameters if p.start is not None]  # fmt: skip
        between = [
            [sum(float((one.double() * other.double()).sum()) for one, other in zip(a, b, strict=True))
             for b in (starts, terms)] for a in (starts, terms)
        ]  # fmt: skip
        of_start, of_terms = 0.0, 0.0
        for client, own in zip(clients, moves, strict=True):
            taken, n = self.taken[client], len(own)
            less, more = float(self._power(taken)) - 1.0, -self.rate * float(self._length(taken))
            of_start += less * float(sums.given[client])
            of_terms += more * float(sums.given[client])
            if not sums.norms:
                continue
            square = 2.0 * less * inner(own, self.outputs[client, :n])
            if self.drift is not None:
                square = square + 2.0 * more * inner(own, self.drift[client, :n])
            square = square + less * less * between[0][0] + more * more * between[1][1]
            sums.squares[client] += square + 2.0 * less * more * between[0][1]
        for parameter, term in zip(self.parameters, terms, strict=True):
            assert parameter.start is not None
            sums.add_scaled(parameter.name, parameter.start, of_start)
            sums.add_scaled(parameter.name, term, of_terms)

    def _products(self, found: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """x Wᵀ + bias of all clients into [C, rows, out], and zero in the rows that pad it."""
        assert self.data is not None
        lengths = list(self.data.lengths)
        parts = torch.split(outputs(self.data.inputs, weight, bias), lengths)
        for own, part, n, taken in zip(found, parts, lengths, self.taken, strict=True):
            own[:n].copy_(part)
            own[n : self.ends[taken]].zero_()

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

    def _fill_tables(self, data: StepData, more: float) -> None:
        """x xᵀ of each client, plus a number."""
        place = 0
        for own, x, n, taken in zip(self.table, self.rows, data.lengths, self.taken, strict=True):
            padded = self.ends[taken]
            if self.onednn or self.whole:
                torch.add(table(data.inputs, place, n), more, out=own[:n, :n])
            else:
                self._fill(own, x, 0, taken, n)
                own[:n, :n].add_(more)
            own[n:padded].zero_()
            if self.whole:
                own[:n, n:padded].zero_()
            place += n

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


def _spread(value: float | Tensor, clients: int) -> float | Tensor:
    return value[:clients].view(-1, 1, 1) if isinstance(value, Tensor) else value


def _of(value: float | Tensor, client: int) -> float:
    return float(value[client]) if isinstance(value, Tensor) else value
